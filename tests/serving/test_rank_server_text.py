"""From tokens to text: whole characters, cut at stop strings, with log-probabilities where they belong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dwdp.serving.rank_server.backend import Step
from dwdp.serving.rank_server.detokenizer import Detokenizer, TokenTexts
from dwdp.serving.rank_server.sampling import TokenLogprobs
from dwdp.serving.rank_server.stops import StopMatcher
from dwdp.serving.rank_server.text import AnswerText, TextDelta

MODEL_DIR = Path(__file__).resolve().parents[2] / "examples" / "tiny_moe" / "model"
BYTE_LEVEL = AutoTokenizer.from_pretrained(MODEL_DIR)
END = 0


def word_piece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: words begin with U+2581, and bytes stand in for characters that have no token."""
    words = ["<unk>", "</s>", "\u2581hello", "\u2581", "lo", "\u2581you", "h", "\u00e9"]
    vocab = {word: index for index, word in enumerate(words)}
    vocab |= {f"<0x{byte:02X}>": len(words) + byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


WORD_PIECE = word_piece_tokenizer()
FIRST_BYTE_ID = WORD_PIECE.convert_tokens_to_ids("<0x00>")


def pieces(tokenizer: Any, token_ids: list[int], prompt: tuple[int, ...] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.add(token_id) for token_id in token_ids), detokenizer.finish()]


@given(st.text(max_size=60))
def test_pieces_make_up_the_text_and_hold_no_half_characters(text: str) -> None:
    parts = pieces(BYTE_LEVEL, BYTE_LEVEL(text)["input_ids"])
    assert "".join(parts) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


@given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1), max_size=120))
def test_any_tokens_come_out_as_the_tokenizer_has_them(token_ids: list[int]) -> None:
    expected = BYTE_LEVEL.decode(token_ids, skip_special_tokens=True)
    assert "".join(pieces(BYTE_LEVEL, token_ids)) == expected


@given(st.lists(st.integers(3, 258), min_size=60, max_size=150))
def test_long_runs_of_single_bytes_come_out_as_the_tokenizer_has_them(token_ids: list[int]) -> None:
    expected = BYTE_LEVEL.decode(token_ids, skip_special_tokens=True)
    assert "".join(pieces(BYTE_LEVEL, token_ids)) == expected


@given(st.lists(st.integers(2, 7) | st.sampled_from("\u4f60\u597d\U0001f642"), max_size=30))
def test_bytes_that_stand_in_for_characters_are_put_together(parts: list[int | str]) -> None:
    token_ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            token_ids.append(part)
        else:
            token_ids += [FIRST_BYTE_ID + byte for byte in part.encode()]
    expected = WORD_PIECE.decode(token_ids, skip_special_tokens=True)
    got = pieces(WORD_PIECE, token_ids)
    assert "".join(got) == expected
    assert not any("\ufffd" in part for part in got)


def test_a_text_that_continues_its_prompt_keeps_the_space_between() -> None:
    hello, you = (WORD_PIECE.convert_tokens_to_ids(word) for word in ("\u2581hello", "\u2581you"))
    assert "".join(pieces(WORD_PIECE, [you])) == "you"
    assert "".join(pieces(WORD_PIECE, [you], prompt=(hello,))) == " you"


def test_a_character_that_the_prompt_began_belongs_to_the_text_that_ends_it() -> None:
    first, *rest = BYTE_LEVEL("\U0001f642")["input_ids"]
    assert rest
    assert "".join(pieces(BYTE_LEVEL, rest, prompt=(first,))) == "\U0001f642"


def test_special_tokens_are_no_text() -> None:
    (token_id,) = BYTE_LEVEL("x")["input_ids"]
    assert "".join(pieces(BYTE_LEVEL, [token_id, END])) == "x"


@given(st.text(max_size=40))
def test_the_bytes_of_single_tokens_make_up_the_text(text: str) -> None:
    texts = TokenTexts(BYTE_LEVEL)
    assert b"".join(texts.of(one) for one in BYTE_LEVEL(text)["input_ids"]) == text.encode()


def test_the_bytes_of_special_and_unknown_tokens() -> None:
    assert TokenTexts(BYTE_LEVEL).of(END) == b"<|endoftext|>"
    assert TokenTexts(BYTE_LEVEL).of(10**6) == b""
    texts = TokenTexts(WORD_PIECE)
    assert texts.of(WORD_PIECE.convert_tokens_to_ids("\u2581hello")) == b" hello"
    assert texts.of(FIRST_BYTE_ID + 0xE4) == b"\xe4"


