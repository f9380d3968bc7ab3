"""Transformers' continuous batching as a backend: its scheduler, its paged cache, its generation thread.

Its loop decides what runs when: running sequences get a token at every forward, and what is left of
``max_batch_tokens`` goes to waiting prompts, long ones in pieces.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessorList
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)

from dwdp.memory_plan import available_memory_bytes
from dwdp.serving.openai.responses import FinishReason
from dwdp.serving.rank_server.backend import (
    NO_END_TOKEN,
    Backend,
    Deliver,
    SequenceRequest,
    Step,
    UnsupportedModel,
    greedy_config,
)
from dwdp.serving.rank_server.kv_cache import (
    BLOCK_TOKENS,
    KvCachePlan,
    max_running,
    plan_kv_cache,
)
from dwdp.serving.rank_server.options import RankOptions
from dwdp.serving.rank_server.sampling import SamplingParams, TokenLogprobs, choose
from dwdp.serving.rank_server.trial import Trial

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_POLL_S = 0.2
_STOP_S = 10.0


class ContinuousBackend(Backend):
    """Runs ``model`` by ``model.init_continuous_batching``.

    Args:
        model: is switched to paged attention until :meth:`stop`.
        max_sequence_length: tokens of a prompt and its answer together.

    Raises:
        UnsupportedModel: the model's attention, its generation config or this Transformers does not allow it.
        ValueError: the cache is too small for one sequence, or larger than the memory.
    """

    name = "continuous"

    def __init__(
        self, model: PreTrainedModel, options: RankOptions, max_sequence_length: int
    ) -> None:
        self.max_sequence_length = max_sequence_length
        self.max_running = max_running(options)
        cache = plan_kv_cache(
            model.config.get_text_config(), model.dtype, options, max_sequence_length
        )
        self.kv_cache_tokens, self.kv_cache_bytes = cache.num_tokens, cache.num_bytes
        self._sampler = _BatchSampler()
        self._delivered: dict[str, int] = {}
        self._requests: dict[str, SequenceRequest] = {}
        self._lock = threading.Lock()
        self._is_stopping = False
        self._reader: threading.Thread | None = None
        self._model = model
        self._attention: str = model.config._attn_implementation
        self._manager: Any = None
        trial = Trial.of(model, max_sequence_length)
        try:
            self._manager = self._make_manager(options, cache)
            self._allocate_cache()
            self._manager.start()
            self._run(trial)
        except BaseException as error:
            self.stop()
            if isinstance(error, MemoryError):
                raise ValueError(
                    f"a key-value cache of {self.kv_cache_tokens} tokens does not fit into memory: choose "
                    f"a smaller kv_cache_tokens ({error})"
                ) from error
            if isinstance(error, UnsupportedModel) or not isinstance(error, Exception):
                raise
            raise UnsupportedModel(f"{type(error).__name__}: {error}") from error

    def start(self, deliver: Deliver, on_failure: Callable[[str], None]) -> None:
        self._reader = threading.Thread(
            target=self._read, args=(deliver, on_failure), name="dwdp-tokens", daemon=True
        )
        self._reader.start()

    def add(self, request: SequenceRequest) -> None:
        with self._lock:
            self._requests[request.id] = request
            self._delivered[request.id] = 0
            if request.sampling.num_logprobs is not None:
                self._sampler.expect(request.id)
        accepted = self._manager.add_request(
            list(request.prompt),
            request_id=request.id,
            max_new_tokens=request.max_new_tokens,
            streaming=True,
            eos_token_id=sorted(request.end_tokens) or NO_END_TOKEN,
            sampling=request.sampling,
        )
        if accepted is None:
            logger.info("a sequence came too late: the generation loop is ending")

    def cancel(self, sequence_id: str) -> None:
        with self._lock:
            if self._requests.pop(sequence_id, None) is None:
                return
            del self._delivered[sequence_id]
            self._sampler.forget(sequence_id)
        self._manager.cancel_request(sequence_id)

    def num_running(self) -> int:
        processor = self._manager.batch_processor
        return len(processor.scheduler.active_requests) if processor is not None else 0

    def stop(self) -> None:
        if self._is_stopping:
            return
        self._is_stopping = True
        if self._manager is not None:
            if self._manager.is_running():
                self._manager.stop(block=True, timeout=_STOP_S, hard_stop=True)
            self._manager.destroy()
        if self._reader is not None:
            self._reader.join(_STOP_S)
        # The manager forgets to if its thread has failed, or was never started.
        self._model.set_attn_implementation(self._attention)

    def _make_manager(self, options: RankOptions, cache: KvCachePlan) -> Any:
        model: Any = self._model
        config = ContinuousBatchingConfig(
            block_size=BLOCK_TOKENS,
            num_blocks=cache.num_blocks,
            max_batch_tokens=options.max_batch_tokens,
            max_requests_per_batch=self.max_running,
            # Fetches wait inside the forward, and the sampler runs on the host: neither can be captured in a
            # graph, nor run one step behind.
            use_async_batching=False,
            use_cuda_graph=False,
            drop_unsupported_processors=False,
        )
        with warnings.catch_warnings():
            # About penalties; that they are refused is said below.
            warnings.simplefilter("ignore")
            manager = model.init_continuous_batching(
                generation_config=greedy_config(model), continuous_batching_config=config
            )
        own = [type(one).__name__ for one in manager.logit_processor.logits_processor]
        if own:
            raise UnsupportedModel(
                f"the checkpoint's generation config needs {', '.join(own)}, which looks at whole sequences"
            )
        processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList())
        processors.logits_processor.append(self._sampler)
        processors.supported_keys = dict(self._sampler.supported_kwargs)
        processors.tensors_required = 1
        processors.do_processing = True
        manager.logit_processor = processors
        return manager

    def _allocate_cache(self) -> None:
        """Take the cache's memory now, all of it, rather than page by page while requests come in."""
        on_cpu = self._model.device.type == "cpu"
        available_bytes = available_memory_bytes()
        if on_cpu and self.kv_cache_bytes > available_bytes:
            raise MemoryError(
                f"it takes {self.kv_cache_bytes} bytes, and {available_bytes} are available"
            )
        processor = self._manager._create_batch_processor()
        self._manager.batch_processor = processor
        for tensor in (*processor.cache.key_cache, *processor.cache.value_cache):
            tensor.zero_()

    def _run(self, trial: Trial) -> None:
        """Generate ``trial``'s tokens, and compare.

        Raises:
            UnsupportedModel: the model cannot be run like this, or computes something else.
        """
        self.add(trial.request)
        logprobs: list[float] = []
        token_ids: list[int] = []
        while len(token_ids) < trial.request.max_new_tokens:
            output = self._manager.get_result(timeout=_POLL_S)
            step = self._step(output) if output is not None else None
            if step is not None:
                token_ids += step.token_ids
                logprobs += [one.chosen for one in step.logprobs]
            elif not self._manager.is_running():
                error = self._manager.background_thread_status.fatal_error
                raise UnsupportedModel(f"{type(error).__name__}: {error}")
        trial.check(token_ids, logprobs)

    def _read(self, deliver: Deliver, on_failure: Callable[[str], None]) -> None:
        """Hand on what is generated until there can be no more of it."""
        try:
            while self._hand_on(deliver):
                pass
            error = self._manager.background_thread_status.fatal_error
        except Exception as caught:  # nobody would read what sequences gain from now on
            logger.exception("reading the generated tokens failed")
            error = caught
        if not self._is_stopping:
            on_failure(f"{type(error).__name__}: {error}")

    def _hand_on(self, deliver: Deliver) -> bool:
        """Deliver what there is. False when the generation loop has ended and all is delivered."""
        output = self._manager.get_result(timeout=_POLL_S)
        steps = []
        while output is not None:
            step = self._step_or_error(output)
            if step is not None:
                steps.append(step)
            output = self._manager.get_result(timeout=0)
        if steps:
            deliver(steps)
        return bool(steps) or self._manager.is_running()

    def _step_or_error(self, output: Any) -> Step | None:
        """As :meth:`_step`. What goes wrong with one sequence's tokens ends that sequence alone."""
        try:
            return self._step(output)
        except Exception as error:
            logger.exception("the tokens of a sequence could not be read")
            self.cancel(output.request_id)
            return Step(output.request_id, error=f"{type(error).__name__}: {error}")

    def _step(self, output: Any) -> Step | None:
        """What is new in ``output``, which has all tokens so far. None if its sequence was cancelled."""
        with self._lock:
            request = self._requests.get(output.request_id)
            if request is None:
                return None
            begin = self._delivered[output.request_id]
            token_ids = tuple(output.generated_tokens[begin:])
            end = begin + len(token_ids)
            logprobs: tuple[TokenLogprobs, ...] = ()
            if request.sampling.num_logprobs is not None and output.error is None:
                first = len(request.prompt)
                logprobs = self._sampler.take(output.request_id, range(first + begin, first + end))
            self._delivered[output.request_id] = end
            if output.is_finished():
                del self._requests[output.request_id], self._delivered[output.request_id]
                self._sampler.forget(output.request_id)
        if output.error is not None:
            if self._manager.background_thread_status.local_status:
                return None  # the loop ends, and with it every sequence: on_failure says so
            return Step(output.request_id, error=output.error)
        finish_reason: FinishReason | None = None
        if output.is_finished():
            finish_reason = "stop" if token_ids[-1] in request.end_tokens else "length"
        return Step(output.request_id, token_ids, logprobs, finish_reason)


