"""One executor over all ranks: TensorRT-LLM's own proxies and sockets, and threads in place of workers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from dwdp.engines.tensorrt_llm import executor, rank_proxy
from dwdp.engines.tensorrt_llm.executor import LostRankError
from dwdp.engines.tensorrt_llm.rank_proxy import OutstandingRequests
from dwdp.engines.tensorrt_llm.rank_session import RankProcessError

TIMEOUT_S = 60


class Final:
    """The last response to a request, as far as proxies look at it."""

    def __init__(self, client_id: int) -> None:
        self.client_id = client_id
        self.result = SimpleNamespace(is_final=True)

    def has_error(self) -> bool:
        return False


class ThreadWorker:
    """A rank's session whose worker is a thread: takes requests, answers when told to, and may die."""

    n_workers = 1
    instances: ClassVar[list[ThreadWorker]] = []

    def __init__(self, environ: dict[str, str]) -> None:
        self.environ = environ
        self.future: Future[None] = Future()
        self.requests: dict[int, Any] = {}
        self.aborted: list[int] = []
        self.llm_args: Any = None
        self._orders: queue.Queue[Callable[[Any], bool]] = queue.Queue()
        self._received = threading.Condition()
        ThreadWorker.instances.append(self)

    def submit(self, task: Any, **kwargs: Any) -> list[Future[None]]:
        self.llm_args = kwargs["llm_args"]
        threading.Thread(target=self._work, kwargs=kwargs, daemon=True).start()
        return [self.future]

    def shutdown(self, wait: bool = True) -> None:
        assert self.future.done()

    shutdown_abort = shutdown

    def abort(self) -> None:
        self.die()

    def die(self) -> None:
        self._orders.put(lambda _: False)

    def answer(self, request_id: int) -> None:
        def send(results: Any) -> bool:
            del self.requests[request_id]
            results.put([Final(request_id)])
            return True

        self._orders.put(send)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self._received:
            assert self._received.wait_for(condition, TIMEOUT_S)

    def _work(self, *, worker_queues: Any, ready_signal: bytes, **_: Any) -> None:
        import zmq
        from tensorrt_llm.executor.ipc import FusedIpcQueue, IpcQueue

        requests = IpcQueue(worker_queues.request_queue_addr, is_server=False, name="requests")
        status = IpcQueue(
            worker_queues.worker_init_status_queue_addr,
            is_server=False,
            socket_type=zmq.DEALER,
            name="status",
        )
        results = FusedIpcQueue(worker_queues.result_queue_addr, is_server=False, name="results")
        status.notify_with_retry((ready_signal, None))
        try:
            while self._step(requests, results):
                pass
            self.future.set_result(None)
        except RankProcessError as error:
            for socket in (requests, status, results):
                socket.close()
            self.future.set_exception(error)

    def _step(self, requests: Any, results: Any) -> bool:
        from tensorrt_llm.executor.request import CancellingRequest

        while not self._orders.empty():
            if not self._orders.get()(results):
                raise RankProcessError("process 1 was ended by SIGKILL")
        if not requests.poll(0.01):
            return True
        request = requests.get()
        if request is None:
            results.put(None)
            return False
        with self._received:
            if isinstance(request, CancellingRequest):
                self.aborted.append(request.id)
            else:
                self.requests[request.id] = request
            self._received.notify_all()
        return True


class Arguments(SimpleNamespace):
    def model_copy(self, *, update: dict[str, Any]) -> Arguments:
        return Arguments(**{**vars(self), **update})


def arguments(num_ranks: int, **others: Any) -> Arguments:
    settings = {
        "parallel": "dwdp",
        "dwdp_config": {"dwdp_size": num_ranks},
        "env_overrides": {"USERS_OWN": "1"},
        "orchestrator_type": None,
        "garbage_collection_gen0_threshold": 20000,
    }
    return Arguments(**{**settings, **others})


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Any]]:
    """Makes a group's executor; ended with the test."""
    import torch
    from tensorrt_llm.executor.executor import GenerationExecutor

    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(executor, "RankSession", ThreadWorker)
    monkeypatch.setattr(ThreadWorker, "instances", [])
    if not hasattr(GenerationExecutor.create, "__wrapped__"):
        monkeypatch.setattr(GenerationExecutor, "create", GenerationExecutor.create)
        executor.patch(SimpleNamespace(GenerationExecutor=GenerationExecutor))
    started = []

    def create(num_ranks: int) -> Any:
        started.append(GenerationExecutor.create("engine", llm_args=arguments(num_ranks)))
        return started[-1]

    yield create
    for group in started:
        group.shutdown()


