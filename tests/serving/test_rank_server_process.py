"""A rank's server as a process, asked by the official OpenAI client: answers, errors, and its end."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
from checkpoints import make_checkpoint
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from transformers import AutoModelForCausalLM, AutoTokenizer

from dwdp.config import DwdpConfig
from dwdp.group import serve_store
from dwdp.serving.rank_server.job import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    REQUEST_ID_HEADER,
    TIMEOUT_HEADER,
    RankServerJob,
)
from dwdp.serving.rank_server.options import RankOptions
from dwdp.serving.rank_server.server import listen

MODEL_DIR = Path(__file__).resolve().parents[2] / "examples" / "tiny_moe" / "model"
TOKEN = "a-token"
MODEL = "tiny"
PROMPT = "def main("
CHAT = [{"role": "user", "content": "class A:"}]
START_S = 120.0


class Rank:
    """One rank process and ways to talk to it."""

    def __init__(self, process: subprocess.Popen[bytes], name: str) -> None:
        self.process = process
        self.name = name
        self.http = httpx.Client(
            transport=httpx.HTTPTransport(uds=f"\0{name}"),
            base_url="http://rank",
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=60,
        )
        self.client = openai.OpenAI(
            api_key=TOKEN, base_url="http://rank/v1", http_client=self.http, max_retries=0
        )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"exit code {self.process.returncode}"
            try:
                if self.http.get("/health/ready").status_code == 200:
                    return
            except httpx.ConnectError:
                time.sleep(0.05)
        pytest.fail("the rank is not ready")

    def stats(self) -> dict[str, Any]:
        stats = self.http.get("/internal/stats").json()
        assert isinstance(stats, dict)
        return stats

    def wait_for(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + 30
        while True:
            stats = self.stats()
            if condition(stats):
                return stats
            assert time.monotonic() < deadline, stats
            time.sleep(0.02)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def job(
    name: str,
    model_dir: Path | str = MODEL_DIR,
    config: DwdpConfig | None = None,
    **options: Any,
) -> bytes:
    values = RankServerJob(
        model_dir=str(model_dir),
        served_model_name=MODEL,
        dtype="float32",
        num_threads=1,
        config=config if config is not None else DwdpConfig(),
        options=RankOptions(**options),
        socket=name,
        token=TOKEN,
        parent_pid=os.getpid(),
    )
    return values.model_dump_json().encode() + b"\n"


def start(
    line: bytes, environment: dict[str, str] | None = None, **kwargs: Any
) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", "dwdp.serving.rank_server"],
        stdin=subprocess.PIPE,
        env={**os.environ, **(environment or {})},
        **kwargs,
    )
    assert process.stdin is not None
    process.stdin.write(line)
    process.stdin.close()
    return process


@contextmanager
def started(
    config: DwdpConfig | None = None, model_dir: Path | str = MODEL_DIR, **options: Any
) -> Iterator[list[Rank]]:
    """A group of ranks, ready."""
    size = config.dwdp_size if config is not None else 1
    store = serve_store("127.0.0.1", 0, size)
    ranks = []
    try:
        for rank in range(size):
            name = f"dwdp-test-{secrets.token_hex(8)}"
            environment = {
                "DWDP_RANK": str(rank),
                "DWDP_WORLD_SIZE": str(size),
                "DWDP_RENDEZVOUS": f"127.0.0.1:{store.port}",
                "DWDP_STORE_IS_SERVED": "1",
            }
            process = start(job(name, model_dir, config, **options), environment)
            ranks.append(Rank(process, name))
        for one in ranks:
            one.wait_until_ready()
        yield ranks
    finally:
        for one in ranks:
            one.http.close()
            one.process.kill()
            one.process.wait()


@pytest.fixture(scope="module")
def rank() -> Iterator[Rank]:
    with started() as [one]:
        yield one


@pytest.fixture(scope="module")
def greedy() -> Iterator[Callable[[str, int], str]]:
    """What the unsharded model's own ``generate`` makes of a prompt."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def answer(prompt: str, num_tokens: int) -> str:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=num_tokens)
        new = output[0, inputs["input_ids"].shape[1] :]
        return str(tokenizer.decode(new, skip_special_tokens=True))

    yield answer
    torch.set_num_threads(num_threads)


