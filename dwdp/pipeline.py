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

A step of few tokens may fetch *on demand* instead: ``begin`` is given the router's choice and fetches
just the activated experts, in compute order, so that neither hazard arises. Such a slot then holds no
whole layer, and the next step that is staged fetches anew.

Compute that is captured into a graph runs again later without this module's knowledge. From the first
capture on, no forward relies on what an earlier one left in the slots: each fetches all it reads. A
graph therefore has to hold a whole forward.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dwdp.config import DwdpConfig
from dwdp.fabric.base import CopyEngine, Event, Fabric
from dwdp.observability.spans import Span, WaitLog

if TYPE_CHECKING:
    import torch


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


def layer_slots(num_layers: int, config: DwdpConfig) -> tuple[int, ...]:
    """The slot of every layer that ``config`` asks for: one for all where nothing is fetched ahead."""
    if config.fetch_mode == "demand":
        return (0,) * num_layers
    return assign_slots(num_layers, config.num_slots)


@dataclass(frozen=True)
class PipelineStats:
    """Counters since the pipeline was made. Compute that is replayed from a graph is not counted.

    Attributes:
        num_fetches: fetches of whole layers started.
        num_demands: fetches of activated experts.
        fetched_bytes: bytes all of those move.
        num_waits: times ``begin`` found a fetch unfinished.
        exposed_wait_s: seconds compute stood still because of that, or during a fetch on demand.
    """

    num_fetches: int = 0
    num_demands: int = 0
    fetched_bytes: int = 0
    num_waits: int = 0
    exposed_wait_s: float = 0.0


@dataclass(frozen=True)
class PreparedLayer:
    """One layer's fetch, laid out by the copy engine.

    Attributes:
        fetch: of all remote experts.
        num_bytes: what that moves.
        demand: of activated experts; None where nothing is fetched on demand.
    """

    fetch: Any
    num_bytes: int
    demand: Any = None


