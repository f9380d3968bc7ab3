"""A rank's server as a process: alone and in a group, full, told to end, and failing to start."""

from __future__ import annotations

import asyncio
import io
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import torch
from checkpoints import make_checkpoint
from rank_servers import MODEL, PROMPT, START_S, Rank, begin_stream, job, start, started

from dwdp.config import DwdpConfig
from dwdp.serving.rank_exit import EXIT_BAD_INPUT, EXIT_DONE
from dwdp.serving.rank_server.process import main
from dwdp.serving.rank_server.server import listen

PROMPTS = [PROMPT, "import os", "class Reader:\n    def ", "return"]
TEMPLATE = (
    "{% if messages|length > 2 %}{{ raise_exception('too many') }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
)


@pytest.fixture(scope="module", params=["direct", "staged"])
def group(request: pytest.FixtureRequest) -> Iterator[list[Rank]]:
    """Two ranks; the tests below take them in turn, and end them."""
    config = DwdpConfig(dwdp_size=2, fetch_mode=request.param)
    with started(config, drain_grace_s=60) as ranks:
        yield ranks


def test_every_rank_of_a_group_gives_the_unsharded_models_answers(
    group: list[Rank], greedy: Callable[[str, int], str], request: pytest.FixtureRequest
) -> None:
    expected = [greedy(prompt, 24) for prompt in PROMPTS]
    for number, rank in enumerate(group):
        assert answers(rank) == expected
        stats = rank.stats()
        assert (stats["rank"], stats["dwdp_size"]) == (number, 2)
        assert stats["batching"] == "continuous"
        is_staged = stats["runtime"]["fetch_mode"] == "staged"
        assert (stats["runtime"]["num_fetches"] > 0) == is_staged
    assert stats["runtime"]["fetch_mode"] == request.node.callspec.params["group"]


def test_a_rank_goes_on_alone(group: list[Rank], greedy: Callable[[str, int], str]) -> None:
    group[0].process.kill()
    assert answers(group[1]) == [greedy(prompt, 24) for prompt in PROMPTS]


def answers(rank: Rank) -> list[str]:
    answer = rank.client.completions.create(
        model=MODEL, prompt=PROMPTS, max_tokens=24, temperature=0
    )
    return [choice.text for choice in answer.choices]


def test_sigterm_lets_streams_finish_and_takes_nothing_new(group: list[Rank]) -> None:
    rank = group[1]
    stream = begin_stream(rank, 300)
    rank.process.send_signal(signal.SIGINT)  # Ctrl-C is the parent's to handle
    rank.process.send_signal(signal.SIGTERM)
    events = 1 + sum(1 for event in stream if event.choices[0].text)
    assert events > 100
    assert rank.process.wait(30) == EXIT_DONE
    with pytest.raises(openai.APIConnectionError):
        rank.client.models.list()


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rank]:
    """A rank that answers one request at a time and lets one wait; the last test with it ends it."""
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATE)
    with started(
        batching="plain", max_waiting=1, drain_grace_s=0.3, chat_template=str(template)
    ) as [rank]:
        yield rank


def test_a_full_queue_says_when_to_come_back(narrow: Rank) -> None:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 1}
    running = begin_stream(narrow, 2000)
    response = narrow.http.post("/v1/completions", json={**body, "n": 2})
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    assert narrow.http.post("/v1/completions", json={**body, "n": 3}).status_code == 400
    with pytest.raises(openai.APITimeoutError):  # one may wait
        narrow.client.with_options(timeout=0.5).completions.create(**body)
    running.close()
    narrow.wait_for(lambda stats: stats["requests"]["running"] == 0)
    assert narrow.http.post("/v1/completions", json={**body, "n": 2}).status_code == 200
    assert narrow.stats()["requests"]["rejected"] == 2


def test_chat_templates(narrow: Rank) -> None:
    messages: Any = [{"role": "developer", "content": "be"}, {"role": "user", "content": "x"}]
    common: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "temperature": 0}
    answer = narrow.client.chat.completions.create(messages=messages, **common)
    same = narrow.client.completions.create(prompt="<system>be<user>x<answer>", **common)
    assert answer.choices[0].message.content == same.choices[0].text
    with pytest.raises(openai.BadRequestError, match="too many") as caught:
        narrow.client.chat.completions.create(messages=messages * 2, **common)
    assert caught.value.param == "messages"


def test_what_is_not_finished_within_the_grace_time_ends_with_an_error(narrow: Rank) -> None:
    stream = begin_stream(narrow, 2000)
    narrow.process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="ended before this was finished") as caught:
        list(stream)
    assert caught.value.code == "draining"
    assert narrow.process.wait(30) == EXIT_DONE


