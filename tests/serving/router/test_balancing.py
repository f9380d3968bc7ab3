"""Which rank a request goes to, what it is taken to cost, and when a rank is started again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dwdp.serving.openai.errors import ApiError
from dwdp.serving.openai.requests import ChatCompletionRequest, CompletionRequest, parse
from dwdp.serving.router.balancer import Balancer, Cost, Deadline, Lease, window
from dwdp.serving.router.cost import UNLIMITED_NEW_TOKENS, estimate_cost
from dwdp.serving.supervisor.interface import RankEndpoint
from dwdp.serving.supervisor.link import RankLink
from dwdp.serving.supervisor.ranks import RankState, RankTable
from dwdp.serving.supervisor.restarts import RestartPolicy

costs = st.builds(
    Cost, st.integers(0, 1000), st.integers(1, 1000), num_sequences=st.integers(1, 12)
)


def with_balancer(
    num_ranks: int,
    body: Callable[[Balancer, RankTable], Awaitable[None]],
    *,
    max_running: int = 4,
    max_queued: int = 100,
) -> None:
    """Run ``body`` with a balancer over ranks that are ready. Nothing is sent to them."""

    async def run() -> None:
        table = RankTable.of_size(num_ranks)
        balancer = Balancer(table, max_queued=max_queued)
        balancer.open()
        for rank in table.ranks:
            rank.link = RankLink(RankEndpoint(socket="nobody"))
            rank.stats = {"limits": {"max_running": max_running}}
            table.set_state(rank, RankState.READY)
        try:
            await body(balancer, table)
        finally:
            for rank in table.ranks:
                assert rank.link is not None
                await rank.link.close()

    asyncio.run(run())


@settings(deadline=None)
@given(st.lists(st.tuples(costs, st.integers(0, 20)), max_size=40), st.integers(1, 4))
def test_places_are_given_in_order_within_the_window_and_all_come_back(
    asked: list[tuple[Cost, int]], num_ranks: int
) -> None:
    """Requests come, and after each some of those that run (chosen by the number) are finished."""

    async def body(balancer: Balancer, table: RankTable) -> None:
        served: list[int] = []
        held: list[Lease] = []

        async def ask(index: int, cost: Cost) -> None:
            held.append(await balancer.acquire(cost, deadline=Deadline.after(1e6)))
            served.append(index)

        tasks = []
        for index, (cost, choice) in enumerate(asked):
            tasks.append(asyncio.ensure_future(ask(index, cost)))
            await asyncio.sleep(0)
            for rank in table.ranks:
                load = balancer.load_of(rank.rank)
                assert load.num_sequences <= window(rank) or len(load.leases) == 1
                assert load.outstanding_tokens >= 0
            if held and choice % 3 == 0:
                held.pop(choice % len(held)).release()
        while not all(task.done() for task in tasks):
            for lease in held:
                lease.release()
            held.clear()
            await asyncio.sleep(0)
        for lease in held:
            lease.release()
            lease.release()
        assert served == sorted(served)
        for rank in table.ranks:
            load = balancer.load_of(rank.rank)
            assert (load.num_sequences, load.outstanding_tokens, len(load.leases)) == (0, 0, 0)

    with_balancer(num_ranks, body)


def test_the_rank_with_the_fewest_outstanding_tokens_is_chosen() -> None:
    async def body(balancer: Balancer, table: RankTable) -> None:
        deadline = Deadline.after(10)

        async def place(prompt: int, new: int) -> Lease:
            return await balancer.acquire(Cost(prompt, new, 1), deadline=deadline)

        first = await place(100, 10)
        assert [first.rank.rank, (await place(50, 50)).rank.rank] == [0, 1]
        assert (await place(1, 1)).rank.rank == 1  # 100 of 110
        first.note_first_token()  # its prompt is done with: 10 are left
        assert (await place(1, 1)).rank.rank == 0
        table.set_state(table.ranks[0], RankState.DRAINING)
        assert (await place(1, 1)).rank.rank == 1

    with_balancer(2, body)


def test_those_that_lost_their_rank_go_first_and_are_not_refused() -> None:
    async def body(balancer: Balancer, table: RankTable) -> None:
        deadline, cost = Deadline.after(10), Cost(1, 1, 1)
        running = [
            await balancer.acquire(cost, deadline=deadline) for _ in range(window(table.ranks[0]))
        ]
        order: list[str] = []

        async def ask(name: str, *, is_retry: bool) -> None:
            await balancer.acquire(cost, deadline=deadline, is_retry=is_retry)
            order.append(name)

        waiting = [asyncio.ensure_future(ask("new", is_retry=False))]
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as caught:
            await balancer.acquire(cost, deadline=deadline)
        assert caught.value.status == 429
        waiting.append(asyncio.ensure_future(ask("retry", is_retry=True)))
        await asyncio.sleep(0)
        for lease in running[:2]:
            lease.release()
            await asyncio.sleep(0.01)
        assert order == ["retry", "new"]

    with_balancer(1, body, max_queued=1)


@settings(deadline=None)
@given(st.text(max_size=200), st.integers(1, 5), st.none() | st.integers(1, 50))
def test_costs(text: str, n: int, max_tokens: int | None) -> None:
    common = {"model": "m", "n": n, "max_tokens": max_tokens}
    ids = parse(CompletionRequest, json.dumps({**common, "prompt": [[1, 2, 3], [4]]}).encode())
    assert estimate_cost(ids) == Cost(4 * n, 2 * n * (max_tokens or 16), 2 * n)
    chat = parse(
        ChatCompletionRequest,
        json.dumps({**common, "messages": [{"role": "user", "content": text}]}).encode(),
    )
    cost = estimate_cost(chat)
    assert cost.num_sequences == n and cost.new_tokens == n * (max_tokens or UNLIMITED_NEW_TOKENS)
    assert n * len(text) / 4 <= cost.prompt_tokens <= n * (len(text) / 4 + 5)


@settings(deadline=None)
@given(st.lists(st.none() | st.floats(0, 100), max_size=30))
def test_restarts_are_spaced_out_only_for_ranks_that_fail(ready: list[float | None]) -> None:
    policy = RestartPolicy()
    failures = 0
    for ready_s in ready:
        policy.record_end(ready_s)
        failures = 0 if ready_s is not None and ready_s >= policy.stable_s else failures + 1
        assert policy.num_failures == failures
        assert policy.first_delay_s <= policy.delay_s <= policy.max_delay_s
        assert policy.is_exhausted == (failures >= policy.limit)
    assert RestartPolicy().delay_s == 0.2
