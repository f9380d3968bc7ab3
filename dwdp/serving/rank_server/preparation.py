"""From a request of the protocol to what the engine is to generate: defaults filled in, limits checked."""

from __future__ import annotations

import asyncio
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dwdp.serving.openai.errors import ApiError, context_length_exceeded, invalid
from dwdp.serving.openai.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
)
from dwdp.serving.rank_server.engine import AnswerRequest
from dwdp.serving.rank_server.sampling import SamplingParams
from dwdp.serving.rank_server.tokenizing import PromptTokenizer

if TYPE_CHECKING:
    from transformers import GenerationConfig

LOWEST_TEMPERATURE = 1e-5
"""Below it the likeliest token is taken: dividing by less than this leaves float32."""

MAX_WHOLE_LOGPROBS = 1 << 20
"""Log-probabilities in one answer that is not streamed: about 80 MB, which the rank keeps until the end."""

_SEED_BITS = 63


@dataclass(frozen=True)
class GenerationDefaults:
    """What a checkpoint's generation config says about requests that leave it open.

    Attributes:
        end_tokens: ids that end an answer.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    end_tokens: frozenset[int]

    @classmethod
    def of(cls, config: GenerationConfig) -> GenerationDefaults:
        """Raises ValueError if the end tokens are no numbers."""
        end = config.eos_token_id
        end_tokens = frozenset(end if isinstance(end, list) else [end]) - {None}
        if not all(isinstance(token, int) for token in end_tokens):
            raise ValueError(
                f"generation_config.json: eos_token_id is {end!r}, not a token's number"
            )
        return cls(
            temperature=1.0 if config.temperature is None else config.temperature,
            top_k=config.top_k or 0,
            top_p=1.0 if config.top_p is None else config.top_p,
            min_p=config.min_p or 0.0,
            end_tokens=end_tokens,
        )


@dataclass(frozen=True)
class Preparation:
    """Answers to generate: ``n`` for each prompt, in order. The prompts' tokens are counted once each."""

    answers: tuple[AnswerRequest, ...]
    num_prompt_tokens: int


class Preparer:
    """Tokenizes and checks requests.

    Args:
        tokenizer: makes the prompts.
        defaults: of the checkpoint.
        max_sequence_length: tokens of a prompt and its answer together.
        vocab_size: token ids are below it.
    """

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        defaults: GenerationDefaults,
        *,
        max_sequence_length: int,
        vocab_size: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._defaults = defaults
        self._max_length = max_sequence_length
        self._vocab_size = vocab_size
        # One thread: a long prompt delays other prompts, not the streams that the event loop serves.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="dwdp-tokenize")

    def close(self) -> None:
        """End the tokenizing thread."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def completion(self, request: CompletionRequest) -> Preparation:
        """Raises ApiError 400 if a prompt cannot be used; so does :meth:`chat`."""
        loop = asyncio.get_running_loop()
        prompts = []
        for prompt in request.prompts:
            if isinstance(prompt, str):
                token_ids = await loop.run_in_executor(
                    self._executor, self._tokenizer.encode, prompt, self._max_length
                )
            else:
                token_ids = tuple(prompt)
                self._check_ids(token_ids)
            # Before the next one is tokenized, which would be in vain if this one is too long.
            prompts.append((token_ids, self._limit(token_ids, request.max_new_tokens, "prompt")))
        return self._prepare(request, prompts, request.num_logprobs, continues=True)

    async def chat(self, request: ChatCompletionRequest) -> Preparation:
        token_ids = await asyncio.get_running_loop().run_in_executor(
            self._executor, self._tokenizer.encode_chat, request.messages, self._max_length
        )
        limit = self._limit(token_ids, request.max_new_tokens, "messages")
        return self._prepare(request, [(token_ids, limit)], request.num_logprobs, continues=False)

    def _prepare(
        self,
        request: GenerationRequest,
        prompts: list[tuple[tuple[int, ...], int]],
        num_logprobs: int | None,
        *,
        continues: bool,
    ) -> Preparation:
        """Answers to ``prompts``, each with the most tokens that may follow it."""
        if num_logprobs is not None and not request.stream:
            num_tokens = request.num_choices * sum(limit for _, limit in prompts)
            self._check_logprobs(num_tokens * (1 + num_logprobs))
        seed = request.seed if request.seed is not None else secrets.randbits(_SEED_BITS)
        answers: list[AnswerRequest] = []
        for prompt, limit in prompts:
            for _ in range(request.num_choices):
                # Answers to one request differ; the first is what a request for it alone would give.
                sampling = self._sampling(request, seed + len(answers), num_logprobs)
                answers.append(
                    AnswerRequest(
                        prompt=prompt,
                        max_new_tokens=limit,
                        end_tokens=frozenset() if request.ignore_eos else self._defaults.end_tokens,
                        sampling=sampling,
                        stops=request.stops,
                        continues=continues,
                    )
                )
        return Preparation(tuple(answers), sum(len(prompt) for prompt, _ in prompts))

    def _check_logprobs(self, num_logprobs: int) -> None:
        if num_logprobs > MAX_WHOLE_LOGPROBS:
            raise invalid(
                f"The answer may have {num_logprobs} log-probabilities (prompts times n times max_tokens, "
                f"for the chosen token and each candidate); one that is not streamed has at most "
                f"{MAX_WHOLE_LOGPROBS}. Set stream, or lower n, max_tokens, or logprobs or top_logprobs",
                "logprobs",
            )

    def _limit(self, prompt: tuple[int, ...], max_new_tokens: int | None, param: str) -> int:
        if not prompt:
            raise invalid("The prompt is empty: it needs at least one token", param)
        room = self._max_length - len(prompt)
        if room < 1 or (max_new_tokens is not None and max_new_tokens > room):
            raise self._too_long(len(prompt), max_new_tokens, param)
        return max_new_tokens if max_new_tokens is not None else room

    def _too_long(self, num_tokens: int, max_new_tokens: int | None, param: str) -> ApiError:
        answer = (
            "leaves no room for an answer"
            if max_new_tokens is None
            else f"and the {max_new_tokens} tokens asked for are {num_tokens + max_new_tokens}"
        )
        return context_length_exceeded(
            f"The longest sequence here is {self._max_length} tokens; a prompt of {num_tokens} tokens "
            f"{answer}. Shorten the prompt or lower max_tokens",
            param,
        )

    def _sampling(
        self, request: GenerationRequest, seed: int, num_logprobs: int | None
    ) -> SamplingParams:
        defaults = self._defaults
        temperature = defaults.temperature if request.temperature is None else request.temperature
        return SamplingParams(
            temperature=temperature if temperature >= LOWEST_TEMPERATURE else 0.0,
            top_k=defaults.top_k if request.top_k is None else max(0, request.top_k),
            top_p=defaults.top_p if request.top_p is None else request.top_p,
            min_p=defaults.min_p,
            seed=seed,
            num_logprobs=num_logprobs,
        )

    def _check_ids(self, token_ids: tuple[int, ...]) -> None:
        highest = max(token_ids, default=0)
        if highest >= self._vocab_size:
            raise invalid(
                f"The prompt has token id {highest}; this model's ids are 0 to {self._vocab_size - 1}",
                "prompt",
            )