@given(
    st.lists(st.text(alphabet="ab ", min_size=1, max_size=4), max_size=3),
    st.lists(st.text(alphabet="ab ", max_size=4), max_size=12),
)
def test_stops_are_found_across_pieces_and_nowhere_else(stops: list[str], parts: list[str]) -> None:
    text = "".join(parts)
    matcher = StopMatcher(stops)
    passed = ""
    for part in parts:
        passed += matcher.add(part)
        assert text.startswith(passed)
        assert not any(stop in passed for stop in stops)
    ends = [text.find(stop) for stop in stops if stop in text]
    assert matcher.is_stopped == bool(ends)
    if not ends:
        assert passed + matcher.finish() == text
    else:
        # Of two that overlap, the one that is complete first may win.
        assert passed == text[: len(passed)]
        assert any(text.startswith(stop, len(passed)) for stop in stops)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["STOP", "\n\n"])
    assert matcher.add("go S") == "go "
    assert matcher.add("T") == ""
    assert matcher.add("AY\n") == "STAY"
    assert matcher.add("\nmore") == ""
    assert matcher.is_stopped
    assert matcher.add("more") == ""


def answer(stops: tuple[str, ...] = ()) -> AnswerText:
    return AnswerText(0, Detokenizer(BYTE_LEVEL), stops)


def step(text: str, finish_reason: Any = None, *, end: bool = False) -> Step:
    token_ids = tuple(BYTE_LEVEL(text)["input_ids"]) + ((END,) if end else ())
    logprobs = tuple(TokenLogprobs(-1.0 - i, ()) for i in range(len(token_ids)))
    return Step("s", token_ids, logprobs, finish_reason)


def reported(deltas: list[TextDelta]) -> list[tuple[str, int]]:
    texts = TokenTexts(BYTE_LEVEL)
    return [(texts.of(one.token_id).decode(), one.offset) for d in deltas for one in d.tokens]


def test_the_end_token_is_counted_but_not_reported() -> None:
    delta = answer().add(step("return x", "stop", end=True))
    assert (delta.text, delta.finish_reason) == ("return x", "stop")
    assert delta.num_tokens == len(BYTE_LEVEL("return x")["input_ids"]) + 1
    assert "".join(text for text, _ in reported([delta])) == "return x"


@pytest.mark.parametrize(("begin", "expected"), [("return x", "return x"), ("END", "END")])
def test_an_end_token_that_is_an_ordinary_one_is_no_text(begin: str, expected: str) -> None:
    """A checkpoint may end answers with a token that its tokenizer does not call special."""
    token_ids = (*BYTE_LEVEL(begin)["input_ids"], *BYTE_LEVEL(" ")["input_ids"])
    logprobs = tuple(TokenLogprobs(-1.0, ()) for _ in token_ids)
    delta = answer(("END ",)).add(Step("s", token_ids, logprobs, "stop"))
    assert (delta.text, delta.finish_reason) == (expected, "stop")
    assert delta.num_tokens == len(token_ids)
    assert "".join(text for text, _ in reported([delta])) == expected


def test_a_stop_string_in_the_step_of_the_end_token_comes_first() -> None:
    delta = answer(("turn",)).add(step("return x", "stop", end=True))
    assert (delta.text, delta.finish_reason) == ("re", "stop")


def test_a_sequence_that_stops_without_an_end_token_keeps_its_last_one() -> None:
    growing = answer()
    deltas = [growing.add(step("return x")), growing.add(Step("s", finish_reason="stop"))]
    assert "".join(delta.text for delta in deltas) == "return x"
    assert "".join(text for text, _ in reported(deltas)) == "return x"


def test_offsets_say_where_each_tokens_text_begins() -> None:
    growing = answer()
    deltas = [growing.add(step("import os")), growing.add(step("\nx = 1", "length"))]
    text = "".join(delta.text for delta in deltas)
    assert text == "import os\nx = 1"
    for piece, offset in reported(deltas):
        assert text.startswith(piece, offset)


def test_tokens_of_a_stop_string_are_counted_but_not_reported() -> None:
    growing = answer(("= 1",))
    deltas = [growing.add(step("x =")), growing.add(step(" 1\n")), growing.add(step("y"))]
    assert "".join(delta.text for delta in deltas[:2]) == "x "
    assert deltas[1].finish_reason == "stop"
    assert "".join(text for text, _ in reported(deltas[:2])).startswith("x")
    assert all(offset < len("x ") for _, offset in reported(deltas[:2]))
    assert sum(delta.num_tokens for delta in deltas[:2]) <= len(
        BYTE_LEVEL("x =")["input_ids"] + BYTE_LEVEL(" 1\n")["input_ids"]
    )


def test_a_stop_string_that_is_never_completed_is_part_of_the_text() -> None:
    growing = answer(("END OF FILE",))
    deltas = [growing.add(step("END")), growing.add(step(" OF", "length"))]
    assert [delta.text for delta in deltas] == ["", "END OF"]
    assert deltas[-1].finish_reason == "length"


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_half_a_character_at_the_end_is_shown_as_such(cut: int) -> None:
    token_ids = tuple(BYTE_LEVEL("\U0001f642")["input_ids"])[:cut]
    delta = answer().add(Step("s", token_ids, (), "length"))
    assert delta.text == BYTE_LEVEL.decode(list(token_ids))
