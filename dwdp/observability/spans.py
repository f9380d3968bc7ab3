"""What a rank did when: the stretches of time that the live page and traces draw, one row per lane."""

from __future__ import annotations

from array import array
from typing import NamedTuple

COMPUTE = "compute"
"""Forwards of the model."""

EXPOSED_WAIT = "exposed wait"
"""Times compute stood still because a fetch had not finished."""

DEMAND_LANE = "fetch on demand"


def fetch_lane(lane: int) -> str:
    """The name of the copy engine's lane number ``lane``."""
    return f"fetch {lane}"


class Span(NamedTuple):
    """A stretch of time of one rank.

    Attributes:
        lane: whose: :func:`fetch_lane`, ``DEMAND_LANE``, ``EXPOSED_WAIT`` or ``COMPUTE``.
        start_s, end_s: on this process's monotonic clock (``time.monotonic``).
        layer: MoE layer, counted from 0 in the order of the forward; -1 for a whole forward.
        num_bytes: copied meanwhile.
    """

    lane: str
    start_s: float
    end_s: float
    layer: int
    num_bytes: int


class WaitLog:
    """The last waits of one thread, in memory taken once. Another thread may read them."""

    def __init__(self, capacity: int = 1024) -> None:
        self._capacity = capacity
        self._layers = array("q", bytes(8 * capacity))
        self._starts_s = array("d", bytes(8 * capacity))
        self._ends_s = array("d", bytes(8 * capacity))
        self._num_recorded = 0
        self._num_drained = 0

    def record(self, layer: int, start_s: float, end_s: float) -> None:
        """Note a wait for ``layer``; the oldest one makes room."""
        index = self._num_recorded % self._capacity
        self._layers[index] = layer
        self._starts_s[index] = start_s
        self._ends_s[index] = end_s
        self._num_recorded += 1

    def drain(self) -> list[Span]:
        """The waits since the last call that are still there, in order."""
        num_recorded = self._num_recorded
        first = max(self._num_drained, num_recorded - self._capacity)
        self._num_drained = num_recorded
        spans = [
            Span(EXPOSED_WAIT, self._starts_s[index], self._ends_s[index], self._layers[index], 0)
            for index in (number % self._capacity for number in range(first, num_recorded))
        ]
        # What has been overwritten meanwhile is of two waits, and one more may be on its way.
        first_whole = self._num_recorded - self._capacity + 1
        return spans[max(0, first_whole - first) :]
