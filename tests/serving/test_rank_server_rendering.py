"""Answers as documents: whole ones are written while they grow, and nobody waits for a long one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion as OpenAICompletion
from openai.types.chat import ChatCompletion as OpenAIChatCompletion
from openai.types.chat import ChatCompletionChunk
from transformers import AutoTokenizer

from dwdp.serving.openai.responses import ChatCompletion, Completion, Usage
from dwdp.serving.rank_server.app import RankApplication
from dwdp.serving.rank_server.backend import Backend, Deliver, SequenceRequest, Step
from dwdp.serving.rank_server.detokenizer import TokenTexts
from dwdp.serving.rank_server.engine import Engine
from dwdp.serving.rank_server.logprobs import (
    ChatLogprobsJson,
    CompletionLogprobsJson,
    TokenJson,
)
from dwdp.serving.rank_server.preparation import GenerationDefaults, Preparer
from dwdp.serving.rank_server.rendering import ChatRenderer, CompletionRenderer, Renderer
from dwdp.serving.rank_server.respond import Responder
from dwdp.serving.rank_server.sampling import TokenLogprobs
from dwdp.serving.rank_server.text import ReportedToken, TextDelta
from dwdp.serving.rank_server.tokenizing import PromptTokenizer

MODEL_DIR = Path(__file__).resolve().parents[2] / "examples" / "tiny_moe" / "model"
TOKENIZER = AutoTokenizer.from_pretrained(MODEL_DIR)
TEXTS = TokenTexts(TOKENIZER)
MAX_SEQUENCE_LENGTH = 8192
NUM_ANSWERS, NUM_TOKENS, NUM_CANDIDATES = 32, 48, 20
WAIT_S = 120.0


class ScriptedBackend(Backend):
    """Has no model: what it delivers is the test's to say."""

    name = "plain"
    max_sequence_length = MAX_SEQUENCE_LENGTH
    max_running = NUM_ANSWERS
    kv_cache_tokens = 0
    kv_cache_bytes = 0
    deliver: Deliver

    def __init__(self) -> None:
        self.ids: list[str] = []

    def start(self, deliver: Deliver, on_failure: Callable[[str], None]) -> None:
        self.deliver = deliver

    def add(self, request: SequenceRequest) -> None:
        self.ids.append(request.id)

    def cancel(self, sequence_id: str) -> None:
        self.ids.remove(sequence_id)

    def num_running(self) -> int:
        return len(self.ids)

    def stop(self) -> None:
        self.ids.clear()


class Turns:
    """Tokens whose log-probabilities each turn of the event loop writes."""

    def __init__(self) -> None:
        self.written: list[int] = []
        self._num_written = 0

    def count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for kind in (ChatLogprobsJson, CompletionLogprobsJson):
            monkeypatch.setattr(kind, "add", self._counted(kind.add))

    def _counted(self, add: Callable[[Any, ReportedToken], None]) -> Callable[..., None]:
        def add_and_count(own: Any, token: ReportedToken) -> None:
            self._num_written += 1
            add(own, token)

        return add_and_count

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(0)
            self.written.append(self._num_written)
            self._num_written = 0


class Client:
    """ASGI's other side: sends one request, and notes in which turn each piece of the answer came."""

    def __init__(self, body: bytes, turns: Turns) -> None:
        self._messages = [{"type": "http.request", "body": body}]
        self._turns = turns
        self.start: dict[str, Any] = {}
        self.pieces: list[bytes] = []
        self.piece_turns: list[int] = []

    async def receive(self) -> dict[str, Any]:
        if not self._messages:
            await asyncio.Event().wait()
        return self._messages.pop()

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.start = message
        else:
            self.pieces.append(message["body"])
            self.piece_turns.append(len(self._turns.written))


def application(backend: Backend) -> RankApplication:
    engine = Engine(backend, TOKENIZER, max_waiting=0)
    engine.start(asyncio.get_running_loop())
    preparer = Preparer(
        PromptTokenizer(TOKENIZER),
        GenerationDefaults(0.0, 0, 1.0, 0.0, frozenset()),
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        vocab_size=TOKENIZER.vocab_size,
    )
    statistics: Any = None  # is not asked
    return RankApplication("tiny", "", engine, preparer, TEXTS, statistics)


