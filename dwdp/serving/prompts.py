"""Prompts: read from a JSON Lines file or the command line, checked, and turned into tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 64 << 20
_KEYS = {"id", "prompt", "prompt_token_ids"}


class PromptError(ValueError):
    """A prompt cannot be used. The text names the file and line, and what is wrong."""


@dataclass(frozen=True)
class Prompt:
    """One prompt as it was given: ``text`` or ``token_ids``, never both.

    Attributes:
        id: the user's name for it, unique in a run.
        where: file and line, for errors.
    """

    id: str | int
    where: str
    text: str | None = None
    token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt that the model can take."""

    id: str | int
    token_ids: tuple[int, ...]


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a JSON Lines file. Empty lines are skipped.

    A line is ``{"id": ..., "prompt": "text"}`` or ``{"id": ..., "prompt_token_ids": [1, 2, 3]}``; an
    id is a string or a whole number.

    Raises:
        PromptError: a line is malformed, an id comes twice, or there is no prompt at all.
        OSError: the file cannot be read.
    """
    prompts: list[Prompt] = []
    first_seen: dict[str | int, str] = {}
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > MAX_LINE_BYTES:
                raise PromptError(f"{where}: the line is longer than {MAX_LINE_BYTES >> 20} MiB")
            if not line.strip():
                continue
            prompt = _parse(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, where)
            if prompt.id in first_seen:
                raise PromptError(
                    f"{where}: id {prompt.id!r} was used before, at {first_seen[prompt.id]}"
                )
            first_seen[prompt.id] = where
            prompts.append(prompt)
    if not prompts:
        raise PromptError(f"{path}: no prompts in this file")
    return prompts


def prompts_from_texts(texts: Sequence[str]) -> list[Prompt]:
    """Prompts of the command line; their ids are their positions from 0 on.

    Raises:
        PromptError: a text is empty, or not Unicode.
    """
    prompts = []
    for index, text in enumerate(texts):
        where = f"--prompt number {index + 1}"
        _check_text(text, "the text", where)
        prompts.append(Prompt(index, where, text=text))
    return prompts


def tokenize(
    prompts: Iterable[Prompt],
    tokenizer: Any | None,
    *,
    vocab_size: int,
    max_positions: int | None,
    max_new_tokens: int,
) -> list[TokenizedPrompt]:
    """Turn texts into tokens, and check all tokens against the model.

    Args:
        tokenizer: a Transformers tokenizer, or None when the checkpoint has none.
        vocab_size: token ids lie below it.
        max_positions: tokens that the model can take, generated ones included; None: no limit known.
        max_new_tokens: tokens that may be generated after each prompt.

    Raises:
        PromptError: a prompt does not fit the model.
    """
    tokenized = []
    for prompt in prompts:
        token_ids = prompt.token_ids
        if token_ids is None:
            if tokenizer is None:
                raise PromptError(
                    f"{prompt.where}: the checkpoint has no tokenizer; "
                    'give "prompt_token_ids" instead of "prompt"'
                )
            token_ids = tuple(tokenizer(prompt.text)["input_ids"])
            if not token_ids:
                raise PromptError(f"{prompt.where}: the tokenizer makes no tokens of this text")
        for position, token_id in enumerate(token_ids):
            if not 0 <= token_id < vocab_size:
                raise PromptError(
                    f"{prompt.where}: token id {token_id} at position {position} is not in the "
                    f"vocabulary; ids go from 0 to {vocab_size - 1}"
                )
        if max_positions is not None and len(token_ids) + max_new_tokens > max_positions:
            raise PromptError(
                f"{prompt.where}: {len(token_ids)} prompt tokens and up to {max_new_tokens} new ones "
                f"are more than the {max_positions} positions of the model"
            )
        tokenized.append(TokenizedPrompt(prompt.id, token_ids))
    return tokenized


def _parse(line: bytes, where: str) -> Prompt:
    try:
        record = json.loads(line.rstrip().decode("utf-8"))
    except UnicodeDecodeError:
        raise PromptError(f"{where}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise PromptError(f"{where}: not JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where}: not usable JSON: {error}") from None
    if not isinstance(record, dict):
        raise PromptError(f"{where}: expected an object in braces, found {_kind(record)}")
    unknown = sorted(record.keys() - _KEYS)
    if unknown:
        raise PromptError(
            f"{where}: unknown key {unknown[0]!r}; known are id, prompt and prompt_token_ids"
        )
    if "id" not in record:
        raise PromptError(f'{where}: "id" is missing')
    identifier = record["id"]
    if isinstance(identifier, bool) or not isinstance(identifier, (str, int)):
        raise PromptError(f'{where}: "id" is {_kind(identifier)}; use a string or a whole number')
    if isinstance(identifier, str):
        _check_text(identifier, '"id"', where)
    if ("prompt" in record) == ("prompt_token_ids" in record):
        found = "both" if "prompt" in record else "neither"
        raise PromptError(f'{where}: give one of "prompt" and "prompt_token_ids", not {found}')
    if "prompt" in record:
        text = record["prompt"]
        if not isinstance(text, str):
            raise PromptError(f'{where}: "prompt" is {_kind(text)}, not a string')
        _check_text(text, '"prompt"', where)
        return Prompt(identifier, where, text=text)
    return Prompt(identifier, where, token_ids=_token_ids(record["prompt_token_ids"], where))


def _token_ids(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise PromptError(f'{where}: "prompt_token_ids" is {_kind(value)}, not a list')
    if not value:
        raise PromptError(f'{where}: "prompt_token_ids" is empty')
    for position, item in enumerate(value):
        if isinstance(item, bool) or not isinstance(item, int):
            raise PromptError(
                f'{where}: item {position} of "prompt_token_ids" is {_kind(item)}, not a whole number'
            )
    return tuple(value)


def _check_text(text: str, what: str, where: str) -> None:
    if not text:
        raise PromptError(f"{where}: {what} is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise PromptError(
            f"{where}: {what} holds half of a surrogate pair, which is no character"
        ) from None


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
    }
    return names.get(type(value), "an object")
