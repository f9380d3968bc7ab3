"""What runs the model: sequences go in, tokens come out step by step. Two ways of batching implement it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dwdp.serving.openai.responses import FinishReason
from dwdp.serving.rank_server.sampling import SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


class UnsupportedModel(ValueError):
    """This way of batching cannot run the model; the text says why."""


@dataclass(frozen=True)
class SequenceRequest:
    """One sequence to generate.

    Attributes:
        id: names it; never used twice.
        prompt: token ids, at least one.
        max_new_tokens: at least 1. With the prompt it fits into the backend's ``max_sequence_length``.
        end_tokens: ids that end the sequence.
    """

    id: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    end_tokens: frozenset[int]
    sampling: SamplingParams


@dataclass(frozen=True)
class Step:
    """What one sequence has gained.

    Attributes:
        token_ids: new tokens, the end token included.
        logprobs: per new token, if they were asked for; else empty.
        finish_reason: ``stop`` after an end token, ``length`` at the limit, None if there is more to come.
        error: why the sequence cannot go on; it is over then.
    """

    sequence_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


Deliver = Callable[[Sequence[Step]], None]


class Backend(ABC):
    """Generates sequences on threads of its own. The other methods may be called from any thread.

    Attributes:
        name: ``continuous`` or ``plain``.
        max_sequence_length: tokens of a prompt and its answer together.
        max_running: sequences generated at the same time.
        kv_cache_tokens, kv_cache_bytes: of the preallocated cache; 0 if there is none.
    """

    name: str
    max_sequence_length: int
    max_running: int
    kv_cache_tokens: int
    kv_cache_bytes: int

    @abstractmethod
    def start(self, deliver: Deliver, on_failure: Callable[[str], None]) -> None:
        """Begin to work.

        Args:
            deliver: called, on a thread of the backend, with steps of any sequences. The last step of each
                is delivered, unless the sequence was cancelled.
            on_failure: called once, with the reason, if the model can no longer be run.
        """

    @abstractmethod
    def add(self, request: SequenceRequest) -> None:
        """Generate ``request``, after those added before it."""

    @abstractmethod
    def cancel(self, sequence_id: str) -> None:
        """Stop generating a sequence, within one forward. One that is over is none of its business."""

    @abstractmethod
    def num_running(self) -> int:
        """Sequences being generated right now; the rest of those added are waiting."""

    @abstractmethod
    def stop(self) -> None:
        """Give up what is left and end the threads. Idempotent."""


NO_END_TOKEN = -1
"""An end token that is never met. None would be replaced by the checkpoint's."""


def greedy_config(model: PreTrainedModel) -> GenerationConfig:
    """The checkpoint's generation config without what a request decides by itself.

    What is left of it (penalties, forced and suppressed tokens) applies to every request.
    """
    config = copy.deepcopy(model.generation_config)
    config.update(
        do_sample=False,
        temperature=None,
        top_k=None,
        top_p=None,
        min_p=None,
        typical_p=None,
        num_beams=1,
        num_return_sequences=1,
        max_length=None,
        max_new_tokens=None,
        eos_token_id=NO_END_TOKEN,
        pad_token_id=0,
        use_cache=True,
        return_dict_in_generate=False,
    )
    return config
