"""Which rank a request goes to, what it is taken to cost, and when a rank is started again."""

from __future__ import annotations

import asyncio
import json
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ready_balancer import with_balancer

from dwdp.serving.openai.errors import ApiError, unavailable
from dwdp.serving.openai.requests import ChatCompletionRequest, CompletionRequest, parse
from dwdp.serving.router.balancer import Balancer
from dwdp.serving.router.cost import UNLIMITED_NEW_TOKENS, Cost, check_length, estimate_cost
from dwdp.serving.router.lease import Deadline, Lease
from dwdp.serving.supervisor.limits import RankLimits
from dwdp.serving.supervisor.ranks import RankState, RankTable
from dwdp.serving.supervisor.restarts import RestartPolicy

costs = st.builds(
    Cost, st.integers(0, 1000), st.integers(1, 1000), num_sequences=st.integers(1, 12)
)


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
                assert load.num_sequences < (rank.limits or RankLimits()).window + 12
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
            await balancer.acquire(cost, deadline=deadline)
            for _ in range((table.ranks[0].limits or RankLimits()).window)
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


def test_what_lost_its_rank_after_the_end_does_not_wait() -> None:
    """A rank may be lost while the server ends: there is nothing left that would wake the request."""

    async def body(balancer: Balancer, table: RankTable) -> None:
        cost, reason = Cost(1, 1, 1), unavailable("ending", "draining", 1.0)
        table.set_state(table.ranks[0], RankState.DEAD)
        waiting = asyncio.ensure_future(balancer.acquire(cost, deadline=Deadline.after(1e6)))
        await asyncio.sleep(0)
        balancer.close(reason)
        retry = asyncio.ensure_future(
            balancer.acquire(cost, deadline=Deadline.after(1e6), is_retry=True)
        )
        await asyncio.sleep(0)
        assert not waiting.done() and not retry.done()  # both may go on until the end
        balancer.cut_all(reason)
        for late in (waiting, retry):
            with pytest.raises(ApiError, match="ending"):
                await late
        for is_retry in (False, True):
            with pytest.raises(ApiError, match="ending"):
                await balancer.acquire(cost, deadline=Deadline.after(1e6), is_retry=is_retry)

    with_balancer(1, body)


def test_refusals_keep_nothing_of_the_requests() -> None:
    """An error that is raised again and again must not gather what it was raised for."""

    async def body(balancer: Balancer, table: RankTable) -> None:
        balancer.close(unavailable("closed", "starting", 1.0))
        depths = []
        for _ in range(5):
            with pytest.raises(ApiError) as caught:
                await balancer.acquire(Cost(1, 1, 1), deadline=Deadline.after(1e6))
            depths.append(len(traceback.extract_tb(caught.value.__traceback__)))
        assert len(set(depths)) == 1

    with_balancer(1, body)


def test_clients_that_leave_at_the_deadline_leave_no_place_taken() -> None:
    async def body(balancer: Balancer, table: RankTable) -> None:
        cost = Cost(1, 1, 1)
        table.set_state(table.ranks[0], RankState.UNRESPONSIVE)
        for is_placed in (False, True):
            waiting = asyncio.ensure_future(balancer.acquire(cost, deadline=Deadline.after(1e6)))
            await asyncio.sleep(0)
            if is_placed:
                table.set_state(table.ranks[0], RankState.READY)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert (balancer.num_queued, balancer.load_of(0).num_sequences) == (0, 0)
        table.set_state(table.ranks[0], RankState.UNRESPONSIVE)
        with pytest.raises(ApiError) as caught:
            await balancer.acquire(cost, deadline=Deadline.after(0.0))
        assert caught.value.status == 504 and balancer.num_queued == 0

    with_balancer(1, body)


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


@pytest.mark.parametrize(
    ("options", "limit", "param"),
    [
        ({"prompt": "any", "max_tokens": 9}, 10, None),
        ({"prompt": "any", "max_tokens": 10}, 10, "prompt"),
        ({"prompt": [[1], [1] * 7], "max_tokens": 3}, 10, None),
        ({"prompt": [[1], [1] * 8], "max_tokens": 3}, 10, "prompt"),
        ({"prompt": [1] * 8, "max_tokens": 3}, None, None),
        ({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 10}, 10, "messages"),
        ({"messages": [{"role": "user", "content": "hi"}]}, 2, None),
        ({"messages": [{"role": "user", "content": "hi"}]}, 1, "messages"),
    ],
)
def test_only_what_is_certainly_too_long_is_refused(
    options: dict[str, object], limit: int | None, param: str | None
) -> None:
    kind = ChatCompletionRequest if "messages" in options else CompletionRequest
    request = parse(kind, json.dumps({"model": "m", **options}).encode())
    if param is None:
        check_length(request, limit)
        return
    with pytest.raises(ApiError) as caught:
        check_length(request, limit)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert caught.value.code == "context_length_exceeded"


def test_the_limits_of_a_group_are_those_of_its_widest_rank() -> None:
    table = RankTable.of_size(3)
    assert table.widest_limits() == RankLimits()  # nobody has said anything
    table.ranks[0].note_stats(
        {"limits": {"max_running": 4, "max_waiting": 2, "max_sequence_length": 9}}
    )
    assert table.widest_limits() == RankLimits(4, 2, 9)
    table.ranks[1].note_stats(
        {"limits": {"max_running": 2, "max_waiting": 6, "max_sequence_length": 7}}
    )
    assert table.widest_limits() == RankLimits(2, 6, 9)
    table.ranks[2].note_stats({"limits": {"max_running": True, "max_waiting": -1}})
    assert table.widest_limits() == RankLimits()
    table.ranks[2].note_stats({"limits": "none"})
    assert table.widest_limits() == RankLimits()
