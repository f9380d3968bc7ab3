"""Requests for ranks whose own server checks them. Of a body only what routing needs is read.

Everything else in it is the rank's to take or to refuse: options that OpenAI has and this project's own
ranks do not (tools, response formats, penalties), those of the engine, and values of a wrong type or out of
range. Refused here are bodies alone of which nobody could say how much work they are, or which would be
too much for the router: no JSON object, a prompt or messages of an unknown form, or too many of them.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from dwdp.serving.openai.requests import (
    MAX_CHOICES,
    MAX_MESSAGES,
    MAX_PROMPTS,
    StopAtFirstError,
)

_MAX_DIGITS = 18


def _count(value: Any) -> int | None:
    """``value`` as a whole number from 1; None where it is none, or is one only to an odd reader."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= _MAX_DIGITS:
        value = int(value)
    if isinstance(value, float) and math.isfinite(value):
        value = math.ceil(value)
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    return value if is_count else None


def _check_form(prompt: Any) -> Any:
    """``prompt``, which is a text or a list that begins with a text, a token id or a list.

    Raises:
        ValueError: it is something else, or there are too many prompts in it.
    """
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or (
        prompt and not isinstance(prompt[0], str | list | int | float)
    ):
        raise ValueError("unknown form")
    if _holds_prompts(prompt) and len(prompt) > MAX_PROMPTS:
        raise ValueError("too many")
    return prompt


def _holds_prompts(prompt: list[Any]) -> bool:
    """Whether ``prompt`` is a list of prompts, not of token ids. The first item says it."""
    return bool(prompt) and isinstance(prompt[0], str | list)


_Count = Annotated[int | None, BeforeValidator(_count)]
_TEXT = {"type": "string"}
_TOKEN_IDS = {"type": "array", "items": {"type": "integer"}}
_Prompt = Annotated[
    Any,
    AfterValidator(_check_form),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT,
                _TOKEN_IDS,
                {"type": "array", "items": _TEXT, "maxItems": MAX_PROMPTS},
                {"type": "array", "items": _TOKEN_IDS, "maxItems": MAX_PROMPTS},
            ]
        }
    ),
]


class _RelayedRequest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    model: Annotated[Any, WithJsonSchema(_TEXT)] = None
    max_tokens: _Count = None
    n: _Count = None
    best_of: _Count = None

    @property
    def num_choices(self) -> int:
        """Sequences that are generated per prompt, at most :data:`MAX_CHOICES`."""
        return min(max(self.n or 1, self.best_of or 1), MAX_CHOICES)


class RelayedCompletionRequest(_RelayedRequest):
    """``POST /v1/completions``."""

    prompt: _Prompt

    @property
    def prompts(self) -> tuple[str | list[Any], ...]:
        """The prompts, one by one; what is none of the known forms counts as one without text."""
        if not isinstance(self.prompt, list) or not _holds_prompts(self.prompt):
            return (self.prompt,)
        return tuple(item if isinstance(item, str | list) else [] for item in self.prompt)

    @property
    def max_new_tokens(self) -> int | None:
        """Tokens to generate at most, per answer; None: what the rank takes for that."""
        return self.max_tokens


class RelayedChatCompletionRequest(_RelayedRequest):
    """``POST /v1/chat/completions``."""

    messages: Annotated[
        list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES), StopAtFirstError()
    ]
    max_completion_tokens: _Count = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The text of every message; images and the like count for nothing."""
        return tuple(_text(message.get("content")) for message in self.messages)

    @property
    def max_new_tokens(self) -> int | None:
        """Tokens to generate at most; None: what the rank takes for that."""
        return self.max_completion_tokens or self.max_tokens


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = (part.get("text") for part in content if isinstance(part, dict))
    return "".join(text for text in texts if isinstance(text, str))
