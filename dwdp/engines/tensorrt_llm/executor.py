"""``LLM(..., parallel="dwdp")`` in a process that no launcher started: it owns all ranks of a group.

One executor stands before N of TensorRT-LLM's own, each with a worker process on a GPU of its own. A
request goes to the rank that has the fewest tokens outstanding, and stays there. A rank that dies fails
its own requests; the others go on.
"""

from __future__ import annotations

import functools
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import ExitStack
from types import new_class
from typing import Any

from dwdp.config import DwdpConfig
from dwdp.engines.tensorrt_llm import launch, log
from dwdp.engines.tensorrt_llm.arguments import config_of
from dwdp.engines.tensorrt_llm.rank_proxy import Rank
from dwdp.engines.tensorrt_llm.rank_session import RankSession, check_not_starting
from dwdp.launch import DWDP_RANK, without_launcher
from dwdp.local_store import LocalStoreServer
from dwdp.rendezvous import PeerFailure

_VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
_AUTOTUNER_CACHE = "TLLM_AUTOTUNER_CACHE_PATH"
_FAREWELL_S = 15.0
_WORKER_KWARGS = ("executor_config", "batched_logits_processor", "hf_model_dir", "tokenizer")


def patch(module: Any) -> None:
    """Wrap ``GenerationExecutor.create`` of ``tensorrt_llm.executor.executor``."""
    create = module.GenerationExecutor.create
    group_executor: Any = new_class("GroupExecutor", (GroupExecution, module.GenerationExecutor))

    @functools.wraps(create)
    def create_group(engine: Any, *args: Any, **kwargs: Any) -> Any:
        llm_args = kwargs.get("llm_args")
        config = config_of(llm_args)
        if config is not None:
            check_not_starting()
        owns_group = (
            config is not None
            and config.dwdp_size > 1
            and DWDP_RANK not in launch.environment_of(llm_args)
        )
        if not owns_group:
            return create(engine, *args, **kwargs)
        return group_executor(config, engine, **kwargs)

    module.GenerationExecutor.create = staticmethod(create_group)


class LostRankError(RuntimeError):
    """A rank has died, and a request with it; or all ranks have."""


