"""A peer that is killed, and a device that is full: the others go on, and so does the process."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from gpu_support import needs_gpu
from rank_jobs import (
    attach_large,
    drop_runtimes,
    fill_memory,
    free_device_bytes,
    free_memory,
    keep_runtimes,
    still_computes,
    verified_forwards,
)
from rank_pool import RankPool

pytestmark = needs_gpu
MIB = 1 << 20


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(3)
    yield pool
    pool.close()


def test_a_full_device_leaves_the_process_usable(ranks: RankPool) -> None:
    """The resident experts of two ranks (512 MiB in all) fit, their slots (256 MiB) do not."""
    # Brings kernels and contexts onto the device, which would take memory later otherwise.
    assert ranks.run(attach_large, size=2) == ["", ""]
    before = ask(ranks, 0, free_device_bytes)
    ask(ranks, 0, fill_memory, 640 * MIB)
    failures = ranks.run(attach_large, size=2)
    assert all(failures)
    assert any("FabricError" in text and "memory" in text.lower() for text in failures), failures
    ask(ranks, 0, free_memory)

    assert [ask(ranks, rank, still_computes) for rank in (0, 1)] == [499500.0] * 2
    assert abs(ask(ranks, 0, free_device_bytes) - before) < 64 * MIB
    assert ranks.run(attach_large, size=2) == ["", ""]


def test_a_killed_peer_stops_nobody(ranks: RankPool) -> None:
    ranks.run(keep_runtimes, ("staged", "direct", "demand"))
    survivors, victim = (0, 1), 2
    for rank in (*survivors, victim):
        ranks.submit(rank, verified_forwards, 1)
    for rank in (*survivors, victim):
        assert ranks.heard(rank) == "started"
    # All of them are in the midst of fetching from each other.
    ranks.kill(victim)
    time.sleep(0.5)
    for rank in survivors:
        ranks.stop(rank)
        assert ranks.result(rank) > 0
    # Its memory stays where it is for those who mapped it, long after its death.
    for rank in survivors:
        ranks.submit(rank, verified_forwards, 50)
    for rank in survivors:
        assert ranks.heard(rank) == "started"
        ranks.stop(rank)
        assert ranks.result(rank) >= 50
    for rank in survivors:
        ask(ranks, rank, drop_runtimes)


def ask(ranks: RankPool, rank: int, job: object, *arguments: object) -> object:
    """Run a job on one rank alone."""
    ranks.submit(rank, job, *arguments)
    return ranks.result(rank)
