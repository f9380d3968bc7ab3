"""A balancer over ranks that are ready, without any process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from dwdp.serving.router.balancer import MAX_OVERTAKES, Balancer
from dwdp.serving.supervisor.interface import RankEndpoint
from dwdp.serving.supervisor.link import RankLink
from dwdp.serving.supervisor.ranks import RankState, RankTable


def with_balancer(
    num_ranks: int,
    body: Callable[[Balancer, RankTable], Awaitable[None]],
    *,
    max_running: int = 4,
    max_waiting: int | None = None,
    max_queued: int = 100,
    max_overtakes: int = MAX_OVERTAKES,
) -> None:
    """Run ``body`` with a balancer over ranks that are ready. Nothing is sent to them."""

    limits = {"max_running": max_running}
    if max_waiting is not None:
        limits["max_waiting"] = max_waiting

    async def run() -> None:
        table = RankTable.of_size(num_ranks)
        balancer = Balancer(table, max_queued=max_queued, max_overtakes=max_overtakes)
        balancer.open()
        for rank in table.ranks:
            rank.link = RankLink(RankEndpoint(socket="nobody"))
            rank.note_stats({"limits": dict(limits)})
            table.set_state(rank, RankState.READY)
        try:
            await body(balancer, table)
        finally:
            for rank in table.ranks:
                assert rank.link is not None
                await rank.link.close()

    asyncio.run(run())
