"""Requests of many sequences: who may go ahead of them, for how long, and what no rank ever takes."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ready_balancer import with_balancer

from dwdp.serving.openai.errors import ApiError
from dwdp.serving.router.balancer import Balancer
from dwdp.serving.router.cost import Cost
from dwdp.serving.router.lease import Deadline, Lease
from dwdp.serving.supervisor.ranks import RankState, RankTable

FOREVER_S = 1e6


def wide(num_sequences: int) -> Cost:
    return Cost(num_sequences, num_sequences, num_sequences)


class Crowd:
    """Requests that were asked for, in order, and what became of them."""

    def __init__(self, balancer: Balancer) -> None:
        self.balancer = balancer
        self.widths: list[int] = []
        self.leases: dict[int, Lease] = {}  # by the number of the request
        self.refused: dict[int, ApiError] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def ask(self, num_sequences: int) -> int:
        number = len(self.widths)
        self.widths.append(num_sequences)
        self._tasks.append(asyncio.ensure_future(self._acquire(number)))
        await self.settle()
        return number

    async def _acquire(self, number: int) -> None:
        cost, deadline = wide(self.widths[number]), Deadline.after(FOREVER_S)
        try:
            self.leases[number] = await self.balancer.acquire(cost, deadline=deadline)
        except ApiError as error:
            self.refused[number] = error

    async def settle(self) -> None:
        for _ in range(3):
            await asyncio.sleep(0)

    async def release(self, number: int) -> None:
        self.leases[number].release()
        await self.settle()

    async def leave(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def waiting(self) -> list[int]:
        done = self.leases.keys() | self.refused.keys()
        return [number for number in range(len(self.widths)) if number not in done]


@settings(max_examples=200)
@given(
    steps=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 50)), min_size=1, max_size=60),
    num_ranks=st.integers(1, 3),
    max_overtakes=st.integers(0, 3),
)
def test_everybody_is_overtaken_within_bounds_and_gets_a_place(
    steps: list[tuple[int, int]], num_ranks: int, max_overtakes: int
) -> None:
    """Requests of any width come; some of what runs ends. Up to 3 run on a rank and 3 more wait in it."""
    max_running = max_waiting = 3
    capacity = max_running + max_waiting

    async def body(balancer: Balancer, table: RankTable) -> None:
        crowd = Crowd(balancer)
        held: set[int] = set()
        # By request: what ran when it was the first to wait and the last permitted one had gone ahead.
        ran_then: dict[int, set[int]] = {}
        overtakes: dict[int, int] = {}

        async def check(before: set[int]) -> None:
            placed = sorted(crowd.leases.keys() - before)
            held.update(placed)
            for rank in table.ranks:
                load = balancer.load_of(rank.rank)
                assert 0 <= load.num_sequences <= capacity
            for number in crowd.waiting:
                overtakes[number] = overtakes.get(number, 0) + sum(
                    later > number for later in placed
                )
                if number == crowd.waiting[0] and overtakes[number] >= max_overtakes:
                    # A rank has been kept for it since: had all that ran then ended, it would run.
                    assert ran_then.setdefault(number, set(held)) & held, (number, crowd.widths)

        for num_sequences, choice in steps:
            before = set(crowd.leases)
            number = await crowd.ask(num_sequences)
            if num_sequences > capacity:
                assert crowd.refused[number].status == 400
            await check(before)
            if held and choice % 2:
                before = set(crowd.leases)
                ended = sorted(held)[choice % len(held)]
                held.discard(ended)
                await crowd.release(ended)
                await check(before)
        while crowd.waiting:
            assert held, crowd.waiting
            before = set(crowd.leases)
            ended = min(held)
            held.discard(ended)
            await crowd.release(ended)
            await check(before)
        for number in held:
            await crowd.release(number)
        assert len(crowd.leases) == sum(width <= capacity for width in crowd.widths)
        for rank in table.ranks:
            load = balancer.load_of(rank.rank)
            assert (load.num_sequences, load.outstanding_tokens, len(load.leases)) == (0, 0, 0)

    with_balancer(
        num_ranks,
        body,
        max_running=max_running,
        max_waiting=max_waiting,
        max_overtakes=max_overtakes,
    )


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_wide_request_neither_blocks_nor_starves(num_ranks: int) -> None:
    """Under a stream of narrow requests that never leaves a rank idle."""

    async def body(balancer: Balancer, table: RankTable) -> None:
        crowd = Crowd(balancer)
        running = [await crowd.ask(1) for _ in range(4 * num_ranks)]
        assert not crowd.waiting
        full = await crowd.ask(4)
        assert crowd.waiting == [full]
        num_ahead = 0
        while full not in crowd.leases:
            assert running, "what ran has ended, and it still waits"
            await crowd.release(running.pop(0))
            number = await crowd.ask(1)
            if number in crowd.leases:
                num_ahead += 1
                running.append(number)
            assert num_ahead < 100
        # Some went ahead of it; while a rank was kept for it the others went on.
        assert num_ahead >= 5
        await crowd.release(full)
        assert crowd.waiting == []
        await crowd.leave()

    with_balancer(num_ranks, body, max_waiting=0, max_overtakes=5)


def test_the_last_request_of_a_rank_may_fill_its_queue() -> None:
    """A wide request does not have to wait for an idle rank if the rank itself lets that many wait."""

    async def body(balancer: Balancer, table: RankTable) -> None:
        crowd = Crowd(balancer)
        for num_sequences in (1, 1, 1, 1, 60):
            await crowd.ask(num_sequences)
        assert crowd.waiting == []
        await crowd.ask(1)  # now it has more than it should
        assert crowd.waiting == [5]
        await crowd.leave()

    with_balancer(1, body, max_running=4, max_waiting=60)


def test_what_no_rank_ever_takes_is_refused_at_once() -> None:
    async def body(balancer: Balancer, table: RankTable) -> None:
        crowd = Crowd(balancer)
        await crowd.ask(5)
        await crowd.ask(9)
        assert crowd.refused[1].status == 400 and "at most 8" in str(crowd.refused[1])
        # While no rank has said what it takes, it waits, and keeps nobody from being served.
        for rank in table.ranks:
            table.set_state(rank, RankState.DEAD)
            limits = rank.stats
            rank.note_stats({})
        await crowd.ask(9)
        await crowd.ask(1)
        assert crowd.waiting == [2, 3]
        for rank in table.ranks:
            rank.note_stats(limits)
            table.set_state(rank, RankState.READY)
            await crowd.settle()
        assert crowd.refused[2].status == 400 and 3 in crowd.leases

    with_balancer(2, body, max_running=4, max_waiting=4)


def test_a_kept_rank_that_is_lost_is_replaced() -> None:
    async def body(balancer: Balancer, table: RankTable) -> None:
        crowd = Crowd(balancer)
        running = [await crowd.ask(1) for _ in range(6)]  # 3 on each
        full = await crowd.ask(4)
        narrow = await crowd.ask(1)  # goes ahead on one rank; then the other one is kept
        kept = 1 - crowd.leases[narrow].rank.rank
        assert (await crowd.ask(1)) in crowd.waiting
        table.set_state(table.ranks[kept], RankState.UNRESPONSIVE)
        for number in [*running, narrow]:
            if crowd.leases[number].rank.rank != kept:
                await crowd.release(number)
        assert full in crowd.leases and crowd.leases[full].rank.rank != kept
        await crowd.leave()

    with_balancer(2, body, max_waiting=0, max_overtakes=1)
