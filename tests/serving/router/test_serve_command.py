"""``dwdp serve`` with a real model: real clients, real kills, the unsharded model's answers."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from front import Front, eventually, running, spawn

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
        import psutil

        children = eventually(lambda: psutil.Process(process.pid).children(), "ranks are started")
        children[0].kill()
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "was killed by SIGKILL during set-up" in errors.splitlines()[-1]
    assert errors.splitlines()[-1].startswith("dwdp: error: rank ")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--max-queued", "-1"], "--max-queued"),
        (["--max-running", "0"], "--max-running"),
        (["--port", "65536"], "--port"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["--api-key", ""], "a key is empty"),
        (["--num-experts-per-worker", "1000"], "1000"),
    ],
)
def test_bad_options_are_refused_in_one_line(options: list[str], text: str) -> None:
    _, errors = (process := serve(*options)).communicate(timeout=120)
    assert process.returncode == 2
    assert len(errors.splitlines()) == 1 and text in errors


def test_a_port_that_is_taken_is_named() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        _, errors = (process := serve("--port", port)).communicate(timeout=120)
    assert process.returncode == 2
    assert f"127.0.0.1:{port}" in errors and "choose another --port" in errors
