"""Log-probabilities as JSON, written token by token as they come: a long answer has a million of them.

Objects for each of them would take ten times the memory of their text, and making and dumping them ten
times the time. What is written here is what the classes in ``dwdp.serving.openai.responses`` describe.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache

from dwdp.serving.rank_server.detokenizer import TokenTexts
from dwdp.serving.rank_server.text import ReportedToken

_KEPT_TOKENS = 1 << 14
_PART_BYTES = 1 << 16


def json_string(text: str) -> str:
    """``text`` as a JSON string."""
    return json.dumps(text, ensure_ascii=False)


class TokenJson:
    """What is said about single tokens, as JSON. That of tokens which come up often is kept.

    Attributes:
        text: token id -> its text, a string. Bytes that are no whole character are U+FFFD in it.
        opening: token id -> an object with ``token`` and ``bytes``, up to where the value of ``logprob``
            has to follow.
    """

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self.text: Callable[[int], str] = lru_cache(_KEPT_TOKENS)(self._make_text)
        self.opening: Callable[[int], str] = lru_cache(_KEPT_TOKENS)(self._make_opening)

    def _make_text(self, token_id: int) -> str:
        return json_string(self._texts.of(token_id).decode("utf-8", "replace"))

    def _make_opening(self, token_id: int) -> str:
        values = ",".join(map(str, self._texts.of(token_id)))
        return f'{{"token":{self._make_text(token_id)},"bytes":[{values}],"logprob":'


class LogprobsJson(ABC):
    """The log-probabilities of one answer, or of a part of it.

    Args:
        tokens: what the tokens are called.
    """

    def __init__(self, tokens: TokenJson) -> None:
        self._tokens = tokens

    @abstractmethod
    def add(self, token: ReportedToken) -> None:
        """The next token. Its values are finite."""

    @abstractmethod
    def fragments(self) -> Iterator[bytes]:
        """The document, in pieces; can be had once."""


class ChatLogprobsJson(LogprobsJson):
    """As ``ChatLogprobs``: one object per token."""

    def __init__(self, tokens: TokenJson) -> None:
        super().__init__(tokens)
        self._content = _Array()

    def add(self, token: ReportedToken) -> None:
        opening = self._tokens.opening
        top = ",".join([f"{opening(one)}{value!r}}}" for one, value in token.logprobs.top])
        self._content.add(
            f'{opening(token.token_id)}{token.logprobs.chosen!r},"top_logprobs":[{top}]}}'
        )

    def fragments(self) -> Iterator[bytes]:
        yield b'{"content":'
        yield from self._content.fragments()
        yield b',"refusal":null}'


class CompletionLogprobsJson(LogprobsJson):
    """As ``CompletionLogprobs``: one array per property.

    Args:
        has_top: whether candidates are reported.
    """

    def __init__(self, tokens: TokenJson, has_top: bool) -> None:
        super().__init__(tokens)
        self._offsets, self._logprobs, self._texts = _Array(), _Array(), _Array()
        self._top = _Array() if has_top else None

    def add(self, token: ReportedToken) -> None:
        text = self._tokens.text
        self._offsets.add(str(token.offset))
        self._logprobs.add(repr(token.logprobs.chosen))
        self._texts.add(text(token.token_id))
        if self._top is not None:
            # The chosen token is among the candidates even if it is none of the likeliest, as at OpenAI. Of
            # those with the same text, the likeliest counts.
            top = {text(one): value for one, value in reversed(token.logprobs.top)}
            top[text(token.token_id)] = token.logprobs.chosen
            self._top.add("{" + ",".join([f"{one}:{top[one]!r}" for one in top]) + "}")

    def fragments(self) -> Iterator[bytes]:
        yield b'{"text_offset":'
        yield from self._offsets.fragments()
        yield b',"token_logprobs":'
        yield from self._logprobs.fragments()
        yield b',"tokens":'
        yield from self._texts.fragments()
        yield b',"top_logprobs":'
        if self._top is None:
            yield b"null"
        else:
            yield from self._top.fragments()
        yield b"}"


class _Array:
    """A JSON array that grows, in parts that are moved neither by its growth nor at its end."""

    def __init__(self) -> None:
        self._full: deque[bytes] = deque()
        self._last = bytearray(b"[")
        self._is_empty = True

    def add(self, item: str) -> None:
        if not self._is_empty:
            self._last += b","
        self._is_empty = False
        self._last += item.encode("utf-8", "replace")
        if len(self._last) >= _PART_BYTES:
            self._full.append(bytes(self._last))
            self._last.clear()

    def fragments(self) -> Iterator[bytes]:
        """Its parts, which are forgotten one by one."""
        while self._full:
            yield self._full.popleft()
        yield bytes(self._last) + b"]"