class GroupExecution:
    """What differs from ``GenerationExecutor`` in an executor over all ranks of a group.

    Args:
        config: of the group.
        engine, llm_args, others: as ``GenerationExecutor.create`` gets them.

    Raises:
        ValueError: fewer GPUs than ranks, or a setting that needs one rank.
        RuntimeError: a rank could not start; the text is its own.
    """

    def __init__(
        self,
        config: DwdpConfig,
        engine: Any,
        *,
        llm_args: Any,
        postproc_worker_config: Any = None,
        is_llm_executor: bool | None = None,
        **others: Any,
    ) -> None:
        _refuse(config, llm_args)
        self._ranks: list[Rank] = []
        self._submission = threading.Lock()
        super().__init__(  # type: ignore[call-arg]
            num_postprocess_workers=getattr(postproc_worker_config, "num_postprocess_workers", 0),
            postprocess_tokenizer_dir=getattr(
                postproc_worker_config, "postprocess_tokenizer_dir", None
            ),
            is_llm_executor=is_llm_executor,
        )
        worker_kwargs = {"engine": engine} | {key: others.get(key) for key in _WORKER_KWARGS}
        proxies = _start_proxies(config, llm_args, worker_kwargs, postproc_worker_config)
        for number, proxy in enumerate(proxies):
            # One count for all, so that a request's number says which rank has it.
            proxy._get_next_client_id = self._get_next_client_id  # type: ignore[attr-defined]
            self._ranks.append(Rank(number, proxy, self._note_loss))
        log.info(f"{config.dwdp_size} ranks have started")

    def submit(self, request: Any) -> Any:
        """Give ``request`` to the rank with the fewest tokens outstanding.

        Raises:
            LostRankError: no rank is left.
        """
        with self._submission:
            while True:
                rank = min(self._remaining(), key=lambda rank: rank.load)
                try:
                    result = rank.proxy.submit(request)
                except Exception:
                    if rank.failure is None:
                        raise
                else:
                    if rank.failure is None:
                        return result
                rank.outstanding.pop(request.id, None)
                request.id = None

    def abort_request(self, request_id: int) -> None:
        """Abort a request wherever it is computed; one that is finished is left alone."""
        for rank in self._ranks:
            if rank.failure is None and request_id in rank.outstanding:
                rank.proxy.abort_request(request_id)

    def is_shutdown(self) -> bool:
        """Whether there is nobody left to submit to."""
        return self.doing_shutdown or all(rank.failure is not None for rank in self._ranks)

    def shutdown(self) -> None:
        """End all ranks. Idempotent."""
        ranks, self._ranks = self._ranks, []
        self.doing_shutdown = True
        for rank in ranks:
            rank.proxy.pre_shutdown()
        with ExitStack() as ended:
            for rank in ranks:
                ended.callback(rank.end)

    def get_stats(self, timeout: float) -> list[dict[str, Any]]:
        """Iteration statistics of all ranks; ``dwdpRank`` says whose."""
        return self._gather(
            lambda rank: [
                {**stats, "dwdpRank": rank.number} for stats in rank.proxy.get_stats(timeout)
            ]
        )

    def get_kv_events(self, timeout: float) -> list[dict[str, Any]]:
        """Events of all ranks' KV caches; ``attention_dp_rank`` says whose, as with other replicas."""
        return self._gather(
            lambda rank: [
                _of_rank(event, rank.number) for event in rank.proxy.get_kv_events(timeout)
            ]
        )

    def aget_stats(self, timeout: float) -> Any:
        """``get_stats`` as an iterable for an event loop."""
        self._maybe_initialize_iteration_results()  # type: ignore[attr-defined]
        return _filled(self._iter_stats_result, self.get_stats(timeout), timeout)  # type: ignore[attr-defined]

    def aget_kv_events(self, timeout: float) -> Any:
        """``get_kv_events`` as an iterable for an event loop."""
        self._maybe_initialize_iteration_results()  # type: ignore[attr-defined]
        return _filled(self._iter_kv_events_result, self.get_kv_events(timeout), timeout)  # type: ignore[attr-defined]

    def _remaining(self) -> list[Rank]:
        remaining = [rank for rank in self._ranks if rank.failure is None]
        if not remaining:
            failures = "; ".join(rank.failure or "" for rank in self._ranks)
            raise LostRankError(f"no rank is left: {failures or 'the executor was shut down'}")
        return remaining

    def _note_loss(self, rank: Rank) -> None:
        left = sum(other.failure is None for other in self._ranks)
        log.error(f"{rank.failure}; its {len(rank.outstanding)} requests fail, {left} ranks go on")

    def _gather(self, ask: Callable[[Rank], list[Any]]) -> list[Any]:
        """What ``ask`` gets from every rank that is there, in rank order; all are asked at once."""
        ranks = [rank for rank in self._ranks if rank.failure is None]
        with ThreadPoolExecutor(max_workers=len(ranks) or 1) as asking:
            return [item for answer in asking.map(ask, ranks) for item in answer]


def _start_proxies(
    config: DwdpConfig, llm_args: Any, worker_kwargs: dict[str, Any], postproc_worker_config: Any
) -> list[Any]:
    """TensorRT-LLM's executor for each rank, with a worker that is ready."""
    # Where the ranks meet while they set up.
    store = LocalStoreServer()
    environ = launch.environment_of(llm_args)
    own = _rank_variables(config.dwdp_size, store, environ)
    shared = {**without_launcher(environ), launch.DWDP_PREPARED: "1"}

    def start(number: int, session: RankSession) -> Any:
        from tensorrt_llm.executor.proxy import GenerationExecutorProxy

        overrides = {**(llm_args.env_overrides or {}), **own[number]}
        own_args = llm_args.model_copy(update={"env_overrides": overrides})
        return GenerationExecutorProxy(
            {**worker_kwargs, "llm_args": own_args},
            mpi_session=session,
            postproc_worker_config=postproc_worker_config,
            is_llm_executor=False,
        )

    try:
        return start_together([RankSession({**shared, **variables}) for variables in own], start)
    finally:
        store.close()


