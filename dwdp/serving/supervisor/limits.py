"""What a rank takes, by its own word, and what no rank of the group will ever take."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

DEFAULT_MAX_RUNNING = 64
"""Sequences generated at a time by a rank that does not say."""


@dataclass(frozen=True)
class RankLimits:
    """Limits of one rank, or the widest of several.

    Attributes:
        max_running: sequences that it generates at a time.
        max_waiting: sequences that may wait in it besides; None: it sets no limit.
        max_sequence_length: tokens of a prompt and its answer together; None: it does not say.
    """

    max_running: int = DEFAULT_MAX_RUNNING
    max_waiting: int | None = None
    max_sequence_length: int | None = None

    @classmethod
    def of(cls, stats: Mapping[str, Any]) -> RankLimits:
        """As a rank reported them. What it left out, or got wrong, is unlimited or the default."""
        limits = stats.get("limits")
        limits = limits if isinstance(limits, dict) else {}
        return cls(
            _count(limits.get("max_running"), at_least=1) or DEFAULT_MAX_RUNNING,
            _count(limits.get("max_waiting"), at_least=0),
            _count(limits.get("max_sequence_length"), at_least=1),
        )

    @property
    def window(self) -> int:
        """Sequences that keep the rank busy: those it generates at a time, and a quarter more to go on with.

        Never more than it lets wait.
        """
        reserve = math.ceil(self.max_running / 4)
        if self.max_waiting is not None:
            reserve = min(reserve, self.max_waiting)
        return self.max_running + reserve

    @property
    def capacity(self) -> int | None:
        """Sequences that the rank holds at most; None: it sets no limit."""
        return None if self.max_waiting is None else self.max_running + self.max_waiting

    def can_hold(self, num_sequences: int) -> bool:
        """Whether so many are not refused, given that there is nothing else."""
        return self.capacity is None or num_sequences <= self.capacity


def widest_limits(of_ranks: Iterable[RankLimits | None]) -> RankLimits:
    """What at least one of the ranks may take.

    Ranks of a group are started alike, so those that have said something speak for those that have not yet
    (None). If none has, there are no limits.
    """
    told = [limits for limits in of_ranks if limits is not None]
    if not told:
        return RankLimits()
    widest = max(told, key=lambda limits: math.inf if limits.capacity is None else limits.capacity)
    lengths = [limits.max_sequence_length for limits in told]
    longest = None if None in lengths else max(length for length in lengths if length is not None)
    return RankLimits(widest.max_running, widest.max_waiting, longest)


def _count(value: object, *, at_least: int) -> int | None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= at_least
    return value if is_count else None  # type: ignore[return-value]
