"""Prompts: what is accepted, and that every fault is named with its file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from dwdp.serving.prompts import (
    Prompt,
    PromptError,
    TokenizedPrompt,
    prompts_from_texts,
    read_prompts,
    tokenize,
)

GOOD = '{"id": "a", "prompt": "x"}'


class LetterTokenizer:
    """One token per letter: a is 0, b is 1, ..."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - ord("a") for letter in text if letter.isalpha()]}


def write(path: Path, *lines: str | bytes) -> Path:
    file = path / "prompts.jsonl"
    file.write_bytes(
        b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines)
    )
    return file


def test_both_forms_are_read_in_order(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        '{"id": "a", "prompt": "Grüße"}',
        "",
        '{"id": 7, "prompt_token_ids": [3, 0]}',
    )
    assert read_prompts(file) == [
        Prompt("a", f"{file}:1", text="Grüße"),
        Prompt(7, f"{file}:3", token_ids=(3, 0)),
    ]


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    file = write(tmp_path, b"\xef\xbb\xbf" + GOOD.encode() + b"\r")
    assert read_prompts(file) == [Prompt("a", f"{file}:1", text="x")]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"id": "b", "prompt": "x"', "not JSON: .*column 26"),
        (b"\xff\xfe\x00", "not UTF-8"),
        ("\0\0\0", "not JSON"),
        ("[" * 100_000, "not usable JSON"),
        ('{"id": ' + "1" * 5000 + "}", "not usable JSON"),
        ('["b", "x"]', "expected an object in braces, found a list"),
        ("null", "expected an object in braces, found null"),
        ('{"prompt": "x"}', '"id" is missing'),
        ('{"id": 1.5, "prompt": "x"}', '"id" is a number; use a string or a whole number'),
        ('{"id": true, "prompt": "x"}', '"id" is a truth value'),
        ('{"id": "", "prompt": "x"}', '"id" is empty'),
        ('{"id": "b"}', "not neither"),
        ('{"id": "b", "prompt": "x", "prompt_token_ids": [1]}', "not both"),
        ('{"id": "b", "prompt": ""}', '"prompt" is empty'),
        ('{"id": "b", "prompt": 5}', '"prompt" is a number, not a string'),
        ('{"id": "b", "prompt": "\\ud800"}', "half of a surrogate pair"),
        ('{"id": "b", "prompt_token_ids": []}', '"prompt_token_ids" is empty'),
        ('{"id": "b", "prompt_token_ids": "1 2"}', "is a string, not a list"),
        ('{"id": "b", "prompt_token_ids": [1, "2"]}', "item 1 .* is a string, not a whole number"),
        ('{"id": "b", "prompt_token_ids": [1, true]}', "item 1 .* is a truth value"),
        ('{"id": "b", "prompt": "x", "max_tokens": 3}', "unknown key 'max_tokens'"),
        (GOOD, r"id 'a' was used before, at .*prompts.jsonl:1"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str | bytes, what: str) -> None:
    file = write(tmp_path, GOOD, line)
    with pytest.raises(PromptError, match=what) as raised:
        read_prompts(file)
    assert str(raised.value).startswith(f"{file}:2: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("lines", [(), ("", "  ")], ids=["empty file", "blank lines"])
def test_a_file_without_prompts_is_refused(tmp_path: Path, lines: tuple[str, ...]) -> None:
    with pytest.raises(PromptError, match="no prompts in this file"):
        read_prompts(write(tmp_path, *lines))


def test_an_endless_line_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dwdp.serving.prompts.MAX_LINE_BYTES", 1 << 20)
    with pytest.raises(PromptError, match="/dev/zero:1: the line is longer than 1 MiB"):
        read_prompts(Path("/dev/zero"))


def test_texts_of_the_command_line_are_numbered() -> None:
    prompts = prompts_from_texts(["x", "y"])
    assert [(prompt.id, prompt.text) for prompt in prompts] == [(0, "x"), (1, "y")]
    with pytest.raises(PromptError, match="--prompt number 2: the text is empty"):
        prompts_from_texts(["x", ""])


def test_texts_become_tokens_and_tokens_stay() -> None:
    prompts = [Prompt("t", "f:1", text="abc"), Prompt("i", "f:2", token_ids=(5, 6))]
    tokenized = tokenize(
        prompts, LetterTokenizer(), vocab_size=26, max_positions=5, max_new_tokens=2
    )
    assert tokenized == [TokenizedPrompt("t", (0, 1, 2)), TokenizedPrompt("i", (5, 6))]


@pytest.mark.parametrize(
    ("prompt", "tokenizer", "what"),
    [
        (Prompt("a", "f:9", text="ab"), None, "the checkpoint has no tokenizer"),
        (Prompt("a", "f:9", text="..."), LetterTokenizer(), "makes no tokens of this text"),
        (Prompt("a", "f:9", token_ids=(1, 26)), None, "token id 26 at position 1 .* 0 to 25"),
        (Prompt("a", "f:9", token_ids=(-1,)), None, "token id -1 at position 0"),
        (
            Prompt("a", "f:9", token_ids=(1, 2, 3)),
            None,
            "3 prompt tokens and up to 8 new ones are more than the 10 positions",
        ),
    ],
)
def test_what_the_model_cannot_take_is_named(
    prompt: Prompt, tokenizer: LetterTokenizer | None, what: str
) -> None:
    with pytest.raises(PromptError, match=f"^f:9: .*{what}"):
        tokenize([prompt], tokenizer, vocab_size=26, max_positions=10, max_new_tokens=8)


def test_a_model_without_a_limit_takes_any_length() -> None:
    prompt = Prompt("a", "f:1", token_ids=(1,) * 1000)
    tokenize([prompt], None, vocab_size=26, max_positions=None, max_new_tokens=8)