def start_together(
    sessions: Sequence[RankSession], start: Callable[[int, RankSession], Any]
) -> list[Any]:
    """What ``start(number, session)`` returns for each session, all called at the same time.

    When one fails the others get a moment to fail with it, and are ended then.

    Raises:
        RuntimeError: a rank could not start; the text is of the rank that was the first cause.
    """
    ended_by_us = set()
    with ThreadPoolExecutor(max_workers=len(sessions)) as starting:
        started = [
            starting.submit(start, number, session) for number, session in enumerate(sessions)
        ]
        wait_for(started, return_when=FIRST_EXCEPTION)
        if any(future.done() and future.exception() is not None for future in started):
            _, waiting = wait_for(started, timeout=_FAREWELL_S)
            ended_by_us = {started.index(future) for future in waiting}
            for number in ended_by_us:
                sessions[number].abort()
    failures = [
        (number, _cause(sessions[number], error))
        for number, future in enumerate(started)
        if (error := future.exception()) is not None and number not in ended_by_us
    ]
    if not failures:
        return [future.result() for future in started]
    for future in started:
        if future.exception() is None:
            future.result().shutdown()
    number, cause = next(
        (failure for failure in failures if not isinstance(failure[1], PeerFailure)), failures[0]
    )
    raise RuntimeError(f"rank {number} could not start: {cause}") from cause


def _cause(session: RankSession, error: BaseException) -> BaseException:
    """What went wrong in the worker, where the proxy only says that something did."""
    if error.__cause__ is not None:
        return error.__cause__
    if session.future.done():
        return session.future.exception() or error
    return error


def _refuse(config: DwdpConfig, llm_args: Any) -> None:
    if config.num_groups > 1:
        raise ValueError(
            f"dwdp_config.num_groups is {config.num_groups}: one LLM owns one group; leave it out, or start "
            "all ranks with a launcher"
        )
    if llm_args.orchestrator_type is not None:
        raise ValueError(
            f"orchestrator_type is {llm_args.orchestrator_type!r}: an LLM that owns a group starts its ranks "
            "itself; leave it out"
        )


def _rank_variables(
    num_ranks: int, store: LocalStoreServer, environ: Mapping[str, str]
) -> list[dict[str, str]]:
    """For each rank, what its environment has that the others' have not.

    Raises:
        ValueError: there are fewer GPUs than ranks.
    """
    devices = _devices(num_ranks, environ)
    found = []
    for number in range(num_ranks):
        place = launch.RankPlace(
            number, num_ranks, store.address, is_served=True, token=store.token
        )
        variables = {**place.variables(), launch.DWDP_SERVER_PID: str(os.getpid())}
        if devices:
            variables[_VISIBLE_DEVICES] = devices[number]
        if cache := environ.get(_AUTOTUNER_CACHE):
            # Every rank takes itself for the only one, and would write the same file.
            variables[_AUTOTUNER_CACHE] = f"{cache}.rank{number}"
        found.append(variables)
    return found


def _devices(num_ranks: int, environ: Mapping[str, str]) -> list[str]:
    """What each rank's ``CUDA_VISIBLE_DEVICES`` is; nothing on a machine without GPUs."""
    import torch

    if not torch.cuda.is_available():
        return []
    return launch.group_devices(num_ranks, torch.cuda.device_count(), environ)


def _of_rank(event: Any, number: int) -> Any:
    return {**event, "attention_dp_rank": number} if isinstance(event, dict) else event


def _filled(results: Any, items: Sequence[dict[str, Any]], timeout: float) -> Any:
    for item in items:
        results.queue.put(json.dumps(item))
    results.set_timeout(timeout)
    return results
