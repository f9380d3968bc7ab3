"""The rank's engine as its server sees it: requests go in, text comes out, limits and counters in between.

Everything here runs on the server's event loop. The backend's threads reach it through
``call_soon_threadsafe`` alone.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dwdp.serving.openai.errors import ApiError, internal, invalid, overloaded, unavailable
from dwdp.serving.rank_server.backend import Backend, SequenceRequest, Step
from dwdp.serving.rank_server.detokenizer import Detokenizer
from dwdp.serving.rank_server.sampling import SamplingParams
from dwdp.serving.rank_server.text import AnswerText, TextDelta

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1.0


@dataclass(frozen=True)
class AnswerRequest:
    """One answer to generate.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: at least 1.
        end_tokens: ids that end it.
        stops: strings that end it.
        continues: whether its text goes on where the prompt's ends, or starts anew.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    end_tokens: frozenset[int]
    sampling: SamplingParams
    stops: tuple[str, ...]
    continues: bool


@dataclass
class Counters:
    """Totals since the start. Requests are counted by answers, of which one request may want several."""

    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    rejected: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0


@dataclass
class _Answer:
    generation: Generation
    request: AnswerRequest
    text: AnswerText
    num_tokens: int = 0


class Generation:
    """The answers to one request. A context manager: leaving it cancels what is not finished.

    Iterating gives the deltas of all answers as they come, and ends when every answer has ended.

    Raises (while iterating):
        ApiError: the answers cannot be finished.
    """

    def __init__(self, engine: Engine, num_answers: int) -> None:
        self._engine = engine
        self._queue: asyncio.Queue[TextDelta | ApiError] = asyncio.Queue()
        self._num_unfinished = num_answers
        self._sequence_ids: list[str] = []

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Stop generating. Idempotent."""
        for sequence_id in self._sequence_ids:
            self._engine.cancel(sequence_id)
        self._sequence_ids.clear()

    async def __aiter__(self) -> AsyncIterator[TextDelta]:
        while self._num_unfinished:
            delta = await self._queue.get()
            if isinstance(delta, ApiError):
                raise delta
            if delta.finish_reason is not None:
                self._num_unfinished -= 1
            yield delta

    def own(self, sequence_id: str) -> None:
        """A sequence of this request, as the engine names it."""
        self._sequence_ids.append(sequence_id)

    def put(self, delta: TextDelta | ApiError) -> None:
        """The next delta, or why there are no more."""
        self._queue.put_nowait(delta)


class Engine:
    """Admits requests, follows their sequences, and counts.

    Args:
        backend: not started yet.
        tokenizer: makes text of tokens.
        max_waiting: answers that may wait for their turn, besides those that run.
        on_failure: called once, with the reason, if the model can no longer be run.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_waiting: int,
        on_failure: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.backend = backend
        self.counters = Counters()
        self.failure: str | None = None
        self.is_draining = False
        self._tokenizer = tokenizer
        self._capacity = backend.max_running + max_waiting
        self._on_failure = on_failure
        self._answers: dict[str, _Answer] = {}
        self._numbers = itertools.count()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to work; ``loop`` is where everything else is called from."""
        self.backend.start(
            lambda steps: _call_soon(loop, self._receive, tuple(steps)),
            lambda reason: _call_soon(loop, self._fail, reason),
        )

    @property
    def state(self) -> str:
        """``ready``, ``draining`` or ``failed``."""
        if self.failure is not None:
            return "failed"
        return "draining" if self.is_draining else "ready"

    @property
    def num_unfinished(self) -> int:
        """Answers running or waiting."""
        return len(self._answers)

    @property
    def num_running(self) -> int:
        return min(self.backend.num_running(), len(self._answers))

    @property
    def outstanding_tokens(self) -> int:
        """Tokens that may still have to be computed: prompts not begun, and answers to their limits."""
        return sum(
            answer.request.max_new_tokens - answer.num_tokens
            if answer.num_tokens
            else len(answer.request.prompt) + answer.request.max_new_tokens
            for answer in self._answers.values()
        )

    def submit(self, requests: Sequence[AnswerRequest]) -> Generation:
        """Begin to answer: all of ``requests``, or none.

        Raises:
            ApiError: 400 if they are more than are ever taken at once, 429 if they are more than there is
                room for now, 503 if the rank is ending.
        """
        self.check_open()
        if len(requests) > self._capacity:
            raise invalid(
                f"The request asks for {len(requests)} answers (prompts times n); a rank takes at most "
                f"{self._capacity} at once"
            )
        if len(self._answers) + len(requests) > self._capacity:
            self.counters.rejected += len(requests)
            raise overloaded(
                f"{len(self._answers)} answers are running or waiting, of at most {self._capacity}; try "
                "again later",
                RETRY_AFTER_S,
            )
        generation = Generation(self, len(requests))
        try:
            for index, request in enumerate(requests):
                self._begin(generation, index, request)
        except BaseException:
            generation.cancel()
            raise
        return generation

    def _begin(self, generation: Generation, index: int, request: AnswerRequest) -> None:
        sequence_id = str(next(self._numbers))
        detokenizer = Detokenizer(self._tokenizer, request.prompt if request.continues else ())
        text = AnswerText(index, detokenizer, request.stops)
        self._answers[sequence_id] = _Answer(generation, request, text)
        generation.own(sequence_id)
        self.counters.prompt_tokens += len(request.prompt)
        self.backend.add(
            SequenceRequest(
                sequence_id,
                request.prompt,
                request.max_new_tokens,
                request.end_tokens,
                request.sampling,
            )
        )

    def check_open(self) -> None:
        """Raises ApiError 503 if the rank takes no requests any more."""
        if self.failure is not None:
            raise _failed()
        if self.is_draining:
            raise unavailable("The server is ending", "draining", RETRY_AFTER_S)

    def cancel(self, sequence_id: str) -> None:
        """Stop generating a sequence. One that is over is left alone."""
        if self._answers.pop(sequence_id, None) is not None:
            self.counters.cancelled += 1
            self.backend.cancel(sequence_id)

    def give_up(self, error: ApiError) -> None:
        """End every answer with ``error``."""
        answers = dict(self._answers)
        self._answers.clear()
        self.counters.failed += len(answers)
        for sequence_id, answer in answers.items():
            self.backend.cancel(sequence_id)
            answer.generation.put(error)

    def _receive(self, steps: Sequence[Step]) -> None:
        for step in steps:
            answer = self._answers.get(step.sequence_id)
            if answer is None:
                continue
            if step.error is not None:
                self._end_with_error(answer, step.sequence_id, step.error)
                continue
            try:
                self._add(answer, step)
            except Exception as error:  # the other answers' steps are still to come
                logger.exception("the text of an answer could not be made")
                self.backend.cancel(step.sequence_id)
                reason = f"{type(error).__name__}: {error}"
                self._end_with_error(answer, step.sequence_id, reason)

    def _add(self, answer: _Answer, step: Step) -> None:
        delta = answer.text.add(step)
        answer.num_tokens += delta.num_tokens
        self.counters.generated_tokens += delta.num_tokens
        if delta.finish_reason is not None:
            del self._answers[step.sequence_id]
            self.counters.finished += 1
            if not step.is_last:  # a stop string: the model does not know
                self.backend.cancel(step.sequence_id)
        answer.generation.put(delta)

    def _end_with_error(self, answer: _Answer, sequence_id: str, reason: str) -> None:
        self._answers.pop(sequence_id, None)
        self.counters.failed += 1
        answer.generation.put(internal(f"The model failed: {reason}"))

    def _fail(self, reason: str) -> None:
        self.failure = reason
        self.give_up(_failed())
        self._on_failure(reason)


def _failed() -> ApiError:
    return unavailable("The model can no longer be run here", "engine_failed", RETRY_AFTER_S)


def _call_soon(
    loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: object
) -> None:
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:  # the loop is closed: nobody waits for this any more
        return
