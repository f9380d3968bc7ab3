"""Invariant 6: a rank that died is started again and takes its place; survivors never notice."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from rank_process import Rank

from dwdp.group import Group
from dwdp.launch import LaunchInfo
from dwdp.rendezvous import GroupError, PeerFailure, prefixed, report_loss, serve_store

NUM_RANKS = 3


class Ranks:
    """A group whose ranks can be killed and started again."""

    def __init__(self, store: Any, mode: str) -> None:
        self.store = store
        self.port: int = store.port
        self._mode = mode
        self._num_starts = [0] * NUM_RANKS
        self.ranks = [self._new(rank) for rank in range(NUM_RANKS)]

    def _new(self, rank: int) -> Rank:
        incarnation = self._num_starts[rank]
        self._num_starts[rank] += 1
        return Rank(rank, NUM_RANKS, self.port, self._mode, incarnation)

    def restart(self, rank: int) -> None:
        self.ranks[rank] = self._new(rank)

    def check(self, *ranks: int) -> None:
        """These ranks read the right bytes of every expert, again and again."""
        for rank in ranks:
            self.ranks[rank].ask(20)
        for rank in ranks:
            assert self.ranks[rank].read().startswith("forwards")


@contextmanager
def running(mode: str) -> Iterator[Ranks]:
    store = serve_store("127.0.0.1", 0, NUM_RANKS)
    group = Ranks(store, mode)
    try:
        assert [rank.read() for rank in group.ranks] == ["attached"] * NUM_RANKS
        yield group
    finally:
        for rank in group.ranks:
            rank.kill()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", ["staged", "direct"])
def test_every_rank_can_be_replaced_one_after_the_other(mode: str) -> None:
    with running(mode) as group:
        for rank in (1, 0, 2, 0):
            survivors = [other for other in range(NUM_RANKS) if other != rank]
            group.ranks[rank].kill()
            group.check(*survivors)
            group.restart(rank)
            group.check(*survivors)
            assert group.ranks[rank].read() == "attached"
            group.check(*range(NUM_RANKS))


@pytest.mark.timeout(300)
def test_two_ranks_that_died_together_wait_for_each_other() -> None:
    with running("direct") as group:
        group.ranks[0].kill()
        group.ranks[1].kill()
        group.restart(1)
        group.check(2)
        group.restart(0)
        assert group.ranks[0].read() == group.ranks[1].read() == "attached"
        group.check(*range(NUM_RANKS))


@pytest.mark.timeout(300)
def test_a_rank_killed_while_it_rejoins_is_replaced() -> None:
    with running("direct") as group:
        group.ranks[1].kill()
        for delay_s in (0.2, 1.0, 2.0):
            group.restart(1)
            time.sleep(delay_s)
            group.ranks[1].kill()
            group.check(0, 2)
        group.restart(1)
        assert group.ranks[1].read() == "attached"
        group.check(*range(NUM_RANKS))


@pytest.mark.timeout(300)
def test_a_rank_does_not_wait_for_one_that_never_comes_back() -> None:
    """Rank 1 is this process: its peer, rank 0, died with it."""
    with running("direct") as group:
        group.ranks[0].kill()
        group.ranks[1].kill()
        launch = LaunchInfo(
            rank=1,
            size=NUM_RANKS,
            launcher="dwdp",
            host="127.0.0.1",
            port=group.port,
            attempt=0,
            store_is_served=True,
            incarnation=1,
        )
        with pytest.raises(GroupError, match=r"rank 1 cannot rejoin: rank\(s\) 0 died as well and"):
            Group.join(launch, timeout_s=1.0)
        report_loss(prefixed(group.store), 0, "failed 10 times in a row")
        with pytest.raises(
            PeerFailure, match="rank 0: failed 10 times in a row; it is not started"
        ):
            Group.join(replace(launch, incarnation=2), timeout_s=250.0)
        group.check(2)
