"""What is known about each rank: its state, how to reach it, what it reported last."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dwdp.serving.supervisor.limits import RankLimits, widest_limits
from dwdp.serving.supervisor.link import RankLink


class RankState(enum.Enum):
    """Life of a rank process."""

    STARTING = "starting"
    READY = "ready"
    UNRESPONSIVE = "unresponsive"
    """It runs but does not answer (stopped, swapped out): it keeps its streams and gets nothing new."""
    DRAINING = "draining"
    """It finishes what it has, and takes nothing new."""
    DEAD = "dead"
    GIVEN_UP = "given up"
    """It is not started again, unless the whole group starts anew."""

    @property
    def holds_memory(self) -> bool:
        """Whether the process has the group's expert memory mapped."""
        return self in (RankState.READY, RankState.UNRESPONSIVE, RankState.DRAINING)


@dataclass
class Rank:
    """One rank, through all its restarts.

    Attributes:
        rank: its number.
        state: of its current process.
        reason: why it is in that state, in a few words; "" where that says itself.
        since_s: monotonic time of the last change of state.
        pid: of the current process; None before the first and after the last.
        num_restarts: processes started in place of one that ended.
        lost_s: monotonic time at which the last process that had been set up ended; None: none has.
        recovery_s: seconds from there to being ready again; None if never lost, or not back yet.
        link: the way to the current process; None while there is none.
        stats: the last answer at ``stats_path``; {} before the first.
        limits: according to it; None before the first. What a process that has ended said of them stays: the
            next one will have the same.
    """

    rank: int
    state: RankState = RankState.STARTING
    reason: str = ""
    since_s: float = field(default_factory=time.monotonic)
    pid: int | None = None
    num_restarts: int = 0
    lost_s: float | None = None
    recovery_s: float | None = None
    link: RankLink | None = None
    stats: dict[str, Any] = field(default_factory=dict)
    limits: RankLimits | None = None

    def note_stats(self, stats: dict[str, Any]) -> None:
        """Keep an answer at ``stats_path``; {}: none yet."""
        self.stats = stats
        self.limits = RankLimits.of(stats) if stats else None


@dataclass
class RankTable:
    """The ranks of one group. Whoever wants to hear of changes adds a function to ``on_change``.

    Attributes:
        on_change: called with a rank after its state has changed, and the state it had before.
        is_watched: whether somebody looks at what the ranks did in the last seconds.
    """

    ranks: tuple[Rank, ...]
    on_change: list[Callable[[Rank, RankState], None]] = field(default_factory=list)
    is_watched: bool = False

    @classmethod
    def of_size(cls, num_ranks: int) -> RankTable:
        return cls(tuple(Rank(number) for number in range(num_ranks)))

    def set_state(self, rank: Rank, state: RankState, reason: str = "") -> None:
        """Note that ``rank`` is in ``state``, and tell who wants to know if that is new."""
        before, rank.reason = rank.state, reason
        if state is before:
            return
        now_s = time.monotonic()
        rank.state, rank.since_s = state, now_s
        if before.holds_memory and not state.holds_memory:
            rank.lost_s, rank.recovery_s = now_s, None
        elif state is RankState.READY and rank.lost_s is not None and rank.recovery_s is None:
            rank.recovery_s = now_s - rank.lost_s
        for listener in self.on_change:
            listener(rank, before)

    def widest_limits(self) -> RankLimits:
        """What at least one rank may take."""
        return widest_limits(rank.limits for rank in self.ranks)

    def holders(self) -> list[int]:
        """Ranks whose process has the group's expert memory mapped."""
        return [rank.rank for rank in self.ranks if rank.state.holds_memory]

    def is_memory_at_risk(self) -> bool:
        """Whether one more loss would take the last mapping of some expert's memory with it.

        Every rank that is set up stores or maps every expert, so the memory of all experts lasts as long
        as one such rank does. A group of one always depends on its one rank, which is no news.
        """
        return len(self.ranks) > 1 and len(self.holders()) == 1
