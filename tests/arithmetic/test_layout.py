"""The bytes of a composite tensor: every one exactly once, at any page size."""

from __future__ import annotations

import pytest
from arithmetic_cases import layouts
from hypothesis import given
from hypothesis import strategies as st

from dwdp.layout import (
    PACK_ALIGNMENT,
    ByteRange,
    Edge,
    FetchRange,
    Segment,
    StagedSegment,
    TensorLayout,
    build_layout,
    pack,
)
from dwdp.placement import build_placement


def assert_tiles(ranges: list[tuple[int, int]], stop: int) -> None:
    """``ranges``, in any order, cover ``[0, stop)`` without a gap or an overlap."""
    at = 0
    for first, end in sorted(ranges):
        assert first == at
        assert end > first
        at = end
    assert at == stop


def resident_ranges(layout: TensorLayout, rank: int) -> list[tuple[int, int]]:
    return [
        (start * layout.expert_bytes, stop * layout.expert_bytes)
        for start, stop in layout.placement.resident[rank]
    ]


def test_worked_example() -> None:
    layout = build_layout(build_placement(3, 2), expert_bytes=5, granularity=4)
    assert (layout.total_bytes, layout.mapped_bytes) == (15, 16)
    assert layout.coverage == ((ByteRange(0, 12),), (ByteRange(8, 16),))
    assert layout.pieces == (ByteRange(0, 8), ByteRange(8, 12), ByteRange(12, 16))

    assert layout.rank_pieces(0) == (0, 1)
    assert layout.edges(0) == (Edge(expert=2, source=1, start=10, stop=12),)
    assert layout.slot_parts(0) == (ByteRange(12, 16),)
    assert layout.fetch_ranges(0) == (FetchRange(source=1, expert=2, start=12, stop=15),)
    assert (layout.resident_bytes(0), layout.slot_bytes(0)) == (12, 4)

    assert layout.rank_pieces(1) == (1, 2)
    assert layout.edges(1) == (Edge(expert=1, source=0, start=8, stop=10),)
    assert layout.slot_parts(1) == (ByteRange(0, 8),)
    assert layout.fetch_ranges(1) == (
        FetchRange(source=0, expert=0, start=0, stop=5),
        FetchRange(source=0, expert=1, start=5, stop=8),
    )
    assert (layout.resident_bytes(1), layout.slot_bytes(1)) == (8, 8)

    assert layout.staged_segments(1) == (
        StagedSegment(0, 8, piece=None, slot_part=0),
        StagedSegment(8, 12, piece=1, slot_part=None),
        StagedSegment(12, 16, piece=2, slot_part=None),
    )
    assert layout.direct_segments(1) == (
        Segment(0, 8, rank=0, piece=0),
        Segment(8, 12, rank=1, piece=1),
        Segment(12, 16, rank=1, piece=2),
    )


def test_one_rank_holds_it_all() -> None:
    layout = build_layout(build_placement(3, 1), expert_bytes=5, granularity=4)
    assert layout.pieces == (ByteRange(0, 16),)
    assert layout.staged_segments(0) == (StagedSegment(0, 16, piece=0, slot_part=None),)
    assert layout.direct_segments(0) == (Segment(0, 16, rank=0, piece=0),)
    assert layout.edges(0) == ()
    assert layout.slot_parts(0) == ()
    assert layout.fetch_ranges(0) == ()
    assert layout.slot_bytes(0) == 0


def test_full_replication_has_no_remote_bytes() -> None:
    layout = build_layout(build_placement(4, 3, num_experts_per_worker=4), 7, 8)
    for rank in range(3):
        assert layout.direct_segments(rank) == (Segment(0, 32, rank=rank, piece=0),)
        assert layout.edges(rank) == ()
        assert layout.fetch_ranges(rank) == ()


def test_a_tensor_smaller_than_a_page_is_all_resident_or_edge() -> None:
    layout = build_layout(build_placement(4, 2), expert_bytes=2, granularity=4096)
    for rank in range(2):
        assert layout.coverage[rank] == (ByteRange(0, 4096),)
        assert layout.slot_parts(rank) == ()
        assert layout.fetch_ranges(rank) == ()
    assert layout.edges(0) == (Edge(2, 1, 4, 6), Edge(3, 1, 6, 8))
    assert layout.edges(1) == (Edge(0, 0, 0, 2), Edge(1, 0, 2, 4))


def test_two_resident_ranges_that_share_a_page_are_covered_as_one() -> None:
    placement = build_placement(8, 2, num_experts_per_worker=7)
    assert placement.resident[1] == ((0, 3), (4, 8))
    layout = build_layout(placement, expert_bytes=2, granularity=4)
    assert layout.coverage[1] == (ByteRange(0, 16),)
    assert layout.edges(1) == (Edge(expert=3, source=0, start=6, stop=8),)
    assert layout.slot_parts(1) == ()


def test_wrapped_resident_experts_leave_one_slot_part_between_them() -> None:
    layout = build_layout(build_placement(8, 2, num_experts_per_worker=5), 4, 4)
    assert layout.coverage[1] == (ByteRange(0, 4), ByteRange(16, 32))
    assert layout.slot_parts(1) == (ByteRange(4, 16),)
    assert [(s.piece, s.slot_part) for s in layout.staged_segments(1)] == [
        (0, None),
        (None, 0),
        (2, None),
        (3, None),
    ]