def workers() -> list[ThreadWorker]:
    return sorted(ThreadWorker.instances, key=lambda worker: worker.environ["DWDP_RANK"])


def send(group: Any, num_prompt_tokens: int, max_tokens: int = 10) -> Any:
    from tensorrt_llm.sampling_params import SamplingParams

    sampling = SamplingParams(max_tokens=max_tokens, end_id=0)
    return group.generate_async([1] * num_prompt_tokens, sampling)


def owner(result: Any) -> int:
    """The rank that has the request, once it has arrived."""
    for _ in range(TIMEOUT_S * 100):
        for number, worker in enumerate(workers()):
            if result.request_id in worker.requests:
                return number
        threading.Event().wait(0.01)
    raise AssertionError("the request arrived nowhere")


@pytest.mark.trtllm
def test_every_rank_gets_its_own_place_and_arguments(start: Callable[[int], Any]) -> None:
    start(3)
    for number, worker in enumerate(workers()):
        overrides = worker.llm_args.env_overrides
        assert overrides["USERS_OWN"] == "1"
        for variables in (overrides, worker.environ):
            assert variables["DWDP_RANK"] == str(number)
            assert variables["DWDP_WORLD_SIZE"] == "3"
            assert variables["DWDP_STORE_IS_SERVED"] == "1"
    assert len({worker.environ["DWDP_RENDEZVOUS"] for worker in workers()}) == 1


@pytest.mark.trtllm
def test_a_request_goes_to_the_rank_with_the_fewest_tokens(start: Callable[[int], Any]) -> None:
    group = start(2)
    big, small, next_small = send(group, 100), send(group, 5), send(group, 5)
    assert [owner(result) for result in (big, small, next_small)] == [0, 1, 1]
    assert len({result.request_id for result in (big, small, next_small)}) == 3
    workers()[0].answer(big.request_id)
    assert big.queue.get(timeout=TIMEOUT_S).client_id == big.request_id
    assert owner(send(group, 5)) == 0
    for rank, result in ((1, small), (1, next_small)):
        workers()[rank].answer(result.request_id)
        assert result.queue.get(timeout=TIMEOUT_S).client_id == result.request_id


@pytest.mark.trtllm
def test_an_abort_goes_where_the_request_is(start: Callable[[int], Any]) -> None:
    group = start(2)
    first, second = send(group, 5), send(group, 5)
    group.abort_request(second.request_id)
    first.abort()
    group.abort_request(12345)
    for worker, result in zip(workers(), (first, second), strict=True):
        worker.wait_for(lambda worker=worker: bool(worker.aborted))
        assert worker.aborted == [result.request_id]


@pytest.mark.trtllm
def test_a_rank_that_dies_fails_its_requests_and_no_other(start: Callable[[int], Any]) -> None:
    from tensorrt_llm.executor.utils import RequestError

    group = start(2)
    lost, kept = send(group, 5), send(group, 5)
    assert (owner(lost), owner(kept)) == (0, 1)
    workers()[0].die()
    with pytest.raises(RequestError, match="rank 0 is gone: process 1 was ended by SIGKILL; send"):
        lost.result()
    assert not group.is_shutdown()
    later = [send(group, 5) for _ in range(3)]
    assert [owner(result) for result in later] == [1, 1, 1]
    workers()[1].answer(kept.request_id)
    assert kept.queue.get(timeout=TIMEOUT_S).client_id == kept.request_id


@pytest.mark.trtllm
def test_without_ranks_there_is_nobody_to_send_to(start: Callable[[int], Any]) -> None:
    from tensorrt_llm.executor.utils import RequestError

    group = start(2)
    results = [send(group, 5), send(group, 5)]
    for worker, result in zip(workers(), results, strict=True):
        worker.die()
        with pytest.raises(RequestError):
            result.result()
    with pytest.raises(LostRankError, match=r"no rank is left: rank 0 is gone.*rank 1 is gone"):
        send(group, 5)
    assert group.is_shutdown()