def test_models(rank: Rank) -> None:
    assert [model.id for model in rank.client.models.list()] == [MODEL]
    assert rank.client.models.retrieve(MODEL).owned_by == "dwdp"
    with pytest.raises(openai.NotFoundError) as caught:
        rank.client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_a_completion_is_the_unsharded_models(
    rank: Rank, greedy: Callable[[str, int], str]
) -> None:
    answer = rank.client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=40, temperature=0
    )
    Completion.model_validate(answer.model_dump())
    [choice] = answer.choices
    assert choice.text == greedy(PROMPT, 40)
    assert (choice.finish_reason, choice.logprobs) == ("length", None)
    assert answer.id.startswith("cmpl-")
    assert answer.usage is not None
    num_prompt_tokens = len(AutoTokenizer.from_pretrained(MODEL_DIR)(PROMPT)["input_ids"])
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (num_prompt_tokens, 40)


@pytest.mark.parametrize("fetch_mode", ["direct", "staged"])
def test_every_rank_of_a_group_gives_the_unsharded_models_answers(
    greedy: Callable[[str, int], str], fetch_mode: Any
) -> None:
    prompts = [PROMPT, "import os", "class Reader:\n    def ", "return"]
    expected = [greedy(prompt, 24) for prompt in prompts]
    with started(DwdpConfig(dwdp_size=2, fetch_mode=fetch_mode)) as ranks:
        for number, one in enumerate(ranks):
            answer = one.client.completions.create(
                model=MODEL, prompt=prompts, max_tokens=24, temperature=0
            )
            assert [choice.text for choice in answer.choices] == expected
            stats = one.stats()
            assert (stats["rank"], stats["dwdp_size"]) == (number, 2)
            assert stats["batching"] == "continuous"
            assert stats["runtime"]["fetch_mode"] == fetch_mode
            assert (stats["runtime"]["num_fetches"] > 0) == (fetch_mode == "staged")
        # The other one goes on alone.
        ranks[0].process.kill()
        answer = ranks[1].client.completions.create(
            model=MODEL, prompt=prompts, max_tokens=24, temperature=0
        )
        assert [choice.text for choice in answer.choices] == expected
        assert ranks[1].end() == EXIT_DONE


def test_prompts_of_every_form_and_several_answers(rank: Rank) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    prompts = [PROMPT, "import os"]
    token_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    create = rank.client.completions.create
    common: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "temperature": 0}
    by_text = create(prompt=prompts, n=2, **common)
    texts = [choice.text for choice in by_text.choices]
    assert [choice.index for choice in by_text.choices] == [0, 1, 2, 3]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert [choice.text for choice in create(prompt=token_ids, **common).choices] == texts[::2]
    assert create(prompt=token_ids[1], **common).choices[0].text == texts[2]


def test_a_stream_brings_what_the_whole_answer_has(rank: Rank) -> None:
    common: dict[str, Any] = {
        "model": MODEL,
        "prompt": [PROMPT, "import "],
        "max_tokens": 20,
        "temperature": 1.2,
        "seed": 5,
        "logprobs": 2,
        "stop": ["name", "zzz"],
    }
    whole = rank.client.completions.create(**common)
    texts = ["", ""]
    offsets: list[list[int]] = [[], []]
    reasons: list[Any] = [None, None]
    usage = None
    events = rank.client.completions.create(
        **common, stream=True, stream_options={"include_usage": True}
    )
    for event in events:
        assert usage is None
        usage = event.usage
        for choice in event.choices:
            assert reasons[choice.index] is None
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
            assert choice.logprobs is not None and choice.logprobs.text_offset is not None
            offsets[choice.index] += choice.logprobs.text_offset
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    for choice, streamed in zip(whole.choices, offsets, strict=True):
        assert choice.logprobs is not None
        assert choice.logprobs.text_offset == streamed


def test_log_probabilities_of_a_completion(rank: Rank) -> None:
    answer = rank.client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=10, temperature=0, logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens and logprobs.token_logprobs and logprobs.top_logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text
    for token, value, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert len(top) == 3
        assert top[token] == value == max(top.values())


def test_a_chat_answer_with_log_probabilities(rank: Rank) -> None:
    answer = rank.client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "developer", "content": "Write Python."}, *CHAT],  # type: ignore[list-item]
        max_completion_tokens=12,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    ChatCompletion.model_validate(answer.model_dump())
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.logprobs is not None and choice.logprobs.content is not None
    joined = b"".join(bytes(token.bytes or ()) for token in choice.logprobs.content)
    assert joined.decode() == choice.message.content
    for token in choice.logprobs.content:
        assert token.top_logprobs[0].logprob == token.logprob
        assert len(token.top_logprobs) == 2


