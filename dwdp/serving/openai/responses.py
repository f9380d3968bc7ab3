"""What the endpoint answers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length"]


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True)


class Model(_Document):
    """The model that is served. ``created`` is in seconds since 1970."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "dwdp"


class ModelList(_Document):
    object: Literal["list"] = "list"
    data: tuple[Model, ...]


class Usage(_Document):
    """Tokens of all prompts (each counted once) and of all answers, end tokens included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int) -> Usage:
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
        )


class CompletionLogprobs(_Document):
    """Per token: its text, where it starts in the answer (in characters), natural log-probabilities."""

    text_offset: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    tokens: tuple[str, ...]
    top_logprobs: tuple[dict[str, float], ...] | None


class CompletionChoice(_Document):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(_Document):
    """The answer to a completion request. ``created`` is in seconds since 1970."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: tuple[CompletionChoice, ...]
    usage: Usage


class TopLogprob(_Document):
    """One candidate for a token. ``bytes`` are its UTF-8; a token may hold a part of a character."""

    token: str
    bytes: tuple[int, ...]
    logprob: float


class TokenLogprob(TopLogprob):
    top_logprobs: tuple[TopLogprob, ...]


class ChatLogprobs(_Document):
    content: tuple[TokenLogprob, ...]
    refusal: None = None


class ChatMessage(_Document):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(_Document):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(_Document):
    """The answer to a chat request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: tuple[ChatChoice, ...]
    usage: Usage


class ErrorDetail(_Document):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(_Document):
    """The body of every response that is not an answer."""

    error: ErrorDetail = Field(
        description="What is wrong, and which field of the request is at fault."
    )