class Pipeline:
    """Fetches layers ahead of compute, through one slot each.

    ``begin`` and ``end`` are called around every read of a layer's composite tensors, by one thread.
    Layers may run in any order, be skipped or be repeated; in the order 0, 1, 2, ... they find
    their experts fetched. A layer whose tokens are computed in parts, on several streams, begins once
    in each part and ends once, where the streams have joined.

    Args:
        fabric: makes the events.
        engine: moves the bytes.
        layers: prepared fetches, in the order of the forward.
        slots: the slot of every layer, from :func:`layer_slots`.
        demand_max_tokens: steps of at most this many tokens fetch on demand, if their router's choice
            is given: 0 for none, ``inf`` for all.
    """

    def __init__(
        self,
        fabric: Fabric,
        engine: CopyEngine,
        layers: Sequence[PreparedLayer],
        slots: Sequence[int],
        demand_max_tokens: float = 0,
    ) -> None:
        num_slots = max(slots, default=-1) + 1
        self._fabric = fabric
        self._engine = engine
        self._layers = tuple(layers)
        self._slots = tuple(slots)
        self._demand_max_tokens = demand_max_tokens
        self._next_in_slot = _next_in_slot(slots)
        self._ready: list[Event] = [fabric.event() for _ in range(num_slots)]
        self._free: list[Event] = [fabric.event() for _ in range(num_slots)]
        self._staged: list[int | None] = [None] * num_slots
        self._reader: list[int | None] = [None] * num_slots
        self._on_demand = [False] * num_slots
        self._previous_layer = -1
        self._is_capturing = False
        self._has_captured = False
        self._num_fetches = self._num_demands = self._staged_bytes = 0
        self._waits = WaitLog()

    @property
    def num_slots(self) -> int:
        return len(self._staged)

    @property
    def stats(self) -> PipelineStats:
        """Counters so far. Reading them may wait for compute that was submitted."""
        return PipelineStats(
            num_fetches=self._num_fetches,
            num_demands=self._num_demands,
            fetched_bytes=self._staged_bytes + self._engine.demanded_bytes,
            num_waits=sum(event.num_waits for event in self._ready),
            exposed_wait_s=sum((event.waited_s for event in self._ready), 0.0)
            + self._engine.demand_waited_s,
        )

    def drain_spans(self) -> list[Span]:
        """When lanes copied and when ``begin`` stood still, since the last call. For any thread.

        Waits on the device, and copies of an engine that cannot tell, are not in it.
        """
        return self._engine.drain_spans() + self._waits.drain()

    def start(self) -> None:
        """Fill every slot with the first layer that uses it."""
        for slot in range(len(self._staged)):
            self._fetch(self._slots.index(slot))

    def begin(self, layer: int, indices: torch.Tensor | None = None) -> None:
        """Return when ``layer``'s slot may be read, or will be when compute comes to it.

        Args:
            indices: the router's choice of this step, ``[tokens, top_k]``, int32 or int64, on the
                compute device. Without it nothing is fetched on demand.
        """
        slot = self._slots[layer]
        if self._reader[slot] == layer:
            self._join(layer)
            return
        self._check_free(layer)
        self._notice_forward(layer)
        self._on_demand[slot] = (
            indices is not None
            and indices.numel() <= self._demand_max_tokens * indices.shape[-1]
            and self._layers[layer].demand is not None
        )
        if self._staged[slot] != layer and self._on_demand[slot]:
            self._wait_until_ready(slot, layer)
            waited_s = self._engine.fetch_activated(self._layers[layer].demand, indices)  # type: ignore[arg-type]
            self._note_wait(layer, waited_s)
            self._staged[slot] = None
            self._num_demands += 1
        else:
            if self._staged[slot] != layer:
                self._refetch(layer)
            self._wait_until_ready(slot, layer)
        self._reader[slot] = layer

    def end(self, layer: int) -> None:
        """``layer``'s reads are submitted: its slot may be refilled once they have finished."""
        slot = self._slots[layer]
        self._reader[slot] = None
        following = self._next_in_slot[layer]
        is_last_use = following <= layer
        if self._on_demand[slot] or following == layer or (is_last_use and self._has_captured):
            return
        self._free[slot].record()
        self._fetch(following)

    def close(self) -> None:
        """Let the copies in flight finish and stop the engine. Idempotent."""
        self._engine.close()

    def _join(self, layer: int) -> None:
        """Let another part of a layer that has begun read what was fetched for the first one."""
        slot = self._slots[layer]
        if self._staged[slot] != layer:
            raise RuntimeError(
                f"only the experts that the first part of MoE layer {layer} chose were fetched: begin a "
                "layer that is computed in parts without indices"
            )
        self._wait_until_ready(slot, layer)

    def _check_free(self, layer: int) -> None:
        reader = self._reader[self._slots[layer]]
        if reader is not None:
            raise RuntimeError(
                f"MoE layer {layer} was started while layer {reader} still reads slot "
                f"{self._slots[layer]}; every begin() needs its end() before another layer of that "
                "slot begins"
            )

    def _notice_forward(self, layer: int) -> None:
        """Forget what the slots hold where a graph may have overwritten it since."""
        is_capturing = self._fabric.is_capturing()
        follows = layer == self._previous_layer + 1
        is_new_forward = not follows or is_capturing != self._is_capturing
        self._previous_layer = layer
        self._is_capturing = is_capturing
        self._has_captured = self._has_captured or is_capturing
        if self._has_captured and is_new_forward:
            self._staged = [None] * len(self._staged)

    def _refetch(self, layer: int) -> None:
        """Fetch a layer that did not come next, and into each slot that holds nothing its next one."""
        slots_met: set[int] = set()
        for upcoming in range(layer, len(self._slots)):
            slot = self._slots[upcoming]
            if slot in slots_met:
                continue
            slots_met.add(slot)
            if upcoming == layer or (self._staged[slot] is None and self._reader[slot] is None):
                # What was fetched for another layer may still be arriving: it must not overtake this.
                self._wait_until_ready(slot, layer)
                self._free[slot].record()
                self._fetch(upcoming)

    def _wait_until_ready(self, slot: int, layer: int) -> None:
        self._note_wait(layer, self._ready[slot].wait())

    def _note_wait(self, layer: int, waited_s: float) -> None:
        if waited_s > 0:
            now_s = time.monotonic()
            self._waits.record(layer, now_s - waited_s, now_s)

    def _fetch(self, layer: int) -> None:
        slot = self._slots[layer]
        self._check_free(layer)
        prepared = self._layers[layer]
        self._engine.submit(prepared.fetch, after=self._free[slot], done=self._ready[slot])
        self._staged[slot] = layer
        self._num_fetches += 1
        self._staged_bytes += prepared.num_bytes


def _next_in_slot(slots: Sequence[int]) -> tuple[int, ...]:
    """For every layer, the layer that uses its slot next, counting cyclically."""
    following = [0] * len(slots)
    upcoming: dict[int, int] = {}
    for layer in reversed(range(2 * len(slots))):
        index = layer % len(slots)
        following[index] = upcoming.get(slots[index], index)
        upcoming[slots[index]] = index
    return tuple(following)
