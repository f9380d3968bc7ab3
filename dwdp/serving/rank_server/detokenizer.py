"""Token ids to text while they arrive, never half a character; and the text of single tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"
_MAX_PENDING_BYTES = 3
"""Bytes of an unfinished UTF-8 character, which show as up to as many replacement characters."""

_CONTEXT_TOKENS = 6
_WINDOW_TOKENS = 8
_LONG_WINDOW_TOKENS = 32
"""A window is shortened when it has more tokens than this; the longer one is for text that is held back."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_WORD_START = "\u2581"


class Detokenizer:
    """Text of one growing sequence. The pieces that :meth:`add` and :meth:`finish` return, put together,
    are what the tokenizer makes of all tokens at once.

    A tokenizer's text for a token depends on its neighbours: a space at the start of a word is left out at
    the start of a text, and a character may be spread over several tokens. So a window of the last
    tokens is decoded with and without the new one, and the difference is what the new one adds.

    Args:
        prompt: tokens that go before, for the text to continue theirs; empty if it starts anew.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt[-_CONTEXT_TOKENS:])
        # The part of the window's text that is not this sequence's, or has been returned. A character that
        # the prompt leaves unfinished belongs to whoever finishes it.
        self._passed = self._decode(self._window).rstrip(_REPLACEMENT)

    def add(self, token_id: int) -> str:
        """The text that is certain now and was not before."""
        self._window.append(token_id)
        text = self._decode(self._window)
        stable = len(text)
        while stable > max(0, len(text) - _MAX_PENDING_BYTES) and text[stable - 1] == _REPLACEMENT:
            stable -= 1
        added = ""
        # Some tokenizers show a whole run of bytes as replacements until its last character is complete.
        if text.startswith(self._passed) and stable > len(self._passed):
            added = text[len(self._passed) : stable]
            self._passed = text[:stable]
        if len(self._window) > _LONG_WINDOW_TOKENS:
            self._shorten(len(self._window) - _CONTEXT_TOKENS)
        elif len(self._window) > _WINDOW_TOKENS and stable == len(text):
            self._shorten(len(self._window) - 1)
        return added

    def finish(self) -> str:
        """What was held back: there are no more tokens to complete it."""
        text = self._decode(self._window)
        added = text[len(self._passed) :]
        self._passed = text
        return added

    def _shorten(self, num_tokens: int) -> None:
        """Forget the window's first tokens, as many as ``num_tokens``, where the text can be cut there."""
        text = self._decode(self._window)
        head, tail = self._window[:num_tokens], self._window[num_tokens:]
        before, after = self._decode(head), self._decode(tail)
        if before + after == text and self._passed.startswith(before):
            self._window = tail
            self._passed = self._passed[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        if not token_ids:
            return ""
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text


class TokenTexts:
    """The bytes of single tokens, as log-probabilities report them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._is_byte_level = "ByteLevel" in str(
            getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", "")
        )
        self._literal = {
            token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()
        }

    def of(self, token_id: int) -> bytes:
        """UTF-8 of the token, or a part of a character's. Empty for an id without a token."""
        if token_id in self._literal:
            return self._literal[token_id].encode()
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(piece, str):
            return b""
        if self._is_byte_level and all(char in BYTE_OF_CHAR for char in piece):
            return bytes(BYTE_OF_CHAR[char] for char in piece)
        match = _BYTE_TOKEN.fullmatch(piece)
        if match is not None:
            return bytes([int(match[1], 16)])
        return piece.replace(_WORD_START, " ").encode("utf-8", "replace")


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level vocabularies: printable bytes stand for themselves, the others for
    characters from U+0100 on. Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


BYTE_OF_CHAR = _byte_level_alphabet()
"""How byte-level vocabularies write bytes."""
