"""How much work a request is, estimated without a tokenizer. Only what is certain is ground for a refusal."""

from __future__ import annotations

from dataclasses import dataclass

from dwdp.serving.openai.errors import context_length_exceeded
from dwdp.serving.openai.relayed import RelayedChatCompletionRequest, RelayedCompletionRequest
from dwdp.serving.openai.requests import ChatCompletionRequest, CompletionRequest

CHARS_PER_TOKEN = 4
UNLIMITED_NEW_TOKENS = 512
"""What an answer without a limit is taken for."""

MOST_NEW_TOKENS = 1 << 20
"""What an answer is taken for at most. A client may name any number."""

_TOKENS_PER_MESSAGE = 4

CheckedRequest = CompletionRequest | ChatCompletionRequest
RelayedRequest = RelayedCompletionRequest | RelayedChatCompletionRequest


@dataclass(frozen=True)
class Cost:
    """What a request is expected to cost a rank.

    Attributes:
        prompt_tokens, new_tokens: of all its sequences together.
        num_sequences: answers that it asks for.
    """

    prompt_tokens: int
    new_tokens: int
    num_sequences: int


def estimate_cost(request: CheckedRequest | RelayedRequest) -> Cost:
    """Prompt tokens (counted where they are given as ids, else by length), and the most that may follow."""
    if isinstance(request, ChatCompletionRequest | RelayedChatCompletionRequest):
        num_prompts = 1
        prompt_tokens = sum(_TOKENS_PER_MESSAGE + _text_tokens(text) for text in request.texts)
    else:
        num_prompts = len(request.prompts)
        prompt_tokens = sum(
            _text_tokens(prompt) if isinstance(prompt, str) else len(prompt)
            for prompt in request.prompts
        )
    num_sequences = num_prompts * request.num_choices
    new_tokens = min(request.max_new_tokens or UNLIMITED_NEW_TOKENS, MOST_NEW_TOKENS)
    return Cost(prompt_tokens * request.num_choices, num_sequences * new_tokens, num_sequences)


def check_length(request: CheckedRequest, limit: int | None) -> None:
    """Refuse what cannot fit into ``limit`` tokens (None: any number), whatever the tokenizer makes of it.

    Raises:
        ApiError: 400, the prompt's token ids, or one token for a text, and the answer are more than that.
    """
    if limit is None:
        return
    param, prompt_tokens = "messages", 1
    if isinstance(request, CompletionRequest):
        param = "prompt"
        prompt_tokens = max(
            1 if isinstance(prompt, str) else len(prompt) for prompt in request.prompts
        )
    new_tokens = request.max_new_tokens or 1
    if prompt_tokens + new_tokens > limit:
        raise context_length_exceeded(
            f"The longest sequence here is {limit} tokens; a prompt of {prompt_tokens} or more tokens and an "
            f"answer of {new_tokens} do not fit. Shorten the prompt or lower max_tokens",
            param,
        )


def _text_tokens(text: str) -> int:
    return 1 + len(text) // CHARS_PER_TOKEN
