"""The ring: which slot a layer is staged in, what is fetched when, and who waits for whom.

A layer's remote experts are read from the slot it was given for good. While layer i computes, the
slots of the layers behind it are being filled; when i is done its slot goes to the next layer that
uses it. Counting is cyclic: the layers at the start of the next forward are fetched while this one
ends.

    num_slots = 2        compute   L0   L1   L2   L3 | L0   L1 ...
                         slot 0    L0---L2        L0-|----L2
                         slot 1         L1---L3      |L1

Two hazards, each held off by one event per slot. Read after write: ``begin`` waits for ``ready``,
recorded by the fetch. Write after read: a fetch waits for ``free``, recorded by ``end``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dwdp.fabric.base import CopyEngine, Event, Fabric


def assign_slots(num_layers: int, num_slots: int) -> tuple[int, ...]:
    """The slot of every layer, so that cyclic neighbours never share one.

    Layers go round the ring in order. Where the last layer would meet the first one in slot 0, it
    moves to another; an odd number of layers cannot do with 2 slots (an odd cycle has no
    2-colouring), so its last layer takes a third.

    >>> assign_slots(4, 2)
    (0, 1, 0, 1)
    >>> assign_slots(5, 2)
    (0, 1, 0, 1, 2)
    >>> assign_slots(7, 3)
    (0, 1, 2, 0, 1, 2, 1)
    """
    if num_slots < 2:
        raise ValueError(f"a ring needs at least 2 slots, not {num_slots}")
    slots = [layer % num_slots for layer in range(num_layers)]
    if num_layers > 1 and slots[-1] == 0:
        slots[-1] = 2 if num_slots == 2 else 1
    return tuple(slots)


@dataclass
class PipelineStats:
    """Counters since the pipeline was made.

    Attributes:
        num_fetches: fetches started.
        fetched_bytes: bytes those fetches move.
        num_waits: times ``begin`` found its fetch unfinished.
        exposed_wait_s: seconds compute stood still because of that.
        num_refetches: fetches started in ``begin`` because layers ran out of order.
    """

    num_fetches: int = 0
    fetched_bytes: int = 0
    num_waits: int = 0
    exposed_wait_s: float = 0.0
    num_refetches: int = 0


@dataclass(frozen=True)
class PreparedLayer:
    """One layer's fetch, laid out by the copy engine, and the bytes it moves."""

    fetch: Any
    num_bytes: int


class Pipeline:
    """Fetches layers ahead of compute, through one slot each.

    ``begin`` and ``end`` are called around every read of a layer's composite tensors, by one thread.
    Layers may run in any order, be skipped or be repeated; in the order 0, 1, 2, ... they find
    their experts fetched.

    Args:
        fabric: makes the events.
        engine: moves the bytes.
        layers: prepared fetches, in the order of the forward.
        slots: the slot of every layer, from :func:`assign_slots`.
    """

    def __init__(
        self,
        fabric: Fabric,
        engine: CopyEngine,
        layers: Sequence[PreparedLayer],
        slots: Sequence[int],
    ) -> None:
        num_slots = max(slots, default=-1) + 1
        self._engine = engine
        self._layers = tuple(layers)
        self._slots = tuple(slots)
        self._next_in_slot = _next_in_slot(slots)
        self._ready: list[Event] = [fabric.event() for _ in range(num_slots)]
        self._free: list[Event] = [fabric.event() for _ in range(num_slots)]
        self._staged: list[int | None] = [None] * num_slots
        self._reader: list[int | None] = [None] * num_slots
        self.stats = PipelineStats()

    @property
    def num_slots(self) -> int:
        return len(self._staged)

    def start(self) -> None:
        """Fill every slot with the first layer that uses it."""
        for slot in range(len(self._staged)):
            self._fetch(self._slots.index(slot))

    def begin(self, layer: int) -> None:
        """Return when ``layer``'s slot may be read."""
        slot = self._slots[layer]
        waited_s = 0.0
        if self._staged[slot] != layer:
            self.stats.num_refetches += 1
            # What was fetched for another layer may still be arriving: it must not overtake this.
            waited_s += self._ready[slot].wait()
            self._free[slot].record()
            self._fetch(layer)
        waited_s += self._ready[slot].wait()
        if waited_s > 0:
            self.stats.num_waits += 1
            self.stats.exposed_wait_s += waited_s
        self._reader[slot] = layer

    def end(self, layer: int) -> None:
        """``layer``'s reads are submitted: its slot may be refilled once they have finished."""
        slot = self._slots[layer]
        self._reader[slot] = None
        following = self._next_in_slot[layer]
        if following != layer:
            self._free[slot].record()
            self._fetch(following)

    def close(self) -> None:
        """Let the copies in flight finish and stop the engine. Idempotent."""
        self._engine.close()

    def _fetch(self, layer: int) -> None:
        slot = self._slots[layer]
        if self._reader[slot] is not None:
            raise RuntimeError(
                f"MoE layer {layer} was started while layer {self._reader[slot]} still reads slot "
                f"{slot}; every begin() needs its end() before another layer of that slot begins"
            )
        prepared = self._layers[layer]
        self._engine.submit(prepared.fetch, after=self._free[slot], done=self._ready[slot])
        self._staged[slot] = layer
        self.stats.num_fetches += 1
        self.stats.fetched_bytes += prepared.num_bytes


def _next_in_slot(slots: Sequence[int]) -> tuple[int, ...]:
    """For every layer, the layer that uses its slot next, counting cyclically."""
    following = [0] * len(slots)
    upcoming: dict[int, int] = {}
    for layer in reversed(range(2 * len(slots))):
        index = layer % len(slots)
        following[index] = upcoming.get(slots[index], index)
        upcoming[slots[index]] = index
    return tuple(following)
