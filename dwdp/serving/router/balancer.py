"""Which rank a request goes to, and who waits."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from dwdp.serving.openai.errors import ApiError, deadline_exceeded, overloaded, unavailable
from dwdp.serving.supervisor.link import RankLink
from dwdp.serving.supervisor.ranks import Rank, RankState, RankTable

DEFAULT_MAX_RUNNING = 64
_PAUSE_S = 0.25
_MAX_RETRY_AFTER_S = 60.0
_STARTING_RETRY_S = 5.0
_INTERVAL_WEIGHT = 0.1


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


@dataclass(frozen=True)
class Deadline:
    """When a request is given up: ``timeout_s`` seconds after it came, at the loop's time ``at_s``."""

    timeout_s: float
    at_s: float

    @classmethod
    def after(cls, timeout_s: float) -> Deadline:
        return cls(timeout_s, asyncio.get_running_loop().time() + timeout_s)

    @property
    def left_s(self) -> float:
        return max(0.0, self.at_s - asyncio.get_running_loop().time())

    def error(self) -> ApiError:
        return deadline_exceeded(self.timeout_s)


@dataclass
class RankLoad:
    """What one rank process has been given and not finished."""

    outstanding_tokens: int = 0
    num_sequences: int = 0
    leases: set[Lease] = field(default_factory=set)
    paused_until_s: float = 0.0


class Lease:
    """A request's place on a rank, until :meth:`release`.

    Attributes:
        cut_reason: why somebody cut the request off before it was done; None: nobody has.
    """

    def __init__(
        self, rank: Rank, link: RankLink, load: RankLoad, cost: Cost, balancer: Balancer
    ) -> None:
        self.rank = rank
        self.link = link
        self.cut_reason: ApiError | None = None
        self._load = load
        self._cost = cost
        self._balancer = balancer
        self._prompt_tokens = cost.prompt_tokens
        self._cut: Callable[[], object] | None = None
        self._is_answered = False
        load.leases.add(self)
        load.num_sequences += cost.num_sequences
        load.outstanding_tokens += cost.prompt_tokens + cost.new_tokens

    def on_cut(self, cut: Callable[[], object]) -> None:
        """What ends the wait for the rank from now on."""
        self._cut = cut
        if self.cut_reason is not None:
            cut()

    def cut(self, reason: ApiError) -> None:
        """End the request on this rank. The first reason stays."""
        if self.cut_reason is None:
            self.cut_reason = reason
            if self._cut is not None:
                self._cut()

    def note_first_token(self) -> None:
        """The prompt is behind the rank."""
        self._is_answered = True
        self._load.outstanding_tokens -= self._prompt_tokens
        self._prompt_tokens = 0

    @property
    def is_answered(self) -> bool:
        """Whether the rank has produced anything."""
        return self._is_answered

    def pause_rank(self) -> None:
        """The rank took no more just now: let it be for a moment."""
        self._balancer.pause(self._load)

    def release(self) -> None:
        """Give the place back. Idempotent."""
        if self in self._load.leases:
            self._load.leases.discard(self)
            self._load.num_sequences -= self._cost.num_sequences
            self._load.outstanding_tokens -= self._prompt_tokens + self._cost.new_tokens
            self._balancer.note_release()


@dataclass(eq=False)
class _Waiter:
    cost: Cost
    avoid: Collection[int]
    place: asyncio.Future[Lease]


