"""One rank of a group as the process that owns the group sees it: what it owes, and whether it is there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import Queue
from typing import Any

from dwdp.engines.tensorrt_llm import log

_ANSWER_S = 2.0
_SEND_TIMEOUT_MS = 10_000


class OutstandingRequests(dict[int, Any]):
    """The results that a rank still owes, by request, and how many tokens they amount to.

    Takes the place of a proxy's own dict, in which it enters a result when it submits the request, and
    from which the thread that receives answers takes it after the last one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._tokens: dict[int, int] = {}
        self.num_tokens = 0

    def __setitem__(self, request_id: int, result: Any) -> None:
        with self._lock:
            super().__setitem__(request_id, result)
            self._tokens[request_id] = num_tokens_of(result)
            self.num_tokens += self._tokens[request_id]

    def pop(self, request_id: int, *default: Any) -> Any:
        with self._lock:
            self.num_tokens -= self._tokens.pop(request_id, 0)
            return super().pop(request_id, *default)


def num_tokens_of(result: Any) -> int:
    """Tokens that a request stands for: its prompt's, and as many as it may generate."""
    sampling = result.sampling_params
    return len(result.prompt_token_ids) + (sampling.max_tokens or 0) * (sampling.best_of or 1)


class Rank:
    """One rank: TensorRT-LLM's executor for it, and whether it is still there.

    Args:
        number: the rank.
        proxy: a ``GenerationExecutorProxy``.
        on_loss: called with this and what happened when its process is gone, once.
    """

    def __init__(self, number: int, proxy: Any, on_loss: Callable[[Rank], None]) -> None:
        self.number = number
        self.proxy = proxy
        self.failure: str | None = None
        self._on_loss = on_loss
        self._lock = threading.Lock()
        self.outstanding = proxy._results = OutstandingRequests()
        proxy._error_queue = _BackgroundErrors(self)
        _limit_sends(proxy)
        for future in proxy.mpi_futures:
            future.add_done_callback(self._note_end)

    @property
    def load(self) -> tuple[int, int, int]:
        """What ranks are compared by: outstanding tokens, then requests."""
        return self.outstanding.num_tokens, len(self.outstanding), self.number

    def end(self) -> None:
        """Wait for the worker to end, which ``proxy.pre_shutdown`` has told it to, and clear up."""
        wait(self.proxy.mpi_futures)
        if any(future.exception() is not None for future in self.proxy.mpi_futures):
            _answer_for(self.proxy, f"rank {self.number} died")
        self.proxy.shutdown()

    def give_up(self, error: BaseException) -> None:
        """End a worker that nobody can talk to any more, so that its requests fail."""
        if self.failure is None:
            log.error(f"rank {self.number} cannot be understood and is ended: {error!r}")
            threading.Thread(target=self.proxy.mpi_session.abort, name="dwdp-abort").start()

    def _note_end(self, future: Future[Any]) -> None:
        with self._lock:
            if self.failure is not None or self.proxy.doing_shutdown:
                return
            self.failure = f"rank {self.number} is gone: {future.exception() or 'its worker ended'}"
        self._on_loss(self)
        _answer_for(self.proxy, f"{self.failure}; send the request again")


class _BackgroundErrors(Queue[BaseException]):
    """Takes the place of a proxy's queue of background errors, which would shut the proxy down later."""

    def __init__(self, rank: Rank) -> None:
        super().__init__()
        self._rank = rank

    def put(self, item: BaseException, block: bool = True, timeout: float | None = None) -> None:
        # The end of the worker is an error as well, and is noted where it is seen first.
        if not any(future.done() for future in self._rank.proxy.mpi_futures):
            self._rank.give_up(item)


def _limit_sends(proxy: Any) -> None:
    """Without a limit, sending to a worker that has just died waits for ever."""
    import zmq

    proxy.request_queue.socket.setsockopt(zmq.SNDTIMEO, _SEND_TIMEOUT_MS)


def _answer_for(proxy: Any, message: str) -> None:
    """Say for a worker that died what it would have said: its requests failed, and nothing follows."""
    import zmq
    from tensorrt_llm.executor.ipc import FusedIpcQueue
    from tensorrt_llm.executor.utils import ErrorResponse

    receiver = proxy.dispatch_result_thread
    while receiver is not None and receiver.is_alive():
        # While the dead worker's connection is still there, what another one sends is dropped.
        queue = FusedIpcQueue(
            proxy.result_queue.address,
            is_server=False,
            socket_type=zmq.PUSH if proxy.enable_postprocess_parallel else zmq.PAIR,
            name="dwdp_lost_rank_queue",
        )
        errors = [ErrorResponse(number, message, number) for number in list(proxy._results)]
        queue.put([*errors, None])
        receiver.join(_ANSWER_S)
        queue.close()
