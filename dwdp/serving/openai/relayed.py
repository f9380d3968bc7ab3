"""Requests for ranks whose own server checks them. Of a body only what routing needs is read.

Everything else in it is the rank's to take or to refuse: options that OpenAI has and this project's own
ranks do not (tools, response formats, penalties), and those of the engine.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from dwdp.serving.openai.requests import (
    MAX_CHOICES,
    MAX_MESSAGES,
    MaxTokens,
    ModelName,
    Prompt,
    StopAtFirstError,
    split_prompt,
)


class _RelayedRequest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    model: ModelName
    max_tokens: MaxTokens = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES)

    @property
    def num_choices(self) -> int:
        """Sequences that are generated per prompt."""
        return max(self.n or 1, self.best_of or 1)


class RelayedCompletionRequest(_RelayedRequest):
    """``POST /v1/completions``."""

    prompt: Prompt = Field(union_mode="left_to_right")

    @property
    def prompts(self) -> tuple[str | list[int], ...]:
        """The prompts, one by one."""
        return split_prompt(self.prompt)

    @property
    def max_new_tokens(self) -> int | None:
        """Tokens to generate at most, per answer; None: what the rank takes for that."""
        return self.max_tokens


class RelayedChatCompletionRequest(_RelayedRequest):
    """``POST /v1/chat/completions``."""

    messages: Annotated[
        list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES), StopAtFirstError()
    ]
    max_completion_tokens: MaxTokens = None

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
