"""Bytes: what the composite tensor of an expert tensor is made of, on every rank.

An expert tensor has shape ``[num_experts, ...]``, with ``expert_bytes`` per expert: expert e is the
bytes ``[e * expert_bytes, (e + 1) * expert_bytes)`` of the composite tensor on every rank. Memory
is mapped in pages of ``granularity`` bytes, and a region of memory only as a whole. Therefore:

* the *coverage* of a rank is its resident experts, widened to whole pages;
* the ends of all ranks' coverages cut the composite tensor into *pieces*, each wholly inside or
  wholly outside the coverage of any rank. A rank allocates one region for each piece it covers, and
  a peer can map just the pieces it needs;
* bytes of a covered page that belong to experts the rank does not hold are its *edges*. They are
  copied from their source once, when the rank attaches: weights never change;
* what a rank does not cover are its *slot parts*, backed by a staging slot and filled by a fetch.

Three experts of 5 bytes on two ranks, pages of 4 bytes (``-`` is padding, in the last page)::

    byte      0       4       8       12      16
    expert    0 0 0 0 0 1 1 1 1 1 2 2 2 2 2 -
    piece     0               1       2

    rank 0 holds experts 0 and 1      stores pieces 0 and 1    edge: bytes 10-11, from rank 1
                                      slot part [12, 16)       fetches bytes 12-14
    rank 1 holds expert 2             stores pieces 1 and 2    edge: bytes 8-9, from rank 0
                                      slot part [0, 8)         fetches bytes 0-7

A tensor that fits a page is covered by every rank: all of it is resident or edge, and nothing is left
to fetch. Such tensors are packed together instead of taking a page each.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from dwdp.placement import Placement


class ByteRange(NamedTuple):
    """Bytes ``start <= byte < stop`` of the composite tensor."""

    start: int
    stop: int


class Edge(NamedTuple):
    """Bytes ``[start, stop)`` of a remote expert in a page that the rank covers."""

    expert: int
    source: int
    start: int
    stop: int


class FetchRange(NamedTuple):
    """Bytes ``[start, stop)`` of a remote expert that every fetch moves."""

    source: int
    expert: int
    start: int
    stop: int


class Segment(NamedTuple):
    """Bytes ``[start, stop)`` are piece ``piece`` of rank ``rank``."""

    start: int
    stop: int
    rank: int
    piece: int


class StagedSegment(NamedTuple):
    """Bytes ``[start, stop)`` are the rank's own piece ``piece``, or part ``slot_part`` of a slot.

    The other one of the two is None.
    """

    start: int
    stop: int
    piece: int | None
    slot_part: int | None


@dataclass(frozen=True)
class TensorLayout:
    """Where the bytes of one expert tensor are, on every rank.

    All offsets are bytes of the composite tensor, and the same on every rank. Made by
    :func:`build_layout`; immutable, so tensors of equal ``expert_bytes`` can share one.

    Attributes:
        placement: who stores which experts.
        expert_bytes: bytes per expert.
        granularity: bytes per page.
        coverage: per rank, the pages that hold any of its resident bytes. Sorted, not touching.
        pieces: tile ``[0, mapped_bytes)``; every one is covered by some rank.
    """

    placement: Placement
    expert_bytes: int
    granularity: int
    coverage: tuple[tuple[ByteRange, ...], ...]
    pieces: tuple[ByteRange, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of the expert tensor."""
        return self.placement.num_experts * self.expert_bytes

    @property
    def mapped_bytes(self) -> int:
        """``total_bytes`` rounded up to whole pages: the addresses a composite tensor takes."""
        return _round_up(self.total_bytes, self.granularity)

    def resident_bytes(self, rank: int) -> int:
        """Memory for the pieces that ``rank`` stores, edges and padding included."""
        return _num_bytes(self.coverage[rank])

    def slot_bytes(self, rank: int) -> int:
        """Memory that this tensor takes in each staging slot of ``rank``, padding included."""
        return _num_bytes(self.slot_parts(rank))

    def rank_pieces(self, rank: int) -> tuple[int, ...]:
        """Which of ``pieces`` the rank stores, ascending."""
        return tuple(
            piece
            for start, stop in self.coverage[rank]
            for piece in range(
                bisect_left(self._piece_starts, start), bisect_left(self._piece_starts, stop)
            )
        )

    def slot_parts(self, rank: int) -> tuple[ByteRange, ...]:
        """The pages that ``rank`` does not cover. Sorted, not touching."""
        ends = [0, *(end for covered in self.coverage[rank] for end in covered), self.mapped_bytes]
        gaps = zip(ends[::2], ends[1::2], strict=True)
        return tuple(ByteRange(start, stop) for start, stop in gaps if start < stop)

    def edges(self, rank: int) -> tuple[Edge, ...]:
        """What ``rank`` copies once into its own pieces, by offset.

        Each source holds its expert as a resident one, so edges can be filled in any order.
        """
        return tuple(
            Edge(expert, source, start, stop)
            for expert, source, start, stop in self._experts_in(rank, self.coverage[rank])
            if source != rank
        )

    def fetch_ranges(self, rank: int) -> tuple[FetchRange, ...]:
        """What ``rank`` copies into a slot at every fetch, by offset.

        With the rank's resident experts and its edges these are all bytes of the tensor, once each.
        """
        return tuple(
            FetchRange(source, expert, start, stop)
            for expert, source, start, stop in self._experts_in(rank, self.slot_parts(rank))
        )

    def staged_segments(self, rank: int) -> tuple[StagedSegment, ...]:
        """What the composite tensor is mapped from when remote experts are staged.

        The segments tile ``[0, mapped_bytes)``, in order.
        """
        own = [StagedSegment(*self.pieces[piece], piece, None) for piece in self.rank_pieces(rank)]
        slot = [
            StagedSegment(start, stop, None, part)
            for part, (start, stop) in enumerate(self.slot_parts(rank))
        ]
        return tuple(sorted(own + slot, key=lambda segment: segment.start))

    def direct_segments(self, rank: int) -> tuple[Segment, ...]:
        """What the composite tensor is mapped from when remote experts are read in place.

        The segments tile ``[0, mapped_bytes)``, in order, one for each piece: the rank's own where
        it has it, else that of the source of most of its bytes. A peer's piece holds that peer's
        edges too, so no rank may read before its sources have filled theirs.
        """
        own = set(self.rank_pieces(rank))
        return tuple(
            Segment(start, stop, rank if piece in own else self._main_source(rank, piece), piece)
            for piece, (start, stop) in enumerate(self.pieces)
        )

    @cached_property
    def _piece_starts(self) -> list[int]:
        return [piece.start for piece in self.pieces]

    def _experts_in(
        self, rank: int, ranges: Iterable[ByteRange]
    ) -> Iterator[tuple[int, int, int, int]]:
        """``(expert, source, start, stop)`` of each expert's bytes in ``ranges``; no padding."""
        size, sources = self.expert_bytes, self.placement.sources[rank]
        for start, stop in ranges:
            stop = min(stop, self.total_bytes)
            for expert in range(start // size, _round_up(stop, size) // size):
                first, end = max(start, expert * size), min(stop, (expert + 1) * size)
                yield expert, sources[expert], first, end

    def _main_source(self, rank: int, piece: int) -> int:
        num_bytes: Counter[int] = Counter()
        for _, source, start, stop in self._experts_in(rank, [self.pieces[piece]]):
            num_bytes[source] += stop - start
        num_ranks = self.placement.num_ranks
        return max(num_bytes, key=lambda source: (num_bytes[source], (rank - source) % num_ranks))


def build_layout(placement: Placement, expert_bytes: int, granularity: int) -> TensorLayout:
    """Lay out an expert tensor of ``expert_bytes`` per expert in pages of ``granularity`` bytes.

    Neither needs to be a multiple of anything.

    Raises:
        ValueError: ``expert_bytes`` or ``granularity`` is below 1.
    """
    if expert_bytes < 1:
        raise ValueError(
            f"expert_bytes is {expert_bytes}: an empty tensor has no experts to distribute. "
            "Leave it out."
        )
    if granularity < 1:
        raise ValueError(f"granularity is {granularity} bytes: use the fabric's page size.")
    coverage = tuple(
        _merge(
            ByteRange(
                start * expert_bytes // granularity * granularity,
                _round_up(stop * expert_bytes, granularity),
            )
            for start, stop in resident
        )
        for resident in placement.resident
    )
    cuts = sorted({end for covered in coverage for piece in covered for end in piece})
    pieces = tuple(map(ByteRange, cuts, cuts[1:]))
    return TensorLayout(placement, expert_bytes, granularity, coverage, pieces)


PACK_ALIGNMENT = 256
"""Bytes; what CUDA's own allocator aligns to, so kernels can rely on it."""


def is_packed(layout: TensorLayout) -> bool:
    """Whether the tensor fits a page, so that it is held whole by every rank, packed with others."""
    return layout.total_bytes <= layout.granularity


def pack(sizes: Sequence[int], granularity: int) -> tuple[tuple[int, ...], int]:
    """Offsets of tensors of ``sizes`` bytes behind each other, and the whole in bytes, in full pages.

    >>> pack([100, 300, 1], 4096)
    ((0, 256, 768), 4096)
    """
    offsets = []
    end = 0
    for size in sizes:
        offsets.append(_round_up(end, PACK_ALIGNMENT))
        end = offsets[-1] + size
    return tuple(offsets), _round_up(end, granularity)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _num_bytes(ranges: Iterable[ByteRange]) -> int:
    return sum(stop - start for start, stop in ranges)


def _merge(ranges: Iterable[ByteRange]) -> tuple[ByteRange, ...]:
    """Sorted ranges, with those that touch or overlap made one."""
    merged: list[ByteRange] = []
    for start, stop in ranges:
        if merged and start <= merged[-1].stop:
            merged[-1] = ByteRange(merged[-1].start, max(stop, merged[-1].stop))
        else:
            merged.append(ByteRange(start, stop))
    return tuple(merged)
