"""``dwdp serve`` with a real model: real clients, real kills, the unsharded model's answers."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from front import PATIENCE_S, Front, eventually, running, spawn

from dwdp.cli.main import run
from dwdp.config import DwdpConfig
from dwdp.engines.transformers.loading import inspect_checkpoint
from dwdp.fabric.base import FabricError
from dwdp.group import Group
from dwdp.launch import discover_launch
from dwdp.memory_plan import NotEnoughMemoryError
from dwdp.rendezvous import PeerFailure
from dwdp.serving.plan import plan_group_memory
from dwdp.serving.rank_server.batching import planned_kv_cache_bytes
from dwdp.serving.rank_server.job import RankServerJob
from dwdp.serving.rank_server.options import RankOptions
from dwdp.serving.supervisor.checkpoint import check_servable
from dwdp.serving.supervisor.transformers_ranks import TransformersRanks

MODEL_DIR = Path(__file__).parents[3] / "examples" / "tiny_moe" / "model"
MODEL = "tiny-moe"
KEY = "test-key"
PROMPTS = ["def f(", "class Point:", "import ", "for i in range(", "return self.", "while True:"]
NUM_TOKENS = 24


def serve(*options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dwdp", "serve", str(MODEL_DIR), "--port", "0"]
    # In bfloat16 the other sequences of a batch can tip the scales between two tokens.
    return spawn([*command, "--threads-per-rank", "1", "--dtype", "float32", *options])


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    process = serve("--dwdp-size", "2", "--served-model-name", MODEL, "--max-sequence-length", "64")
    with running(process, r"ready at (\S+)") as front:
        yield front


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    """What the unsharded model answers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    answers = {}
    for prompt in PROMPTS:
        tokens = torch.tensor([tokenizer(prompt).input_ids])
        generated = model.generate(tokens, do_sample=False, max_new_tokens=NUM_TOKENS)
        new = generated[0, tokens.shape[1] :]
        answers[prompt] = tokenizer.decode(new, skip_special_tokens=True)
    return answers


@pytest.fixture
def client(front: Front) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{front.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def asked(prompt: str) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0}


def complete(front: Front, prompt: str) -> str:
    return front.request("POST", "/v1/completions", asked(prompt)).text


def test_the_openai_client_completes(client: openai.OpenAI, expected: dict[str, str]) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    for prompt, answer in expected.items():
        completion = client.completions.create(**asked(prompt))
        assert completion.choices[0].text == answer
        assert completion.usage is not None
        assert 0 < completion.usage.completion_tokens <= NUM_TOKENS
        with client.completions.create(**asked(prompt), stream=True) as stream:
            assert "".join(chunk.choices[0].text for chunk in stream) == answer


def test_the_openai_client_chats(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "def add(a, b):"}]
    options: Any = {"model": MODEL, "messages": messages, "max_completion_tokens": 8, "seed": 7}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].logprobs is not None
    usage: Any = {"include_usage": True}
    with client.chat.completions.create(**options, stream=True, stream_options=usage) as stream:
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None and chunks[-1].usage == whole.usage


def test_the_openai_client_understands_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x", max_tokens=0)
    assert caught.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x " * 200, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"


def test_the_asynchronous_client_asks_all_at_once(front: Front, expected: dict[str, str]) -> None:
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{front.url}/v1", api_key="unused") as client:
            answers = await asyncio.gather(
                *(client.completions.create(**asked(prompt)) for prompt in PROMPTS * 3)
            )
        return [answer.choices[0].text for answer in answers]

    assert asyncio.run(ask_all()) == [expected[prompt] for prompt in PROMPTS * 3]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_streams(front: Front, expected: dict[str, str]) -> None:
    body = json.dumps({**asked(PROMPTS[0]), "stream": True})
    command = ["curl", "-sSN", "-w", "%{http_code}", "-d", body, f"{front.url}/v1/completions"]
    *events, status = subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout.split("\n\n")
    assert status == "200"
    assert events.pop() == "data: [DONE]"
    texts = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events]
    assert "".join(texts) == expected[PROMPTS[0]]


