"""One command serves a group: rank processes with a GPU each, behind one endpoint, started again if lost."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette

from dwdp.engines.tensorrt_llm import rank_stats
from dwdp.engines.tensorrt_llm.launch import group_devices
from dwdp.engines.tensorrt_llm.rank_launcher import served_name

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).parent / "stand_in_serve.py"
PATIENCE_S = 120.0
LAUNCHER = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "OMPI_MCA_ess": "x", "HF_HOME": "/cache"}


class Group:
    """The command, and what it writes."""

    def __init__(self, *options: str, **environ: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), "MODEL", "--parallel", "dwdp", *options],
            env={**os.environ, "PYTHONPATH": str(ROOT), **LAUNCHER, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    def wait_for(self, condition: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not (value := condition()):
            assert time.monotonic() < deadline, f"{what} did not come:\n" + "\n".join(self.lines)
            time.sleep(0.05)
        return value

    def find(self, pattern: str) -> list[str]:
        return [found[1] for line in list(self.lines) if (found := re.search(pattern, line))]

    @property
    def url(self) -> str:
        return str(
            self.wait_for(lambda: self.find(r"dwdp: ready at (\S+) with 2 rank"), "the URL")[0]
        )

    def ports(self, rank: int) -> list[str]:
        return self.find(rf"^rank {rank}: serving on (\d+)")

    def environment(self, rank: int, start: int = 0) -> dict[str, Any]:
        ports = self.wait_for(lambda: len(self.ports(rank)) > start and self.ports(rank), "a rank")
        document = get(f"http://127.0.0.1:{ports[start]}/environment")
        assert isinstance(document, dict)
        return document

    def end(self) -> int:
        code = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return code


def get(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
        return json.loads(response.read())


@pytest.fixture
def start() -> Iterator[Callable[..., Group]]:
    groups: list[Group] = []

    def start_group(*options: str, **environ: str) -> Group:
        groups.append(Group(*options, **environ))
        return groups[-1]

    yield start_group
    for group in groups:
        group.process.kill()
        group.process.wait()


CHAT = {
    "model": "any name",
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "What is the weather?"}]},
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "function"}]},
        {"role": "tool", "tool_call_id": "1", "content": "fine"},
    ],
    "tools": [{"type": "function", "function": {"name": "weather"}}],
    "response_format": {"type": "json_object"},
    "frequency_penalty": 0.5,
    "min_p": 0.1,
    "max_tokens": 1000,
}
"""Options that the ranks know and dwdp's own do not; more tokens than a rank has room for."""