class _BatchSampler(ContinuousBatchingLogitsProcessor):
    """The sampler as continuous batching's only logits processor; the loop itself takes the argmax.

    It keeps log-probabilities from :meth:`expect` to :meth:`forget`. A sequence that is forgotten may be in
    a forward at that time; what that brings for it is dropped.
    """

    def __init__(self) -> None:
        self.supported_kwargs = {"sampling": SamplingParams}
        self.ignored_kwargs = ()
        self._ids: list[str] = []
        self._params: list[SamplingParams] = []
        self._positions: list[int] = []
        self._lock = threading.Lock()
        self._logprobs: dict[str, dict[int, TokenLogprobs]] = {}

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        """Called before each forward with the sequences that get a token, as the rows of the scores are."""
        states = [future.state for future in requests_with_new_token]
        self._ids = [state.request_id for state in states]
        self._params = [state.logit_processor_kwargs["sampling"] for state in states]
        # A sequence that was evicted counts its earlier tokens among the initial ones: the sum stays right.
        self._positions = [len(state.initial_tokens) + state.generated_len() for state in states]
        return torch.zeros(len(states), dtype=torch.int32)

    def __call__(self, scores: Any, tensor_arg: torch.Tensor) -> Any:
        chosen, logprobs = choose(scores, self._params, self._positions)
        for sequence_id, position, one in zip(self._ids, self._positions, logprobs, strict=True):
            if one is not None:
                with self._lock:
                    kept = self._logprobs.get(sequence_id)
                    if kept is not None:
                        kept[position] = one
        return chosen

    def expect(self, sequence_id: str) -> None:
        """Keep a sequence's log-probabilities from now on."""
        with self._lock:
            self._logprobs[sequence_id] = {}

    def take(self, sequence_id: str, positions: range) -> tuple[TokenLogprobs, ...]:
        """Hand out those of some tokens, once."""
        with self._lock:
            kept = self._logprobs[sequence_id]
            return tuple(kept.pop(position) for position in positions)

    def forget(self, sequence_id: str) -> None:
        """Keep none any more. Idempotent."""
        with self._lock:
            self._logprobs.pop(sequence_id, None)
