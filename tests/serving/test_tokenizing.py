"""Prompts that are certain to be too long are refused before they are tokenized; no other one is."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dwdp.serving.openai.errors import ApiError
from dwdp.serving.openai.requests import Message
from dwdp.serving.rank_server.tokenizing import PromptTokenizer, max_token_chars

TOKENIZER_FILE = (
    Path(__file__).resolve().parents[2] / "examples" / "tiny_moe" / "model" / "tokenizer.json"
)


def byte_level(**changes: Any) -> PreTrainedTokenizerFast:
    """The small model's tokenizer, with other steps where ``changes`` names them."""
    backend = Tokenizer.from_file(str(TOKENIZER_FILE))
    for name, value in changes.items():
        setattr(backend, name, value)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


PLAIN = byte_level()
COMPOSING = byte_level(
    normalizer=normalizers.Sequence([normalizers.NFC()]),
    pre_tokenizer=pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
)


@pytest.mark.parametrize("tokenizer", [PLAIN, COMPOSING])
@given(text=st.text() | st.text("\u0390\u1f82\u0301\u0345 ", max_size=400))
def test_no_token_stands_for_more_characters(tokenizer: Any, text: str) -> None:
    limit = max_token_chars(tokenizer)
    assert limit is not None
    for form in (text, unicodedata.normalize("NFD", text)):
        assert len(form) <= limit * len(tokenizer(form)["input_ids"])


def test_a_tokenizer_that_may_leave_text_out_has_no_limit() -> None:
    spaces = byte_level()
    spaces.add_tokens(AddedToken("<mask>", lstrip=True))
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    splits = [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()]
    for tokenizer in (
        spaces,
        PreTrainedTokenizerFast(tokenizer_object=words),
        byte_level(normalizer=normalizers.Strip()),
        byte_level(pre_tokenizer=pre_tokenizers.Sequence(splits)),
        byte_level(pre_tokenizer=pre_tokenizers.Whitespace()),
    ):
        assert max_token_chars(tokenizer) is None


def test_truncation_and_padding_are_off_before_the_first_prompt() -> None:
    """Switched off by the first prompt, they would change a tokenizer that is decoding at the same time."""
    tokenizer = byte_level()
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    prompts = PromptTokenizer(tokenizer)
    assert (backend.truncation, backend.padding) == (None, None)
    assert prompts.encode("def main(): pass", 100) == tuple(PLAIN("def main(): pass")["input_ids"])


def test_what_is_certain_to_be_too_long_is_refused() -> None:
    tokenizer = PromptTokenizer(PLAIN)
    most = 10 * (max_token_chars(PLAIN) or 0)
    assert len(tokenizer.encode("a" * most, 10)) > 10  # not certain: it is tokenized
    with pytest.raises(ApiError) as caught:
        tokenizer.encode("a" * (most + 1), 10)
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(ApiError) as caught:
        tokenizer.encode_chat([Message(role="user", content="a" * (most + 1))], 10)
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")
