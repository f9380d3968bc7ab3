"""Which rank a request goes to, and who waits."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection
from dataclasses import dataclass

from dwdp.serving.openai.errors import ApiError, invalid, overloaded, unavailable
from dwdp.serving.router.cost import Cost
from dwdp.serving.router.lease import Deadline, Lease, RankLoad
from dwdp.serving.supervisor.limits import RankLimits
from dwdp.serving.supervisor.ranks import Rank, RankState, RankTable

MAX_OVERTAKES = 64
"""Later requests that may go ahead of one that finds no room, before a rank is kept for it."""

MAX_RETRY_AFTER_S = 60.0
_PAUSE_S = 0.25
_STARTING_RETRY_S = 5.0
_INTERVAL_WEIGHT = 0.1


@dataclass(eq=False)
class _Waiter:
    """A request without a place.

    Attributes:
        num_overtakes: later requests that were given a place meanwhile.
        kept_rank: the rank that is kept for it; None: none is.
    """

    cost: Cost
    avoid: Collection[int]
    is_retry: bool
    place: asyncio.Future[Lease]
    num_overtakes: int = 0
    kept_rank: int | None = None

    def fail(self, error: ApiError) -> None:
        if not self.place.done():
            self.place.set_exception(error)


@dataclass(frozen=True)
class _Opening:
    """A rank that takes requests."""

    rank: Rank
    load: RankLoad
    limits: RankLimits

    def fits(self, num_sequences: int) -> bool:
        held = self.load.num_sequences
        return held < self.limits.window and self.limits.can_hold(held + num_sequences)


class Balancer:
    """Gives each request to the ready rank with the fewest outstanding tokens that has room for it.

    A rank has room until it holds as many sequences as it generates at a time and a quarter more, so that it
    never runs dry; the others wait here, where the death of a rank does not touch them and whichever rank is
    free first takes them. A request is never split: the last one may go over that number, as far as the
    rank's own queue goes. What is more than any rank ever holds is refused at once.

    Requests are served in the order of arrival; those that lost their rank come first. Only a request of so
    many sequences that no rank has room for all of them is overtaken, by later ones that fit, and that within
    bounds: once ``max_overtakes`` later ones have gone ahead, a ready rank is kept for it, the one with the
    fewest outstanding tokens of those that can hold it and are not kept for another one. What came later
    gets no place there until it has got its own, there or elsewhere. So it waits for no more than what that
    rank runs at that moment, and nobody waits longer than that on its account.

    Used inside one event loop.
    """

    def __init__(
        self, table: RankTable, *, max_queued: int, max_overtakes: int = MAX_OVERTAKES
    ) -> None:
        self._table = table
        self._max_queued = max_queued
        self._max_overtakes = max_overtakes
        self._queue: list[_Waiter] = []
        self._loads = {rank.rank: RankLoad() for rank in table.ranks}
        self._closed_for: ApiError | None = unavailable(
            "The group is being set up", "starting", _STARTING_RETRY_S
        )
        self._ended_for: ApiError | None = None
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

    def ready_ranks(self) -> list[int]:
        """Ranks that take requests, be there room for one or not."""
        return [rank.rank for rank in self._table.ranks if rank.state is RankState.READY]

    def open(self) -> None:
        """Take requests from now on."""
        self._closed_for = None

    def close(self, reason: ApiError) -> None:
        """Refuse new requests from now on; those that wait or run go on."""
        self._closed_for = reason

    def cut_all(self, reason: ApiError) -> None:
        """End what waits and what runs, and refuse everything from now on. The first reason stays."""
        if self._ended_for is None:
            self._closed_for = self._ended_for = reason
        for waiter in self._queue:
            waiter.fail(reason)
        self._queue = []
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
            is_retry: the request had a place before, so it goes ahead of the others and is not refused
                because the queue is full or new requests are not taken any more.

        Raises:
            ApiError: 400 when it is wider than any rank takes, 429 when too many wait already, 503 when no
                rank will come, 504 at the deadline.
        """
        self._check_open(is_retry)
        if deadline.left_s == 0.0:
            raise deadline.error()
        if (error := _too_wide(cost, self._table.widest_limits())) is not None:
            raise error
        if not self._queue and (opening := _choose(self._openings(), cost, avoid)) is not None:
            return self._place(opening, cost)
        waiter = _Waiter(cost, avoid, is_retry, asyncio.get_running_loop().create_future())
        self._enqueue(waiter)
        self._serve_queue()
        if not waiter.place.done() and not is_retry and len(self._queue) > self._max_queued:
            self._queue.remove(waiter)
            raise overloaded(
                f"{len(self._queue)} requests are waiting already", self._retry_after_s()
            )
        return await self._wait(waiter, deadline)

    def pause(self, lease: Lease) -> None:
        """The rank of ``lease`` took no more just now, or is gone: let it be for a moment."""
        loop = asyncio.get_running_loop()
        lease.load.paused_until_s = loop.time() + _PAUSE_S
        loop.call_later(_PAUSE_S, self._serve_queue)

    def _note_release(self, lease: Lease) -> None:
        if lease.is_answered:
            now_s = asyncio.get_running_loop().time()
            if self._last_release_s is not None:
                interval_s = min(now_s - self._last_release_s, MAX_RETRY_AFTER_S)
                change_s = interval_s - self._release_interval_s
                self._release_interval_s += _INTERVAL_WEIGHT * change_s
            self._last_release_s = now_s
        self._serve_queue()

    async def _wait(self, waiter: _Waiter, deadline: Deadline) -> Lease:
        timer = asyncio.get_running_loop().call_at(deadline.at_s, waiter.fail, deadline.error())
        try:
            return await waiter.place
        except asyncio.CancelledError:
            place = waiter.place
            if place.done() and not place.cancelled() and place.exception() is None:
                place.result().release()
            raise
        finally:
            timer.cancel()
            if waiter in self._queue:
                self._queue.remove(waiter)
                self._serve_queue()

    def _enqueue(self, waiter: _Waiter) -> None:
        position = len(self._queue)
        if waiter.is_retry:
            position = sum(queued.is_retry for queued in self._queue)
        self._queue.insert(position, waiter)

    def _check_open(self, is_retry: bool) -> None:
        refusal = self._ended_for if is_retry else self._closed_for
        if refusal is not None:
            # It is raised again and again, and would gather the frames of all that it was raised for.
            raise refusal.with_traceback(None)

    def _retry_after_s(self) -> float:
        return min(MAX_RETRY_AFTER_S, max(1.0, len(self._queue) * self._release_interval_s))

    def _serve_queue(self) -> None:
        """Give places to those that fit, in order, and keep ranks for those that were overtaken too often."""
        if not self._queue:
            return
        openings = self._openings()
        widest = self._table.widest_limits()
        kept: dict[int, _Waiter] = {}
        passed_over: list[_Waiter] = []
        narrowest = math.inf  # of those that found no room; it only shrinks from there on
        for waiter in self._queue:
            if not any(opening.fits(1) for opening in openings):
                break
            if waiter.place.done():
                continue
            if (error := _too_wide(waiter.cost, widest)) is not None:
                waiter.fail(error)
                continue
            is_hopeless = waiter.cost.num_sequences >= narrowest
            opening = None if is_hopeless else _choose(openings, waiter.cost, waiter.avoid)
            if opening is None:
                narrowest = min(narrowest, waiter.cost.num_sequences)
                passed_over.append(waiter)
            else:
                waiter.place.set_result(self._place(opening, waiter.cost))
                for overtaken in passed_over:
                    overtaken.num_overtakes += 1
            for overtaken in passed_over:
                if overtaken.num_overtakes >= self._max_overtakes:
                    self._keep_rank(overtaken, kept)
            openings = [opening for opening in openings if opening.rank.rank not in kept]
        self._queue = [waiter for waiter in self._queue if not waiter.place.done()]

    def _keep_rank(self, waiter: _Waiter, kept: dict[int, _Waiter]) -> None:
        """Note in ``kept`` the rank that is kept for ``waiter``: the same one as long as it is ready."""
        if waiter.kept_rank is not None and kept.get(waiter.kept_rank) is waiter:
            return
        able = {
            rank.rank: self._loads[rank.rank].outstanding_tokens
            for rank in self._table.ranks
            if rank.state is RankState.READY
            and rank.rank not in kept
            and (rank.limits or RankLimits()).can_hold(waiter.cost.num_sequences)
        }
        if waiter.kept_rank not in able:
            waiter.kept_rank = min(able, key=lambda rank: (able[rank], rank), default=None)
        if waiter.kept_rank is not None:
            kept[waiter.kept_rank] = waiter

    def _openings(self) -> list[_Opening]:
        """Ranks that take requests now."""
        now_s = asyncio.get_running_loop().time()
        return [
            _Opening(rank, load, rank.limits or RankLimits())
            for rank in self._table.ranks
            if rank.state is RankState.READY
            and rank.link is not None
            and (load := self._loads[rank.rank]).paused_until_s <= now_s
        ]

    def _place(self, opening: _Opening, cost: Cost) -> Lease:
        rank = opening.rank
        assert rank.link is not None
        return Lease(rank, rank.link, opening.load, cost, self._note_release)

    def _note_change(self, rank: Rank, before: RankState) -> None:
        if rank.state is RankState.STARTING:
            self._loads[rank.rank] = RankLoad()
        elif rank.state is RankState.UNRESPONSIVE:
            reason = unavailable(f"rank {rank.rank} does not answer", "rank_lost", 1.0)
            for lease in list(self._loads[rank.rank].leases):
                if not lease.is_answered:
                    lease.cut(reason)
        self._serve_queue()


def _choose(openings: Collection[_Opening], cost: Cost, avoid: Collection[int]) -> _Opening | None:
    return min(
        (opening for opening in openings if opening.fits(cost.num_sequences)),
        key=lambda opening: (
            opening.rank.rank in avoid,
            opening.load.outstanding_tokens,
            opening.rank.rank,
        ),
        default=None,
    )


def _too_wide(cost: Cost, widest: RankLimits) -> ApiError | None:
    """Why no rank will ever take so many sequences; None: one may."""
    if widest.can_hold(cost.num_sequences):
        return None
    return invalid(
        f"The request asks for {cost.num_sequences} answers (prompts times n); a rank takes at most "
        f"{widest.capacity} at once"
    )
