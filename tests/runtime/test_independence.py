"""Invariants 1 and 6: after attach, no rank waits for another, stopped or dead."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from rank_process import Rank

from dwdp.rendezvous import serve_store

NUM_RANKS = 3


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The ranks' folder for temporary files, theirs alone."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@pytest.fixture(params=["staged", "direct"])
def ranks(request: pytest.FixtureRequest, temporary: Path) -> Iterator[list[Rank]]:
    store = serve_store("127.0.0.1", 0, NUM_RANKS)
    started = [Rank(rank, NUM_RANKS, store.port, request.param) for rank in range(NUM_RANKS)]
    try:
        assert [rank.read() for rank in started] == ["attached"] * NUM_RANKS
        yield started
    finally:
        for rank in started:
            rank.process.kill()
            rank.process.wait()


@pytest.mark.timeout(180)
def test_a_stopped_or_dead_rank_stops_nobody(ranks: list[Rank], temporary: Path) -> None:
    ranks[1].process.send_signal(signal.SIGSTOP)
    for rank in (ranks[0], ranks[2]):
        rank.ask(50)
    assert all(rank.read().startswith("forwards") for rank in (ranks[0], ranks[2]))

    # The stopped one goes on as if nothing had been.
    ranks[1].process.send_signal(signal.SIGCONT)
    ranks[1].ask(5)
    assert ranks[1].read().startswith("forwards")

    # Its memory outlives it in the others: they read the right bytes (the workers compare them).
    ranks[1].process.kill()
    ranks[1].process.wait()
    for rank in (ranks[0], ranks[2]):
        rank.ask(50)
    assert all(rank.read().startswith("forwards") for rank in (ranks[0], ranks[2]))
    assert ranks[0].end() == "detached"
    assert ranks[0].process.returncode == 0

    # Killed ranks leave no file and no socket.
    assert sockets(ranks), "a rank that runs can be seen"
    ranks[2].process.kill()
    ranks[2].process.wait()
    assert sockets(ranks) == set()
    assert list(temporary.iterdir()) == []
    assert files(ranks) == set()


# Others on this machine may be using dwdp as well: what belongs to these ranks has their process ids.


def files(ranks: list[Rank]) -> set[str]:
    """Files of these ranks where shared memory and temporary files usually are."""
    pids = "|".join(str(rank.process.pid) for rank in ranks)
    own = re.compile(rf"dwdp.*\b({pids})\b")
    paths = [path for folder in ("/dev/shm", "/tmp") for path in Path(folder).iterdir()]
    return {str(path) for path in paths if own.search(path.name)}


def sockets(ranks: list[Rank]) -> set[str]:
    """Unix sockets of these ranks."""
    names = {row.split()[-1] for row in Path("/proc/net/unix").read_text().splitlines()}
    owners = tuple(f"@dwdp-{rank.process.pid}-" for rank in ranks)
    return {name for name in names if name.startswith(owners)}