def token(answer: int, position: int) -> int:
    return 3 + (answer * 7 + position) % 200


def logprobs(answer: int, position: int) -> TokenLogprobs:
    first = token(answer, position)
    top = tuple((first + number, -0.25 - number) for number in range(NUM_CANDIDATES))
    return TokenLogprobs(-0.25, top)


def steps(ids: Sequence[str], position: int) -> list[Step]:
    reason: Any = "length" if position == NUM_TOKENS - 1 else None
    return [
        Step(one, (token(answer, position),), (logprobs(answer, position),), reason)
        for answer, one in enumerate(ids)
    ]


def ask(path: str, fields: dict[str, Any], turns: Turns) -> Client:
    """Put a request for ``NUM_ANSWERS`` answers, and generate them."""

    async def main() -> Client:
        backend = ScriptedBackend()
        app = application(backend)
        body = {"model": "tiny", "n": NUM_ANSWERS, "max_tokens": NUM_TOKENS, **fields}
        client = Client(json.dumps(body).encode(), turns)
        scope = {"type": "http", "method": "POST", "path": path, "headers": []}
        request = asyncio.ensure_future(app(scope, client.receive, client.send))
        while len(backend.ids) < NUM_ANSWERS and not request.done():
            await asyncio.sleep(0.001)
        watch = asyncio.ensure_future(turns.watch())
        for position in range(NUM_TOKENS):
            backend.deliver(steps(backend.ids, position))
            for _ in range(2 * NUM_ANSWERS):  # a forward takes longer
                await asyncio.sleep(0)
        await request
        watch.cancel()
        return client

    return asyncio.run(asyncio.wait_for(main(), WAIT_S))


CHAT_REQUEST = {
    "messages": [{"role": "user", "content": "a"}],
    "logprobs": True,
    "top_logprobs": NUM_CANDIDATES,
}
TEXT_REQUEST = {"prompt": "a", "logprobs": NUM_CANDIDATES}