def test_a_chat_stream(rank: Rank) -> None:
    common: dict[str, Any] = {
        "model": MODEL,
        "messages": CHAT,
        "max_tokens": 15,
        "temperature": 0,
        "n": 2,
    }
    whole = rank.client.chat.completions.create(**common)
    texts = ["", ""]
    roles: list[Any] = []
    for event in rank.client.chat.completions.create(**common, stream=True):
        ChatCompletionChunk.model_validate(event.model_dump())
        [choice] = event.choices
        roles += [(choice.index, choice.delta.role)] if choice.delta.role else []
        texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert sorted(roles) == [(0, "assistant"), (1, "assistant")]


def test_seeds_give_the_same_answers_again_and_different_ones_differ(rank: Rank) -> None:
    def texts(seed: int | None) -> list[str]:
        answer = rank.client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=12, temperature=1, n=3, seed=seed
        )
        return [choice.text for choice in answer.choices]

    first = texts(1)
    assert texts(1) == first
    assert len(set(first)) == 3
    assert texts(50) != first
    assert texts(None) != texts(None)


def test_many_at_once_with_the_asynchronous_client(
    rank: Rank, greedy: Callable[[str, int], str]
) -> None:
    prompts = [f"def f{number}(" for number in range(24)]

    async def ask() -> list[str]:
        transport = httpx.AsyncHTTPTransport(uds=f"\0{rank.name}")
        async with httpx.AsyncClient(transport=transport, timeout=60) as http:
            client = openai.AsyncOpenAI(
                api_key=TOKEN, base_url="http://rank/v1", http_client=http, max_retries=0
            )

            async def one(number: int, prompt: str) -> str:
                if number % 2:
                    answer = await client.completions.create(
                        model=MODEL, prompt=prompt, max_tokens=10, temperature=0
                    )
                    return answer.choices[0].text
                stream = await client.completions.create(
                    model=MODEL, prompt=prompt, max_tokens=10, temperature=0, stream=True
                )
                return "".join([event.choices[0].text async for event in stream])

            return await asyncio.gather(*(one(*item) for item in enumerate(prompts)))

    assert asyncio.run(ask()) == [greedy(prompt, 10) for prompt in prompts]


def test_options_of_no_effect_and_their_opposites(rank: Rank) -> None:
    rank.client.completions.create(
        model=MODEL, prompt="a", max_tokens=1, user="me", frequency_penalty=0
    )
    with pytest.raises(openai.BadRequestError, match="frequency_penalty is not supported"):
        rank.client.completions.create(model=MODEL, prompt="a", frequency_penalty=1)


def test_the_end_token_can_be_ignored(rank: Rank) -> None:
    answer = rank.client.completions.create(
        model=MODEL,
        prompt=[0],
        max_tokens=300,
        temperature=2,
        seed=1,
        extra_body={"ignore_eos": True},
    )
    assert answer.usage is not None and answer.usage.completion_tokens == 300


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"model": "other"}, 404, "model", "model_not_found"),
        ({"prompt": ""}, 400, "prompt", None),
        ({"prompt": [[]]}, 400, "prompt", None),
        ({"prompt": [2048]}, 400, "prompt", None),
        ({"prompt": [5] * 2048}, 400, "prompt", "context_length_exceeded"),
        ({"prompt": [5] * 2000, "max_tokens": 49}, 400, "prompt", "context_length_exceeded"),
        ({"prompt": ["a"] * 4, "n": 128}, 400, None, None),
        ({"temperature": 3}, 400, "temperature", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_mistakes_are_answered_in_openais_shape(
    rank: Rank,
    fields: dict[str, Any],
    status: int,
    param: str | None,
    code: str | None,
    stream: bool,
) -> None:
    body = {"model": MODEL, "prompt": "a", "stream": stream, **fields}
    response = rank.http.post("/v1/completions", json=body)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert error["message"]


def test_a_prompt_that_is_too_long_names_the_numbers(rank: Rank) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        rank.client.completions.create(model=MODEL, prompt=[5] * 2000, max_tokens=100)
    for number in ("2048", "2000", "100", "2100"):
        assert number in caught.value.message


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/none", 404, "not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models/tiny", 405, "method_not_allowed"),
        ("POST", "/health/live", 405, "method_not_allowed"),
    ],
)
def test_wrong_paths_and_methods(
    rank: Rank, method: str, path: str, status: int, code: str
) -> None:
    response = rank.http.request(method, path)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize("header", [None, "Bearer wrong", TOKEN, f"bearer {TOKEN}", "Bearer \xe9"])
