"""From deltas to the protocol's documents: events of a stream, or one answer that is written as it grows.

The documents are those that the classes in ``dwdp.serving.openai.responses`` describe.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from dwdp._version import __version__
from dwdp.serving.openai.responses import FinishReason, Usage
from dwdp.serving.rank_server.logprobs import (
    ChatLogprobsJson,
    CompletionLogprobsJson,
    LogprobsJson,
    TokenJson,
    json_string,
)
from dwdp.serving.rank_server.text import TextDelta

FINGERPRINT = f"dwdp-{__version__}"

_PIECE_BYTES = 1 << 16
_ROLE = '{"role":"assistant","content":""}'


@dataclass
class _Answer:
    logprobs: LogprobsJson | None
    texts: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class Renderer(ABC):
    """Renders the answers to one request, as a stream or whole.

    Args:
        response_id: the ``id`` of its documents.
        model: the model's name, as it is served.
        tokens: what single tokens are called.
        num_logprobs: candidates reported per token; None: no log-probabilities.
    """

    _whole_kind: str
    """``object`` of a whole answer."""
    _chunk_kind: str
    """``object`` of an event."""

    def __init__(
        self, response_id: str, model: str, tokens: TokenJson, num_logprobs: int | None
    ) -> None:
        self._id = response_id
        self._model = model
        self._tokens = tokens
        self._num_logprobs = num_logprobs
        self._created = int(time.time())
        self._chunk_head = self._head(self._chunk_kind)
        self._answers: dict[int, _Answer] = {}

    @abstractmethod
    def chunks(self, delta: TextDelta) -> list[bytes]:
        """A stream's events for ``delta``; none if it brings nothing to tell."""

    def usage_chunk(self, usage: Usage) -> bytes:
        """The event that ends a stream which reports its tokens."""
        return self._chunk_head + b"]," + _usage(usage) + b"}"

    def add(self, delta: TextDelta) -> None:
        """What an answer that is not streamed has gained."""
        answer = self._answers.get(delta.index)
        if answer is None:
            answer = self._answers[delta.index] = _Answer(self._new_logprobs())
        answer.texts.append(delta.text)
        answer.finish_reason = delta.finish_reason
        if answer.logprobs is not None:
            for token in delta.tokens:
                answer.logprobs.add(token)

    def pieces(self, usage: Usage) -> Iterator[bytes]:
        """The document of all that was added, in pieces that take little time each; can be had once."""
        return _gathered(self._fragments(usage))

    def _fragments(self, usage: Usage) -> Iterator[bytes]:
        yield self._head(self._whole_kind)
        for position, index in enumerate(sorted(self._answers)):
            answer = self._answers.pop(index)
            yield b"," if position else b""
            yield f'{{"index":{index},{self._whole_text("".join(answer.texts))}'.encode(
                "utf-8", "replace"
            )
            yield from _choice_end(answer.logprobs, answer.finish_reason)
        yield b"]," + _usage(usage) + b"}"

    def _choice_chunk(
        self, delta: TextDelta, text: str, *, has_logprobs: bool, finish_reason: FinishReason | None
    ) -> bytes:
        """An event about one choice.

        Args:
            text: the member of the choice that holds its text.
            has_logprobs: whether it reports the tokens of ``delta``.
        """
        logprobs = self._new_logprobs() if has_logprobs else None
        if logprobs is not None:
            for token in delta.tokens:
                logprobs.add(token)
        choice = f'{{"index":{delta.index},{text}'.encode("utf-8", "replace")
        end = b"".join(_choice_end(logprobs, finish_reason))
        return self._chunk_head + choice + end + b"]}"

    def _head(self, kind: str) -> bytes:
        """A document up to its first choice."""
        members = {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": FINGERPRINT,
        }
        document = json.dumps(members, ensure_ascii=False, separators=(",", ":"))
        return document[:-1].encode("utf-8", "replace") + b',"choices":['

    @abstractmethod
    def _new_logprobs(self) -> LogprobsJson | None:
        """For an answer, or a part of one, that has no tokens yet; None if they are not reported."""

    @abstractmethod
    def _whole_text(self, text: str) -> str:
        """The member of a whole answer's choice that holds its text."""


class CompletionRenderer(Renderer):
    """``Completion``, and events of the same form."""

    _whole_kind = "text_completion"
    _chunk_kind = "text_completion"

    def chunks(self, delta: TextDelta) -> list[bytes]:
        if not delta.text and not delta.tokens and delta.finish_reason is None:
            return []
        text = self._whole_text(delta.text)
        return [
            self._choice_chunk(delta, text, has_logprobs=True, finish_reason=delta.finish_reason)
        ]

    def _new_logprobs(self) -> LogprobsJson | None:
        if self._num_logprobs is None:
            return None
        return CompletionLogprobsJson(self._tokens, has_top=self._num_logprobs > 0)

    def _whole_text(self, text: str) -> str:
        return f'"text":{json_string(text)}'


class ChatRenderer(Renderer):
    """``ChatCompletion``, and events with a ``delta`` in place of the ``message``.

    A delta has ``role`` in a choice's first event, and ``content`` in those that bring text.
    """

    _whole_kind = "chat.completion"
    _chunk_kind = "chat.completion.chunk"

    def __init__(
        self, response_id: str, model: str, tokens: TokenJson, num_logprobs: int | None
    ) -> None:
        super().__init__(response_id, model, tokens, num_logprobs)
        self._begun: set[int] = set()

    def chunks(self, delta: TextDelta) -> list[bytes]:
        chunks: list[bytes] = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            chunks.append(self._delta_chunk(delta, _ROLE))
        if delta.text or delta.tokens:
            content = f'{{"content":{json_string(delta.text)}}}'
            chunks.append(self._delta_chunk(delta, content, has_logprobs=True))
        if delta.finish_reason is not None:
            chunks.append(self._delta_chunk(delta, "{}", finish_reason=delta.finish_reason))
        return chunks

    def _delta_chunk(
        self,
        delta: TextDelta,
        document: str,
        *,
        has_logprobs: bool = False,
        finish_reason: FinishReason | None = None,
    ) -> bytes:
        text = f'"delta":{document}'
        return self._choice_chunk(
            delta, text, has_logprobs=has_logprobs, finish_reason=finish_reason
        )

    def _new_logprobs(self) -> LogprobsJson | None:
        return None if self._num_logprobs is None else ChatLogprobsJson(self._tokens)

    def _whole_text(self, text: str) -> str:
        content = json_string(text)
        return f'"message":{{"role":"assistant","content":{content},"refusal":null}}'


def _choice_end(
    logprobs: LogprobsJson | None, finish_reason: FinishReason | None
) -> Iterator[bytes]:
    """A choice from behind its text on."""
    yield b',"logprobs":'
    if logprobs is None:
        yield b"null"
    else:
        yield from logprobs.fragments()
    yield f',"finish_reason":{json.dumps(finish_reason)}}}'.encode()


def _usage(usage: Usage) -> bytes:
    return b'"usage":' + usage.model_dump_json().encode()


def _gathered(fragments: Iterable[bytes]) -> Iterator[bytes]:
    """``fragments`` put together to pieces of about ``_PIECE_BYTES``."""
    piece = bytearray()
    for fragment in fragments:
        piece += fragment
        if len(piece) >= _PIECE_BYTES:
            yield bytes(piece)
            piece.clear()
    if piece:
        yield bytes(piece)