class Balancer:
    """Gives each request to the ready rank with the fewest outstanding tokens that has room for it.

    A rank has room for as many sequences as it generates at a time and a quarter more, so that it never
    runs dry; the others wait here, where the death of a rank does not touch them and whichever rank is free
    first takes them. Requests are served in the order of arrival; those that lost their rank come first.

    Used inside one event loop.
    """

    def __init__(self, table: RankTable, *, max_queued: int) -> None:
        self._table = table
        self._max_queued = max_queued
        self._queue: deque[_Waiter] = deque()
        self._loads = {rank.rank: RankLoad() for rank in table.ranks}
        self._closed_for: ApiError | None = unavailable(
            "The group is being set up", "starting", _STARTING_RETRY_S
        )
        self._release_interval_s = 1.0
        self._last_release_s: float | None = None
        table.on_change.append(self._note_change)

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    @property
    def is_open(self) -> bool:
        return self._closed_for is None

    def load_of(self, rank: int) -> RankLoad:
        return self._loads[rank]

    def open(self) -> None:
        """Take requests from now on."""
        self._closed_for = None

    def close(self, reason: ApiError) -> None:
        """Refuse new requests from now on; those that wait or run go on."""
        self._closed_for = reason

    def cut_all(self, reason: ApiError) -> None:
        """End what waits and what runs."""
        while self._queue:
            _fail(self._queue.popleft(), reason)
        for load in self._loads.values():
            for lease in list(load.leases):
                lease.cut(reason)

    async def acquire(
        self,
        cost: Cost,
        *,
        deadline: Deadline,
        avoid: Collection[int] = (),
        is_retry: bool = False,
    ) -> Lease:
        """A place on a rank, waited for if need be.

        Args:
            avoid: ranks that are chosen only if no other has room.
            is_retry: the request had a place before, so it goes ahead of the others and is not refused.

        Raises:
            ApiError: 429 when too many wait already, 503 when no rank will come, 504 at the deadline.
        """
        if not is_retry:
            self._check_open()
        if not self._queue and (lease := self._place(cost, avoid)) is not None:
            return lease
        if not is_retry and len(self._queue) >= self._max_queued:
            raise overloaded(
                f"{len(self._queue)} requests are waiting already", self._retry_after_s()
            )
        loop = asyncio.get_running_loop()
        waiter = _Waiter(cost, avoid, loop.create_future())
        (self._queue.appendleft if is_retry else self._queue.append)(waiter)
        timer = loop.call_at(deadline.at_s, _fail, waiter, deadline.error())
        self._serve_queue()
        try:
            return await waiter.place
        except asyncio.CancelledError:
            if waiter.place.done() and not waiter.place.cancelled():
                waiter.place.result().release()
            raise
        finally:
            timer.cancel()
            if waiter in self._queue:
                self._queue.remove(waiter)
                self._serve_queue()

    def pause(self, load: RankLoad) -> None:
        loop = asyncio.get_running_loop()
        load.paused_until_s = loop.time() + _PAUSE_S
        loop.call_later(_PAUSE_S, self._serve_queue)

    def note_release(self) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._last_release_s is not None:
            interval_s = min(now_s - self._last_release_s, _MAX_RETRY_AFTER_S)
            self._release_interval_s += _INTERVAL_WEIGHT * (interval_s - self._release_interval_s)
        self._last_release_s = now_s
        self._serve_queue()

    def _check_open(self) -> None:
        if self._closed_for is not None:
            raise self._closed_for
        if all(rank.state is RankState.GIVEN_UP for rank in self._table.ranks):
            raise unavailable("No rank is left", "no_rank", _MAX_RETRY_AFTER_S)

    def _retry_after_s(self) -> float:
        return min(_MAX_RETRY_AFTER_S, max(1.0, len(self._queue) * self._release_interval_s))

    def _serve_queue(self) -> None:
        while self._queue:
            waiter = self._queue[0]
            if not waiter.place.done():
                lease = self._place(waiter.cost, waiter.avoid)
                if lease is None:
                    return
                waiter.place.set_result(lease)
            self._queue.popleft()

    def _place(self, cost: Cost, avoid: Collection[int]) -> Lease | None:
        now_s = asyncio.get_running_loop().time()
        best: tuple[bool, int, int] | None = None
        for rank in self._table.ranks:
            load = self._loads[rank.rank]
            if (
                rank.state is not RankState.READY
                or rank.link is None
                or load.paused_until_s > now_s
            ):
                continue
            # A request that is wider than the window still gets a rank, one that is idle.
            if load.num_sequences and load.num_sequences + cost.num_sequences > window(rank):
                continue
            key = (rank.rank in avoid, load.outstanding_tokens, rank.rank)
            if best is None or key < best:
                best = key
        if best is None:
            return None
        rank = self._table.ranks[best[2]]
        assert rank.link is not None
        return Lease(rank, rank.link, self._loads[rank.rank], cost, self)

    def _note_change(self, rank: Rank, before: RankState) -> None:
        if rank.state is RankState.STARTING:
            self._loads[rank.rank] = RankLoad()
        elif rank.state is RankState.UNRESPONSIVE:
            reason = unavailable(f"rank {rank.rank} does not answer", "rank_lost", 1.0)
            for lease in list(self._loads[rank.rank].leases):
                if not lease.is_answered:
                    lease.cut(reason)
        self._serve_queue()


def window(rank: Rank) -> int:
    """Sequences that ``rank`` may hold: those it generates at a time, and a quarter more to go on with.

    Never more than it lets wait.
    """
    limits = rank.stats.get("limits")
    limits = limits if isinstance(limits, dict) else {}
    max_running = limits.get("max_running")
    if not isinstance(max_running, int) or max_running < 1:
        max_running = DEFAULT_MAX_RUNNING
    reserve = math.ceil(max_running / 4)
    max_waiting = limits.get("max_waiting")
    if isinstance(max_waiting, int) and max_waiting >= 0:
        reserve = min(reserve, max_waiting)
    return max_running + reserve


def _fail(waiter: _Waiter, error: ApiError) -> None:
    if not waiter.place.done():
        waiter.place.set_exception(error)