def test_a_shared_piece_is_read_from_the_source_of_most_of_its_bytes() -> None:
    placement = build_placement(256, 4, num_experts_per_worker=96)
    layout = build_layout(placement, expert_bytes=8, granularity=8)
    shared = layout.pieces.index(ByteRange(128 * 8, 160 * 8))
    reads = [placement.sources[0][expert] for expert in range(128, 160)]
    assert reads.count(1) > reads.count(2) > 0
    assert layout.direct_segments(0)[shared].rank == 1


@pytest.mark.parametrize(
    ("expert_bytes", "granularity", "message"),
    [(0, 4, "expert_bytes is 0"), (-1, 4, "expert_bytes is -1"), (5, 0, "granularity is 0")],
)
def test_sizes_below_one_are_refused(expert_bytes: int, granularity: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_layout(build_placement(3, 2), expert_bytes, granularity)


@given(layouts())
def test_pieces_tile_the_tensor_and_are_wholly_covered_or_not_at_all(layout: TensorLayout) -> None:
    assert layout.total_bytes <= layout.mapped_bytes < layout.total_bytes + layout.granularity
    assert_tiles(list(layout.pieces), layout.mapped_bytes)
    covered_by_some: set[int] = set()
    for start, stop in layout.pieces:
        assert start % layout.granularity == 0
        assert stop % layout.granularity == 0
    for rank in range(layout.placement.num_ranks):
        touched = [
            byte // layout.granularity
            for start, stop in resident_ranges(layout, rank)
            for byte in range(start, stop)
        ]
        for piece, (start, stop) in enumerate(layout.pieces):
            pages = set(range(start // layout.granularity, stop // layout.granularity))
            covered = pages & set(touched)
            assert covered in (set(), pages)
            assert (piece in layout.rank_pieces(rank)) == bool(covered)
        covered_by_some.update(layout.rank_pieces(rank))
    assert covered_by_some == set(range(len(layout.pieces)))


@given(layouts())
def test_resident_edge_and_fetched_bytes_are_the_tensor(layout: TensorLayout) -> None:
    placement = layout.placement
    for rank in range(placement.num_ranks):
        edges, fetched = layout.edges(rank), layout.fetch_ranges(rank)
        remote: list[Edge | FetchRange] = [*edges, *fetched]
        for part in remote:
            assert part.source == placement.sources[rank][part.expert] != rank
            assert part.expert * layout.expert_bytes <= part.start
            assert part.stop <= (part.expert + 1) * layout.expert_bytes
        assert_tiles(
            resident_ranges(layout, rank) + [(part.start, part.stop) for part in remote],
            layout.total_bytes,
        )
        covered, slots = layout.coverage[rank], layout.slot_parts(rank)
        assert all(any(a <= e.start and e.stop <= b for a, b in covered) for e in edges)
        assert all(any(a <= f.start and f.stop <= b for a, b in slots) for f in fetched)


@given(layouts())
def test_segments_tile_the_composite_tensor(layout: TensorLayout) -> None:
    for rank in range(layout.placement.num_ranks):
        own = layout.rank_pieces(rank)

        direct = layout.direct_segments(rank)
        assert list(direct) == sorted(direct)
        assert_tiles([(s.start, s.stop) for s in direct], layout.mapped_bytes)
        for segment in direct:
            assert layout.pieces[segment.piece] == (segment.start, segment.stop)
            assert segment.piece in layout.rank_pieces(segment.rank)
            assert (segment.rank == rank) == (segment.piece in own)

        staged = layout.staged_segments(rank)
        assert_tiles([(s.start, s.stop) for s in staged], layout.mapped_bytes)
        assert [s.piece for s in staged if s.piece is not None] == list(own)
        parts = [(s.start, s.stop) for s in staged if s.slot_part is not None]
        assert parts == list(layout.slot_parts(rank))
        for start, stop, piece, slot_part in staged:
            assert (piece is None) != (slot_part is None)
            if piece is not None:
                assert layout.pieces[piece] == (start, stop)

        sizes = [stop - start for start, stop in (layout.pieces[piece] for piece in own)]
        assert layout.resident_bytes(rank) == sum(sizes)
        assert layout.resident_bytes(rank) + layout.slot_bytes(rank) == layout.mapped_bytes


@pytest.mark.parametrize("expert_bytes", [24 << 20, 7168 * 2 + 2, 4])
def test_the_largest_group(expert_bytes: int) -> None:
    layout = build_layout(build_placement(256, 72), expert_bytes, 2 << 20)
    for rank in range(72):
        remote: list[Edge | FetchRange] = [*layout.edges(rank), *layout.fetch_ranges(rank)]
        assert_tiles(
            resident_ranges(layout, rank) + [(part.start, part.stop) for part in remote],
            layout.total_bytes,
        )
        assert_tiles([(s.start, s.stop) for s in layout.direct_segments(rank)], layout.mapped_bytes)


@given(
    sizes=st.lists(st.integers(1, 5000), max_size=20),
    granularity=st.sampled_from([4096, 65536, 2 << 20]),
)
def test_packed_tensors_are_aligned_and_do_not_overlap(sizes: list[int], granularity: int) -> None:
    offsets, num_bytes = pack(sizes, granularity)
    assert all(offset % PACK_ALIGNMENT == 0 for offset in offsets)
    ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
    assert all(end <= start for end, start in zip(ends, offsets[1:], strict=False))
    assert num_bytes % granularity == 0
    assert max(ends, default=0) <= num_bytes < max(ends, default=0) + granularity
