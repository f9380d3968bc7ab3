"""The slices that a fetch is made of, and their order.

A fetch moves one layer's remote experts into a slot. Each source has a lane of its own, and all
lanes run at once. Within a lane, slices of at most ``slice_bytes`` follow each other, one tensor
after the other. Lanes are in rotated order: rank r has the lane of r + 1 first, then r + 2, ...,
modulo the number of ranks. So when every rank starts the slices of its round one lane after the
other, no two of them start on the same source::

    4 ranks    lane 0     lane 1     lane 2
    rank 0     1          2          3
    rank 1     2          3          0
    rank 2     3          0          1
    rank 3     0          1          2

A lane that reads bytes 6-20 of one tensor and 0-4 of the next in slices of 8 is
``[6, 8) [8, 16) [16, 20)`` of the first and ``[0, 4)`` of the second: cuts are at multiples of
``slice_bytes``, so that most slices are aligned and all ranks cut alike.

A plain plan has one lane, reads one source after the other in the order of ranks, and cuts nothing: every
rank starts on the lowest peer. It is what the rest is measured against.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

from dwdp.layout import TensorLayout


class Slice(NamedTuple):
    """``num_bytes`` to be read from ``source``, at byte ``start`` of composite tensor ``tensor``.

    ``tensor`` counts the layer's expert tensors; ``start`` is the same at the source and in the slot.
    """

    source: int
    tensor: int
    start: int
    num_bytes: int


@dataclass(frozen=True)
class FetchPlan:
    """One layer's fetch on one rank.

    Attributes:
        rank: the rank that fetches.
        num_ranks: ranks of the group.
        slice_bytes: the largest slice, in bytes. None: a plain plan, whose slices are not cut.
        lanes: the slices of each source that has any, in rotated order (plain: by rank).
    """

    rank: int
    num_ranks: int
    slice_bytes: int | None
    lanes: tuple[tuple[Slice, ...], ...]

    @property
    def num_bytes(self) -> int:
        """Bytes that one fetch moves."""
        return sum(part.num_bytes for lane in self.lanes for part in lane)

    def rounds(self) -> Iterator[tuple[Slice | None, ...]]:
        """Round k is the k-th slice of each peer's lane, or None where that lane is over.

        A round has ``num_ranks - 1`` entries: entry j is of peer ``(rank + 1 + j) % num_ranks``.
        """
        lanes = {lane[0].source: lane for lane in self.lanes}
        peers = ((self.rank + step) % self.num_ranks for step in range(1, self.num_ranks))
        return zip_longest(*(lanes.get(peer, ()) for peer in peers))

    def shared_out(self, num_lanes: int) -> list[list[Slice]]:
        """The slices of each of ``num_lanes`` lanes of a copy engine, in order.

        Sources share a lane when there are more sources than lanes; their slices then alternate. A plain
        plan uses the first lane only.
        """
        lanes: list[list[Slice]] = [[] for _ in range(num_lanes)]
        if self.slice_bytes is None:
            lanes[0].extend(part for lane in self.lanes for part in lane)
            return lanes
        for entries in self.rounds():
            for position, part in enumerate(entries):
                if part is not None:
                    lanes[position % num_lanes].append(part)
        return lanes


def build_fetch_plan(
    rank: int, layouts: Sequence[TensorLayout], slice_bytes: int | None
) -> FetchPlan:
    """Plan the fetch of a layer whose expert tensors have ``layouts``, in this order.

    Args:
        slice_bytes: the largest slice; None makes a plain plan.

    Raises:
        ValueError: no layouts, layouts of groups of different size, a rank outside the group, or
            ``slice_bytes`` below 1.
    """
    if not layouts:
        raise ValueError("A fetch plan needs the layout of at least one expert tensor.")
    num_ranks = layouts[0].placement.num_ranks
    for tensor, layout in enumerate(layouts):
        if layout.placement.num_ranks != num_ranks:
            raise ValueError(
                f"Expert tensor {tensor} is laid out for {layout.placement.num_ranks} ranks, "
                f"expert tensor 0 for {num_ranks}: one fetch serves one group."
            )
    if not 0 <= rank < num_ranks:
        raise ValueError(f"Rank {rank} is not in a group of {num_ranks} ranks.")
    if slice_bytes is not None and slice_bytes < 1:
        raise ValueError(f"slice_bytes is {slice_bytes}: use at least 1.")

    first = 0 if slice_bytes is None else rank + 1
    lanes: dict[int, list[Slice]] = {(first + step) % num_ranks: [] for step in range(num_ranks)}
    for tensor, layout in enumerate(layouts):
        for source, start, stop in _runs(layout, rank):
            while start < stop:
                end = stop
                if slice_bytes is not None:
                    end = min(stop, (start // slice_bytes + 1) * slice_bytes)
                lanes[source].append(Slice(source, tensor, start, end - start))
                start = end
    return FetchPlan(
        rank, num_ranks, slice_bytes, tuple(tuple(lane) for lane in lanes.values() if lane)
    )


def _runs(layout: TensorLayout, rank: int) -> list[tuple[int, int, int]]:
    """``(source, start, stop)`` by offset: neighbouring fetch ranges of one source made one."""
    runs: list[tuple[int, int, int]] = []
    for source, _, start, stop in layout.fetch_ranges(rank):
        if runs and runs[-1][0] == source and runs[-1][2] == start:
            runs[-1] = (source, runs[-1][1], stop)
        else:
            runs.append((source, start, stop))
    return runs
