"""``model.generate``, one sequence after the other, as a backend: for models that know no other batching."""

from __future__ import annotations

import copy
import queue
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from dwdp.serving.openai.responses import FinishReason
from dwdp.serving.rank_server.backend import (
    NO_END_TOKEN,
    Backend,
    Deliver,
    SequenceRequest,
    Step,
    greedy_config,
)
from dwdp.serving.rank_server.sampling import TokenLogprobs, choose

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STOP_S = 10.0


@dataclass
class _Sequence:
    request: SequenceRequest
    is_cancelled: threading.Event = field(default_factory=threading.Event)


class PlainBackend(Backend):
    """Runs ``model.generate`` on one thread. A sequence waits until those added before it are finished.

    Args:
        model: as :func:`dwdp.engines.transformers.load` gives it.
        max_sequence_length: tokens of a prompt and its answer together.
    """

    name = "plain"
    max_running = 1
    kv_cache_tokens = 0
    kv_cache_bytes = 0

    def __init__(self, model: PreTrainedModel, max_sequence_length: int) -> None:
        self.max_sequence_length = max_sequence_length
        self._model: Any = model
        self._config = greedy_config(model)
        self._queue: queue.SimpleQueue[_Sequence | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._sequences: dict[str, _Sequence] = {}
        self._running: _Sequence | None = None
        self._thread: threading.Thread | None = None

    def start(self, deliver: Deliver, on_failure: Callable[[str], None]) -> None:
        # A failed generate leaves the model as it was: the sequence fails, and the next one is tried.
        self._thread = threading.Thread(
            target=self._work, args=(deliver,), name="dwdp-generate", daemon=True
        )
        self._thread.start()

    def add(self, request: SequenceRequest) -> None:
        sequence = _Sequence(request)
        with self._lock:
            self._sequences[request.id] = sequence
        self._queue.put(sequence)

    def cancel(self, sequence_id: str) -> None:
        with self._lock:
            sequence = self._sequences.pop(sequence_id, None)
        if sequence is not None:
            sequence.is_cancelled.set()

    def num_running(self) -> int:
        return int(self._running is not None)

    def stop(self) -> None:
        with self._lock:
            sequences = list(self._sequences.values())
            self._sequences.clear()
        for sequence in sequences:
            sequence.is_cancelled.set()
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(_STOP_S)

    def _work(self, deliver: Deliver) -> None:
        if self._model.device.type == "cuda":  # threads begin with the first GPU
            torch.cuda.set_device(self._model.device)
        while (sequence := self._queue.get()) is not None:
            if sequence.is_cancelled.is_set():
                continue
            self._running = sequence
            try:
                self._generate(sequence, deliver)
            except Exception as error:
                traceback.print_exc()
                deliver([Step(sequence.request.id, error=f"{type(error).__name__}: {error}")])
            finally:
                self._running = None
                with self._lock:
                    self._sequences.pop(sequence.request.id, None)

    def _generate(self, sequence: _Sequence, deliver: Deliver) -> None:
        request = sequence.request
        sampler = _Sampler(request)
        prompt = torch.tensor([request.prompt], device=self._model.device)
        config = copy.copy(self._config)
        config.max_new_tokens = request.max_new_tokens
        config.eos_token_id = sorted(request.end_tokens) or NO_END_TOKEN
        streamer = _TokenStreamer(sequence, sampler, deliver)
        with torch.inference_mode():
            self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=config,
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=StoppingCriteriaList([_Cancelled(sequence)]),
                streamer=streamer,
            )
        if not streamer.is_finished and not sequence.is_cancelled.is_set():
            # The checkpoint's generation config has stopping criteria of its own.
            deliver([Step(request.id, finish_reason="stop")])


class _Sampler(LogitsProcessor):
    """The sampler as the last logits processor of ``generate``, which itself takes the argmax."""

    def __init__(self, request: SequenceRequest) -> None:
        self._params = [request.sampling]
        self.logprobs: TokenLogprobs | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen, [self.logprobs] = choose(scores.float(), self._params, [input_ids.shape[1]])
        return chosen


class _Cancelled(StoppingCriteria):
    def __init__(self, sequence: _Sequence) -> None:
        self._sequence = sequence

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full(
            (input_ids.shape[0],),
            self._sequence.is_cancelled.is_set(),
            dtype=torch.bool,
            device=input_ids.device,
        )


class _TokenStreamer(BaseStreamer):
    """Hands on every token as it is chosen. ``generate`` gives it the prompt first."""

    def __init__(self, sequence: _Sequence, sampler: _Sampler, deliver: Deliver) -> None:
        self._sequence = sequence
        self._sampler = sampler
        self._deliver = deliver
        self._has_prompt = False
        self._num_tokens = 0
        self.is_finished = False

    def put(self, value: torch.Tensor) -> None:
        if not self._has_prompt:
            self._has_prompt = True
            return
        if self._sequence.is_cancelled.is_set():
            return
        request = self._sequence.request
        token_ids = tuple(value.reshape(-1).tolist())
        self._num_tokens += len(token_ids)
        logprobs = (self._sampler.logprobs,) if self._sampler.logprobs is not None else ()
        finish_reason: FinishReason | None = None
        if token_ids[-1] in request.end_tokens:
            finish_reason = "stop"
        elif self._num_tokens == request.max_new_tokens:
            finish_reason = "length"
        self.is_finished = finish_reason is not None
        self._deliver([Step(request.id, token_ids, logprobs, finish_reason)])

    def end(self) -> None:
        return