def test_only_health_is_told_without_the_token(rank: Rank, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    transport = httpx.HTTPTransport(uds=f"\0{rank.name}")
    with httpx.Client(transport=transport, base_url="http://rank", headers=headers) as http:
        for path in ("/v1/models", "/internal/stats", "/nowhere"):
            response = http.get(path)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/health/live").json() == {"status": "live"}
        assert http.get("/health/ready").json() == {"status": "ready"}


def test_bodies_that_are_no_requests(rank: Rank) -> None:
    for body in (b"", b"{", b"[1]", b"\xff" * 100, b"[" * 100_000):
        response = rank.http.post("/v1/chat/completions", content=body)
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_the_request_id_becomes_part_of_the_answer(rank: Rank) -> None:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 1}
    response = rank.http.post("/v1/completions", json=body, headers={REQUEST_ID_HEADER: "abc-1"})
    assert response.json()["id"] == "cmpl-abc-1"
    assert response.headers[REQUEST_ID_HEADER] == "abc-1"
    response = rank.http.post("/v1/completions", json=body, headers={REQUEST_ID_HEADER: 'a"b'})
    assert response.headers[REQUEST_ID_HEADER] not in ("", 'a"b')


ENDLESS = {"model": MODEL, "prompt": "a", "max_tokens": 2000, "temperature": 0, "ignore_eos": True}


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_gives_the_work_up(rank: Rank, stream: bool) -> None:
    before = rank.stats()["requests"]["cancelled"]
    response = rank.http.post(
        "/v1/completions", json={**ENDLESS, "stream": stream}, headers={TIMEOUT_HEADER: "3"}
    )
    if not stream:
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "deadline_exceeded"
    else:
        assert response.status_code == 200
        *_, last = [line for line in response.text.splitlines() if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    rank.wait_for(lambda stats: stats["requests"]["cancelled"] == before + 1)
    rank.wait_for(lambda stats: stats["requests"]["running"] == 0)
    response = rank.http.post("/v1/completions", json=ENDLESS, headers={TIMEOUT_HEADER: "soon"})
    assert response.status_code == 400


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_work(rank: Rank, stream: bool) -> None:
    before = rank.stats()["requests"]["cancelled"]
    body = {**ENDLESS, "stream": stream, "n": 3}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(f"\0{rank.name}")
        content = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: rank\r\nAuthorization: Bearer {TOKEN}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        connection.sendall(head.encode() + content)
        stats = rank.wait_for(lambda stats: stats["requests"]["running"] == 3)
        assert stats["tokens"]["outstanding"] > 3 * 1000
    stats = rank.wait_for(lambda stats: stats["requests"]["cancelled"] == before + 3)
    assert stats["tokens"]["outstanding"] == 0
    rank.wait_for(lambda stats: stats["requests"]["running"] == 0)


def test_statistics_count_what_was_done(rank: Rank) -> None:
    before = rank.stats()
    rank.client.completions.create(model=MODEL, prompt=[5] * 7, max_tokens=9, n=2, temperature=0)
    after = rank.stats()
    assert after["requests"]["finished"] == before["requests"]["finished"] + 2
    assert after["tokens"]["generated"] == before["tokens"]["generated"] + 18
    assert after["tokens"]["prompt"] == before["tokens"]["prompt"] + 14
    assert after["state"] == "ready"
    assert after["pid"] == rank.process.pid
    assert after["limits"]["max_sequence_length"] == 2048
    assert 0 < after["memory"]["rss_bytes"] <= after["memory"]["peak_rss_bytes"]
    assert after["runtime"]["resident_expert_bytes"] > 15 << 20
    [lane] = after["timeline"]["lanes"]
    assert lane["name"] == "compute"
    for (begin, end, _), (following, _, _) in zip(lane["spans"], lane["spans"][1:], strict=False):
        assert begin <= end <= following <= after["timeline"]["now_s"]


def begin_stream(rank: Rank, num_tokens: int) -> Any:
    """A stream that has brought its first event."""
    stream = rank.client.completions.create(
        model=MODEL,
        prompt="a",
        max_tokens=num_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(stream)
    return stream


def test_a_full_queue_says_when_to_come_back() -> None:
    with started(batching="plain", max_waiting=1) as [rank]:
        body = {"model": MODEL, "prompt": "a", "max_tokens": 1}
        running = begin_stream(rank, 2000)
        response = rank.http.post("/v1/completions", json={**body, "n": 2})
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert rank.http.post("/v1/completions", json={**body, "n": 3}).status_code == 400
        with pytest.raises(openai.APITimeoutError):  # one may wait
            rank.client.with_options(timeout=0.5).completions.create(**body)
        running.close()
        rank.wait_for(lambda stats: stats["requests"]["running"] == 0)
        assert rank.http.post("/v1/completions", json={**body, "n": 2}).status_code == 200
        assert rank.stats()["requests"]["rejected"] == 2


def test_sigterm_lets_streams_finish_and_takes_nothing_new() -> None:
    with started(drain_grace_s=60) as [rank]:
        stream = begin_stream(rank, 300)
        rank.process.send_signal(signal.SIGINT)  # Ctrl-C is the parent's to handle
        rank.process.send_signal(signal.SIGTERM)
        events = 1 + sum(1 for event in stream if event.choices[0].text)
        assert events > 100
        assert rank.process.wait(30) == EXIT_DONE
        with pytest.raises(openai.APIConnectionError):
            rank.client.models.list()


def test_what_is_not_finished_within_the_grace_time_ends_with_an_error() -> None:
    with started(drain_grace_s=0.3) as [rank]:
        stream = begin_stream(rank, 2000)
        rank.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="ended before this was finished") as caught:
            list(stream)
        assert caught.value.code == "draining"
        assert rank.process.wait(30) == EXIT_DONE


def failure_of(line: bytes) -> tuple[int, str]:
    """Exit code and last line on standard error of a rank that does not come up."""
    process = start(line, stderr=subprocess.PIPE)
    assert process.stderr is not None
    last = process.stderr.read().decode().splitlines()[-1]
    return process.wait(START_S), last


def test_bad_input_ends_a_rank_with_a_reason(tmp_path: Path) -> None:
    code, message = failure_of(job("x", tmp_path / "none"))
    assert code == EXIT_BAD_INPUT
    assert message.startswith(f"error: {tmp_path}/none is not a directory")
    code, message = failure_of(job("x", max_sequence_length=4096))
    assert code == EXIT_BAD_INPUT
    assert "max_sequence_length is 4096, but the model has 2048 positions" in message
    code, message = failure_of(b"{}\n")
    assert code == EXIT_BAD_INPUT
    assert message.startswith("error: the job on standard input is no good")


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    code, message = failure_of(job("x", make_checkpoint("qwen3_moe", tmp_path / "model")))
    assert code == EXIT_BAD_INPUT
    assert message == f"error: {tmp_path}/model has no tokenizer, and text needs one"


def test_chat_templates(tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% if messages|length > 2 %}{{ raise_exception('too many') }}{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    )
    with started(chat_template=str(template)) as [rank]:
        messages = [{"role": "developer", "content": "be"}, {"role": "user", "content": "x"}]
        common: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "temperature": 0}
        answer = rank.client.chat.completions.create(messages=messages, **common)  # type: ignore[arg-type]
        same = rank.client.completions.create(prompt="<system>be<user>x<answer>", **common)
        assert answer.choices[0].message.content == same.choices[0].text
        with pytest.raises(openai.BadRequestError, match="too many") as caught:
            rank.client.chat.completions.create(messages=messages * 2, **common)  # type: ignore[arg-type]
        assert caught.value.param == "messages"
    template.write_text("{% for %}")
    code, message = failure_of(job("x", chat_template=str(template)))
    assert code == EXIT_BAD_INPUT
    assert f"{template}, line 1" in message


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


