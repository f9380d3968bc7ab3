"""How much work a request is, estimated without a tokenizer. It steers; nothing is refused by it."""

from __future__ import annotations

from dwdp.serving.openai.requests import ChatCompletionRequest, CompletionRequest
from dwdp.serving.router.balancer import Cost

CHARS_PER_TOKEN = 4
UNLIMITED_NEW_TOKENS = 512
"""What an answer without a limit is taken for."""

_TOKENS_PER_MESSAGE = 4


def estimate_cost(request: CompletionRequest | ChatCompletionRequest) -> Cost:
    """Prompt tokens (counted where they are given as ids, else by length), and the most that may follow."""
    if isinstance(request, ChatCompletionRequest):
        num_prompts = 1
        prompt_tokens = sum(
            _TOKENS_PER_MESSAGE + _text_tokens(message.text) for message in request.messages
        )
    else:
        num_prompts = len(request.prompts)
        prompt_tokens = sum(
            _text_tokens(prompt) if isinstance(prompt, str) else len(prompt)
            for prompt in request.prompts
        )
    num_sequences = num_prompts * request.num_choices
    new_tokens = num_sequences * (request.max_new_tokens or UNLIMITED_NEW_TOKENS)
    return Cost(prompt_tokens * request.num_choices, new_tokens, num_sequences)


def _text_tokens(text: str) -> int:
    return 1 + len(text) // CHARS_PER_TOKEN