@pytest.mark.trtllm
def test_shutdown_ends_every_worker_and_may_be_repeated(start: Callable[[int], Any]) -> None:
    group = start(3)
    result = send(group, 5)
    owner(result)
    workers()[2].die()
    group.shutdown()
    group.shutdown()
    assert all(worker.future.done() for worker in workers())
    assert workers()[0].aborted == [result.request_id]
    assert group.is_shutdown()


@pytest.mark.trtllm
def test_statistics_of_all_ranks_are_told_apart(
    start: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    group = start(2)
    for number, rank in enumerate(group._ranks):
        monkeypatch.setattr(rank.proxy, "get_stats", lambda _, n=number: [{"iter": n + 7}])
        monkeypatch.setattr(rank.proxy, "get_kv_events", lambda _, n=number: [{"event_id": n}])
    assert group.get_stats(1.0) == [{"iter": 7, "dwdpRank": 0}, {"iter": 8, "dwdpRank": 1}]
    assert group.get_kv_events(1.0) == [
        {"event_id": 0, "attention_dp_rank": 0},
        {"event_id": 1, "attention_dp_rank": 1},
    ]


@pytest.mark.trtllm
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dwdp_config": {"dwdp_size": 2, "num_groups": 2}}, "num_groups is 2: one LLM owns one"),
        ({"orchestrator_type": "rpc"}, "orchestrator_type is 'rpc'"),
    ],
)
def test_what_needs_one_rank_is_refused(
    start: Callable[[int], Any], changes: dict[str, Any], message: str
) -> None:
    from tensorrt_llm.executor.executor import GenerationExecutor

    with pytest.raises(ValueError, match=message):
        GenerationExecutor.create("engine", llm_args=arguments(2, **changes))


@pytest.mark.parametrize(
    ("settings", "is_ours"),
    [
        (arguments(2), True),
        (arguments(1), False),
        (arguments(2, parallel=None), False),
        (arguments(2, env_overrides={"DWDP_RANK": "0"}), False),
        (None, False),
    ],
)
def test_only_a_process_that_is_no_rank_owns_a_group(settings: Any, is_ours: bool) -> None:
    class Executor:
        def __init__(self, **_: Any) -> None:
            raise AssertionError("no worker is started here")

        @staticmethod
        def create(engine: str, **kwargs: Any) -> str:
            return "TensorRT-LLM's"

    module = SimpleNamespace(GenerationExecutor=Executor)
    executor.patch(module)
    if is_ours:
        with pytest.raises(AssertionError):
            Executor.create("engine", llm_args=settings)
    else:
        assert Executor.create("engine", llm_args=settings) == "TensorRT-LLM's"


def test_outstanding_tokens_are_those_of_requests_that_are_not_answered() -> None:
    def result(num_prompt_tokens: int, max_tokens: int | None, best_of: int = 1) -> Any:
        sampling = SimpleNamespace(max_tokens=max_tokens, best_of=best_of)
        return SimpleNamespace(prompt_token_ids=[1] * num_prompt_tokens, sampling_params=sampling)

    outstanding = OutstandingRequests()
    outstanding[1], outstanding[2], outstanding[3] = result(5, 10), result(7, None), result(1, 2, 3)
    assert outstanding.num_tokens == 15 + 7 + 7
    outstanding.pop(1)
    outstanding.pop(1, None)
    assert outstanding.num_tokens == 14
    assert list(outstanding) == [2, 3]


@pytest.mark.trtllm
@pytest.mark.timeout(60)
def test_sending_to_a_worker_that_is_gone_does_not_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import zmq
    from tensorrt_llm.executor.ipc import IpcQueue

    monkeypatch.setattr(rank_proxy, "_SEND_TIMEOUT_MS", 50)
    requests = IpcQueue(is_server=True, name="requests")
    proxy = SimpleNamespace(request_queue=requests, mpi_futures=[])
    rank_proxy.Rank(0, proxy, lambda rank: None)
    with pytest.raises(zmq.Again):
        requests.put("nobody is connected")
    requests.close()