@pytest.mark.slow
def test_no_request_makes_the_server_fail(front: Front, tmp_path: Path) -> None:
    """schemathesis makes requests of every kind from the OpenAPI document. No 5xx, nothing undocumented."""
    program = Path(sys.executable).with_name("schemathesis")
    command = [str(program), "run", f"{front.url}/openapi.json"]
    checks = "not_a_server_error,status_code_conformance,content_type_conformance"
    result = subprocess.run(
        [
            *command,
            "--checks",
            f"{checks},response_schema_conformance",
            "--max-examples",
            "10",
            "--request-timeout",
            "120",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "COLUMNS": "160"},
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert complete(front, PROMPTS[0])


def test_answers_survive_the_ranks(expected: dict[str, str]) -> None:
    """One rank after the other is killed, then both, while requests keep coming: none is lost."""
    process = serve("--dwdp-size", "2", "--served-model-name", MODEL)
    with running(process, r"ready at (\S+)") as front, ThreadPoolExecutor(8) as pool:
        for victims in ([0], [1], [0, 1]):
            futures = [pool.submit(complete, front, prompt) for prompt in PROMPTS * 4]
            for rank in victims:
                front.kill(rank)
            answers = [future.result() for future in futures]
            assert answers == [expected[prompt] for prompt in PROMPTS * 4]
            front.await_states("ready", "ready")
        for rank in range(2):  # what came back answers alone as well
            pid = front.rank(rank)["pid"]
            os.kill(pid, signal.SIGSTOP)
            assert complete(front, PROMPTS[0]) == expected[PROMPTS[0]]
            os.kill(pid, signal.SIGCONT)
            front.await_states("ready", "ready")
        assert front.end() == 0


def test_a_rank_killed_during_set_up_ends_the_command() -> None:
    process = serve("--dwdp-size", "2")
    try:
        children = eventually(lambda: psutil.Process(process.pid).children(), "ranks are started")
        children[0].kill()
        _, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "was killed by SIGKILL during set-up" in errors.splitlines()[-1]
    assert errors.splitlines()[-1].startswith("dwdp: error: rank ")


def refusal(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one line with which the command refuses ``options``, before it starts any process."""
    assert run(["serve", str(MODEL_DIR), "--port", "0", *options]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    [line] = output.err.splitlines()
    assert line.startswith("dwdp: error: ")
    return line


def test_a_bad_option_is_refused_in_one_line() -> None:
    _, errors = (process := serve("--max-queued", "-1")).communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    assert len(errors.splitlines()) == 1 and "--max-queued" in errors


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--max-running", "0"], "--max-running"),
        (["--port", "65536"], "--port"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["--api-key", ""], "a key is empty"),
        (["--num-experts-per-worker", "1000"], "1000"),
        (["--device", "tpu"], "--device"),
        (["--max-sequence-length", "4096"], "the model has 2048 positions"),
        (["--kv-cache-tokens", "2000"], "one sequence of 2048 tokens needs 2112"),
        (["--kv-cache-tokens", str(10**12)], "GiB of key-value cache; "),
    ],
)
def test_bad_options_are_refused(
    capsys: pytest.CaptureFixture[str], options: list[str], text: str
) -> None:
    assert text in refusal(capsys, *options)


def test_a_gpu_that_is_not_there_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_driver() -> None:
        raise FabricError("the NVIDIA driver cannot be loaded: libcuda.so.1: cannot open")

    monkeypatch.setattr("dwdp.serving.plan.list_devices", no_driver)
    text = "error: --device cuda: the NVIDIA driver cannot be loaded"
    assert text in refusal(capsys, "--device", "cuda")
    monkeypatch.setattr("dwdp.serving.plan.list_devices", tuple)
    assert "there is no GPU that this process may use" in refusal(capsys, "--device", "cuda")


def test_a_port_that_is_taken_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        line = refusal(capsys, "--port", port)
    assert f"127.0.0.1:{port}" in line and "choose another --port" in line


def test_memory_that_only_a_restart_would_lack_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, options = DwdpConfig(dwdp_size=2), RankOptions()
    info = inspect_checkpoint(MODEL_DIR, "float32")
    cache_bytes = planned_kv_cache_bytes(info.config, info.dtype, options)
    plan = plan_group_memory(info, config, "cpu", kv_cache_bytes=cache_bytes)
    needed = sum(plan.parts(range(2)).values())
    share = max(plan.resident_expert_bytes)

    def check(available_bytes: int) -> None:
        monkeypatch.setattr("dwdp.serving.plan.available_memory_bytes", lambda: available_bytes)
        check_servable(MODEL_DIR, config, options, dtype="float32", device="cpu")

    check(needed + share)
    assert not caplog.records
    check(needed + share - 1)
    assert "a rank that is lost may not come back" in caplog.text
    with pytest.raises(NotEnoughMemoryError):
        check(needed - 1)


def test_rank_processes_are_told_the_device_and_share_the_gpus() -> None:
    config, options = DwdpConfig(dwdp_size=2), RankOptions(max_running=3)
    ranks = TransformersRanks(
        MODEL_DIR, MODEL, config, options, dtype="bfloat16", device="cuda", num_threads=2
    )
    ranks.new_group()
    start = ranks.start(1, 4)
    job = RankServerJob.model_validate_json(start.stdin)
    assert (job.device, job.dtype, job.options, job.config) == (
        "cuda",
        "bfloat16",
        options,
        config,
    )
    # Which GPU is found out by the group: the rank's place on its host, modulo the number of GPUs.
    assert (start.environment["DWDP_RANK"], start.environment["DWDP_INCARNATION"]) == ("1", "4")


def test_a_rank_is_told_that_a_peer_never_comes_back() -> None:
    ranks = TransformersRanks(
        MODEL_DIR, MODEL, DwdpConfig(dwdp_size=2), RankOptions(), dtype="auto", num_threads=1
    )
    ranks.new_group()
    ranks.report_death(0, "failed 10 times in a row")
    launch = discover_launch(ranks.start(1, 1).environment)
    assert launch is not None
    with pytest.raises(
        PeerFailure, match="rank 0: failed 10 times in a row; it is not started again"
    ):
        Group.join(launch, timeout_s=300.0)