@pytest.mark.parametrize(
    ("path", "fields"),
    [("/v1/chat/completions", CHAT_REQUEST), ("/v1/completions", TEXT_REQUEST)],
)
def test_a_long_whole_answer_leaves_others_their_turn(
    path: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = Turns()
    turns.count(monkeypatch)
    client = ask(path, fields, turns)
    # Made at the end, all of it would be the work of one turn.
    assert sum(turns.written) == NUM_ANSWERS * NUM_TOKENS
    assert max(turns.written) < NUM_ANSWERS * NUM_TOKENS / 16
    assert client.start["status"] == 200
    body = b"".join(client.pieces)
    assert dict(client.start["headers"])[b"content-length"] == str(len(body)).encode()
    assert len(client.pieces) > 3
    assert len(set(client.piece_turns)) == len(client.piece_turns)
    assert len(json.loads(body)["choices"]) == NUM_ANSWERS


def reported(token_ids: Sequence[int], value: float = -0.5) -> tuple[ReportedToken, ...]:
    return tuple(
        ReportedToken(one, 3 * position, TokenLogprobs(value, ((one, value), (one + 1, -7.25))))
        for position, one in enumerate(token_ids)
    )


TRICKY = 'q"\\\n\u2028\U0001f642\x00'
DELTAS = [
    TextDelta(1, TRICKY, reported(TOKENIZER(TRICKY)["input_ids"]), 9),
    TextDelta(0, "x = ", reported(TOKENIZER("x = ")["input_ids"], -1e-7), 3),
    TextDelta(1, "", (), 1, "length"),
    TextDelta(0, "1", reported(TOKENIZER("1")["input_ids"], -9999.0), 1, "stop"),
]
USAGE = Usage.of(5, 14)


def whole(renderer: Renderer) -> bytes:
    for delta in DELTAS:
        renderer.add(delta)
    return b"".join(renderer.pieces(USAGE))


@pytest.mark.parametrize("num_logprobs", [None, 0, 2])
def test_a_whole_completion_is_the_document_of_its_schema(num_logprobs: int | None) -> None:
    body = whole(CompletionRenderer("cmpl-1", 'a"b', TokenJson(TEXTS), num_logprobs))
    document = Completion.model_validate_json(body, strict=True)
    assert json.loads(document.model_dump_json()) == json.loads(body)
    OpenAICompletion.model_validate_json(body)
    assert (document.id, document.model, document.usage) == ("cmpl-1", 'a"b', USAGE)
    first, second = document.choices
    assert (first.index, first.text, first.finish_reason) == (0, "x = 1", "stop")
    assert (second.index, second.text, second.finish_reason) == (1, TRICKY, "length")
    if num_logprobs is None:
        assert first.logprobs is None and second.logprobs is None
        return
    assert first.logprobs is not None and second.logprobs is not None
    tokens = [*DELTAS[1].tokens, *DELTAS[3].tokens]
    assert first.logprobs.text_offset == tuple(one.offset for one in tokens)
    assert first.logprobs.token_logprobs == tuple(one.logprobs.chosen for one in tokens)
    assert first.logprobs.tokens == tuple(TEXTS.of(one.token_id).decode() for one in tokens)
    if num_logprobs == 0:
        assert first.logprobs.top_logprobs is None
    else:
        assert first.logprobs.top_logprobs is not None
        for one, top in zip(tokens, first.logprobs.top_logprobs, strict=True):
            text, other = (TEXTS.of(one.token_id + i).decode("utf-8", "replace") for i in (0, 1))
            assert top == {other: -7.25, text: one.logprobs.chosen}


@pytest.mark.parametrize("num_logprobs", [None, 0, 2])
def test_a_whole_chat_answer_is_the_document_of_its_schema(num_logprobs: int | None) -> None:
    body = whole(ChatRenderer("chatcmpl-1", 'a"b', TokenJson(TEXTS), num_logprobs))
    document = ChatCompletion.model_validate_json(body, strict=True)
    assert json.loads(document.model_dump_json()) == json.loads(body)
    OpenAIChatCompletion.model_validate_json(body)
    first, second = document.choices
    assert (first.index, first.message.content, first.finish_reason) == (0, "x = 1", "stop")
    assert (second.index, second.message.content, second.finish_reason) == (1, TRICKY, "length")
    assert document.usage == USAGE
    if num_logprobs is None:
        assert first.logprobs is None and second.logprobs is None
        return
    assert second.logprobs is not None
    assert b"".join(bytes(one.bytes) for one in second.logprobs.content) == TRICKY.encode()
    for one, given in zip(second.logprobs.content, DELTAS[0].tokens, strict=True):
        assert one.token == TEXTS.of(given.token_id).decode("utf-8", "replace")
        assert one.logprob == given.logprobs.chosen
        assert [top.logprob for top in one.top_logprobs] == [-0.5, -7.25]
        assert [bytes(top.bytes) for top in one.top_logprobs] == [
            TEXTS.of(given.token_id),
            TEXTS.of(given.token_id + 1),
        ]


def test_the_events_of_a_completion() -> None:
    renderer = CompletionRenderer("cmpl-1", "m", TokenJson(TEXTS), 2)
    events = [json.loads(event) for delta in DELTAS for event in renderer.chunks(delta)]
    assert [event["choices"][0]["index"] for event in events] == [1, 0, 1, 0]
    assert [event["choices"][0]["text"] for event in events] == [TRICKY, "x = ", "", "1"]
    assert [event["choices"][0]["finish_reason"] for event in events] == [
        None,
        None,
        "length",
        "stop",
    ]
    assert not any("usage" in event for event in events)
    parts = [events[1]["choices"][0]["logprobs"], events[3]["choices"][0]["logprobs"]]
    whole_logprobs = json.loads(whole(CompletionRenderer("cmpl-1", "m", TokenJson(TEXTS), 2)))[
        "choices"
    ][0]["logprobs"]
    assert {name: parts[0][name] + parts[1][name] for name in parts[0]} == whole_logprobs
    assert renderer.chunks(TextDelta(0, "")) == []
    last = json.loads(renderer.usage_chunk(USAGE))
    assert (last["choices"], last["usage"]) == ([], USAGE.model_dump())
    assert last.keys() - {"usage"} == events[0].keys()


def test_the_events_of_a_chat_answer() -> None:
    renderer = ChatRenderer("chatcmpl-1", "m", TokenJson(TEXTS), 2)
    documents = [event for delta in DELTAS for event in renderer.chunks(delta)]
    events = [ChatCompletionChunk.model_validate_json(one, strict=True) for one in documents]
    for index, content, reason in ((0, "x = 1", "stop"), (1, TRICKY, "length")):
        choices = [one.choices[0] for one in events if one.choices[0].index == index]
        first, *others, last = choices
        assert (first.delta.role, first.delta.content, first.logprobs) == ("assistant", "", None)
        assert "".join(one.delta.content or "" for one in others) == content
        assert [one.finish_reason for one in choices[:-1]] == [None] * (len(choices) - 1)
        assert (last.delta.model_dump(exclude_unset=True), last.finish_reason) == ({}, reason)
        tokens = [
            token.model_dump()
            for one in others
            if one.logprobs is not None
            for token in one.logprobs.content or ()
        ]
        body = json.loads(whole(ChatRenderer("chatcmpl-1", "m", TokenJson(TEXTS), 2)))
        assert tokens == body["choices"][index]["logprobs"]["content"]
    assert all("usage" not in json.loads(one) for one in documents)
    usage = ChatCompletionChunk.model_validate_json(renderer.usage_chunk(USAGE), strict=True)
    assert usage.choices == []
    assert usage.usage is not None and usage.usage.total_tokens == USAGE.total_tokens


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_more_log_probabilities_than_a_whole_answer_holds_are_refused(path: str) -> None:
    async def prepare(**fields: Any) -> tuple[int, dict[str, Any]]:
        backend = ScriptedBackend()
        app = application(backend)
        kind = TEXT_REQUEST if path == "/v1/completions" else CHAT_REQUEST
        body = {"model": "tiny", "n": NUM_ANSWERS, **kind, **fields}
        client = Client(json.dumps(body).encode(), Turns())
        scope = {"type": "http", "method": "POST", "path": path, "headers": []}
        request = asyncio.ensure_future(app(scope, client.receive, client.send))
        while not backend.ids and not request.done():
            await asyncio.sleep(0.001)
        if backend.ids:
            request.cancel()
            return 0, {}
        await request
        return client.start["status"], json.loads(b"".join(client.pieces))["error"]

    # 32 answers of 1560 tokens with 21 values each are 2^20 at most.
    assert asyncio.run(prepare(max_tokens=1560)) == (0, {})
    assert asyncio.run(prepare(max_tokens=1561, stream=True)) == (0, {})
    status, error = asyncio.run(prepare(max_tokens=1561))
    assert (status, error["param"]) == (400, "logprobs")
    for name in ("max_tokens", "logprobs", "stream", str(32 * 1561 * 21)):
        assert name in error["message"]


def test_a_complete_answer_that_is_read_slowly_is_not_cut_off() -> None:
    """Its time is up while it is on its way: half a document would be of no use."""

    async def main() -> None:
        sent: list[dict[str, Any]] = []
        timeout_s = 0.5

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) == 2:
                await asyncio.sleep(2 * timeout_s)

        async def receive() -> Any:
            await asyncio.Event().wait()

        async def work() -> Any:
            for piece in (b"[1,", b"2]"):
                yield piece

        responder = Responder(receive, send, {})
        await responder.send_work(work(), is_stream=False, timeout_s=timeout_s)
        assert [one["type"] for one in sent].count("http.response.start") == 1
        assert b"".join(one["body"] for one in sent[1:]) == b"[1,2]"
        assert [one["more_body"] for one in sent[1:]] == [True, False]

    asyncio.run(main())