def test_other_users_processes_are_not_answered() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    name = f"dwdp-test-{secrets.token_hex(8)}"
    program = (
        "import os, socket, sys\n"
        "os.setuid(65534)\n"
        "s = socket.socket(socket.AF_UNIX); s.connect('\\0' + sys.argv[1])\n"
        "s.settimeout(30); print(s.recv(1))"
    )
    with listen(name) as listener:
        listener.settimeout(60)
        stranger = subprocess.Popen(
            [sys.executable, "-c", program, name], stdout=subprocess.PIPE, text=True
        )
        while not _has_connected(listener):
            time.sleep(0.01)
        friend = socket.socket(socket.AF_UNIX)
        friend.connect(f"\0{name}")
        connection, _ = listener.accept()
        friend.sendall(b"x")
        assert connection.recv(1) == b"x"  # the stranger came first, and was passed over
        assert stranger.communicate(timeout=60)[0] == "b''\n"
        connection.close()
        friend.close()


def _has_connected(listener: socket.socket) -> bool:
    return bool(select.select([listener], [], [], 0)[0])


def test_a_taken_name_is_an_error() -> None:
    name = f"dwdp-test-{secrets.token_hex(8)}"
    with listen(name), pytest.raises(OSError, match=f"cannot listen at @{name}"):
        listen(name)