@pytest.fixture
def failure_of(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[[bytes], str]]:
    """Runs a rank that does not come up, in this process; its last line on standard error."""

    def fail(line: bytes) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO(line.decode()))
        assert main() == EXIT_BAD_INPUT
        return capfd.readouterr().err.splitlines()[-1]

    handler, num_threads = signal.getsignal(signal.SIGINT), torch.get_num_threads()
    yield fail
    signal.signal(signal.SIGINT, handler)
    torch.set_num_threads(num_threads)


def test_bad_input_ends_a_rank_with_a_reason(tmp_path: Path) -> None:
    process = start(job("x", tmp_path / "none"), stderr=subprocess.PIPE)
    assert process.stderr is not None
    message = process.stderr.read().decode().splitlines()[-1]
    assert process.wait(START_S) == EXIT_BAD_INPUT
    assert message.startswith(f"error: {tmp_path}/none is not a directory")


def test_what_a_rank_refuses(failure_of: Callable[[bytes], str], tmp_path: Path) -> None:
    message = failure_of(job("x", parent_pid=None, max_sequence_length=4096))
    assert "max_sequence_length is 4096, but the model has 2048 positions" in message
    message = failure_of(b"{}\n")
    assert message.startswith("error: the job on standard input is no good")
    template = tmp_path / "chat.jinja"
    template.write_text("{% for %}")
    message = failure_of(job("x", parent_pid=None, chat_template=str(template)))
    assert f"{template}, line 1" in message


def test_a_checkpoint_without_a_tokenizer_is_refused(
    failure_of: Callable[[bytes], str], tmp_path: Path
) -> None:
    model_dir = make_checkpoint("qwen3_moe", tmp_path / "model")
    message = failure_of(job("x", model_dir, parent_pid=None))
    assert message == f"error: {tmp_path}/model has no tokenizer, and text needs one"


def test_a_rank_ends_with_its_parent(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys, time, os\n"
        "p = subprocess.Popen([sys.executable, '-m', 'dwdp.serving.rank_server'], stdin=subprocess.PIPE)\n"
        "line = open(sys.argv[1]).read().replace('PARENT', str(os.getpid()))\n"
        "p.stdin.write(line.encode()); p.stdin.close()\n"
        "print(p.pid, flush=True); time.sleep(600)"
    )
    name = f"dwdp-test-{secrets.token_hex(8)}"
    line = job(name).decode().replace(f'"parent_pid":{os.getpid()}', '"parent_pid":PARENT')
    (tmp_path / "job").write_text(line)
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "job")], stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    try:
        rank = Rank(parent, name)
        rank.wait_until_ready()
    finally:
        parent.kill()
        parent.wait()
    with suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
        child.wait(30)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


NUM_INTRUSIONS = 5


def test_other_users_processes_are_not_answered_and_hold_nobody_up() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    name = f"dwdp-test-{secrets.token_hex(8)}"
    program = (
        "import os, socket, sys\n"
        "os.setuid(65534)\n"
        f"sockets = [socket.socket(socket.AF_UNIX) for _ in range({NUM_INTRUSIONS})]\n"
        "for s in sockets: s.connect('\\0' + sys.argv[1]); s.settimeout(30)\n"
        "print('connected', flush=True)\n"
        "print(*(s.recv(1) for s in sockets))"
    )
    with listen(name) as listener:
        stranger = subprocess.Popen(
            [sys.executable, "-c", program, name], stdout=subprocess.PIPE, text=True
        )
        assert stranger.stdout is not None
        assert stranger.stdout.readline() == "connected\n"
        friend = socket.socket(socket.AF_UNIX)
        friend.connect(f"\0{name}")
        # Whoever calls accept can do something else after each of them; the last is left to asyncio.
        for _ in range(NUM_INTRUSIONS - 1):
            with pytest.raises(BlockingIOError):
                listener.accept()
        assert asyncio.run(_echo(listener, friend)) == b"x"
        assert stranger.communicate(timeout=60)[0].split() == ["b''"] * NUM_INTRUSIONS


async def _echo(listener: socket.socket, friend: socket.socket) -> bytes:
    """What a server of asyncio's at ``listener`` gives back to ``friend``, which is connected, for ``x``."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read(1))
        await writer.drain()
        writer.close()

    async with await asyncio.start_unix_server(answer, sock=listener):
        reader, writer = await asyncio.open_unix_connection(sock=friend)
        writer.write(b"x")
        try:
            return await asyncio.wait_for(reader.read(1), 60)
        finally:
            writer.close()


def test_a_taken_name_is_an_error() -> None:
    name = f"dwdp-test-{secrets.token_hex(8)}"
    with listen(name), pytest.raises(OSError, match=f"cannot listen at @{name}"):
        listen(name)