OPTIONS = ("--dwdp_size", "2", "--num_devices", "3", "--host", "127.0.0.1", "--port", "0")


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.timeout(400)
def test_a_group_of_two_from_its_start_to_its_end(
    start: Callable[..., Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Importing TensorRT-LLM sets it, if another test did.
    monkeypatch.delenv("OMPI_MCA_coll_ucc_enable", raising=False)
    group = start(*OPTIONS, CUDA_VISIBLE_DEVICES="4,6,7")
    url = group.url

    ranks = [group.environment(rank) for rank in range(2)]
    assert [rank["CUDA_VISIBLE_DEVICES"] for rank in ranks] == ["4", "6"]
    assert [rank["DWDP_RANK"] for rank in ranks] == ["0", "1"]
    assert {rank["DWDP_WORLD_SIZE"] for rank in ranks} == {"2"}
    assert len({rank["DWDP_RENDEZVOUS"] for rank in ranks}) == 1
    assert len({rank["argv"][-1] for rank in ranks}) == 2  # ports of their own
    for rank in ranks:
        assert rank["HF_HOME"] == "/cache"
        assert not [key for key in rank if key.startswith(("SLURM_", "OMPI_"))]
        assert rank["argv"][1:8] == ["MODEL", "--parallel", "dwdp", *OPTIONS[:4]]

    request = {"model": "MODEL", "prompt": "a b c", "max_tokens": 4}
    answered: set[str] = set()
    failures: list[BaseException] = []
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            try:
                answered.add(get(f"{url}/v1/completions", request)["id"])
            except (urllib.error.URLError, ConnectionError) as error:
                failures.append(error)

    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    group.wait_for(lambda: answered == {"cmpl-0", "cmpl-1"}, "an answer of both ranks")

    os.kill(ranks[0]["pid"], signal.SIGKILL)
    again = group.environment(0, start=1)
    assert again["DWDP_INCARNATION"] == "1"
    assert again["DWDP_RENDEZVOUS"] == ranks[0]["DWDP_RENDEZVOUS"]
    assert is_running(ranks[1]["pid"])
    answered.clear()
    group.wait_for(lambda: answered == {"cmpl-0", "cmpl-1"}, "an answer of the rank that is back")
    assert get(f"{url}/v1/chat/completions", CHAT) == {"asked": CHAT}
    is_over.set()
    for client in clients:
        client.join()
    assert failures == []  # requests of the rank that was lost went to the other

    group.process.terminate()
    assert group.end() == 0
    assert not is_running(again["pid"]) and not is_running(ranks[1]["pid"])


@pytest.mark.timeout(300)
def test_ranks_end_with_the_command_that_started_them(start: Callable[..., Group]) -> None:
    group = start(*OPTIONS)
    assert group.url
    ranks = [group.environment(rank) for rank in range(2)]
    assert [rank["CUDA_VISIBLE_DEVICES"] for rank in ranks] == ["0", "1"]
    group.process.kill()
    group.wait_for(lambda: not any(is_running(rank["pid"]) for rank in ranks), "the ranks' end")


@pytest.mark.timeout(300)
def test_a_rank_that_refuses_ends_the_command_with_its_words(start: Callable[..., Group]) -> None:
    failure = json.dumps({"code": 2, "message": "that format is not supported"})
    group = start(*OPTIONS, FAIL_WITH=failure)
    assert group.end() == 2
    assert group.lines[-1] == "error: rank 1: that format is not supported"


@pytest.mark.timeout(300)
def test_fewer_gpus_than_ranks_are_refused(start: Callable[..., Group]) -> None:
    group = start("--dwdp_size", "4", *OPTIONS[2:])
    assert group.end() == 2
    assert "error: dwdp_size is 4, and 3 GPU(s) are visible here" in group.lines[-1]


def test_a_rank_says_what_it_takes() -> None:
    def make_server(*, llm: Any) -> Any:
        return SimpleNamespace(llm=llm, app=Starlette())

    module = SimpleNamespace(OpenAIServer=make_server)
    rank_stats.patch(module)
    args = SimpleNamespace(
        parallel="dwdp",
        dwdp_config={"dwdp_size": 4},
        env_overrides={"DWDP_RANK": "2", "DWDP_WORLD_SIZE": "4"},
        max_batch_size=256,
        max_seq_len=None,
    )
    (route,) = module.OpenAIServer(llm=SimpleNamespace(args=args)).app.routes
    assert route.path == "/internal/stats"
    document = json.loads(asyncio.run(route.endpoint(None)).body)
    assert document["limits"] == {"max_running": 256}
    assert (document["rank"], document["dwdp_size"], document["engine"]) == (2, 4, "tensorrt_llm")

    args.parallel = None
    assert module.OpenAIServer(llm=SimpleNamespace(args=args)).app.routes == []


def test_a_gpu_for_every_rank() -> None:
    assert group_devices(2, 3, {}) == ["0", "1"]
    assert group_devices(2, 2, {"CUDA_VISIBLE_DEVICES": "GPU-x,GPU-y"}) == ["GPU-x", "GPU-y"]


def test_a_model_is_called_as_trtllm_serve_calls_it(tmp_path: Path) -> None:
    assert served_name(str(tmp_path)) == tmp_path.name
    assert served_name("deepseek-ai/DeepSeek-R1") == "deepseek-ai/DeepSeek-R1"
