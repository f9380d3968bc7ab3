"""The slices of a fetch, and whole composite tensors put together from real bytes."""

from __future__ import annotations

import random

import pytest
from arithmetic_cases import Rule, rules
from hypothesis import given, settings
from hypothesis import strategies as st

from dwdp.fetch_plan import FetchPlan, Slice, build_fetch_plan
from dwdp.layout import TensorLayout, build_layout
from dwdp.placement import ExpertRange, Placement, build_placement


@st.composite
def layers(draw: st.DrawFn) -> list[TensorLayout]:
    """The expert tensors of one layer: one placement and page size, experts of several sizes."""
    placement = draw(rules(max_experts=24, max_ranks=7)).build()
    granularity = draw(st.integers(1, 64))
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    return [build_layout(placement, size, granularity) for size in sizes]


def assert_no_source_is_read_twice(plans: list[FetchPlan]) -> None:
    """At each step of each round, the ranks that start a slice start it on different sources."""
    num_ranks = len(plans)
    rounds = [list(plan.rounds()) for plan in plans]
    for number in range(max(map(len, rounds))):
        for step in range(num_ranks - 1):
            sources = []
            for rank in range(num_ranks):
                part = rounds[rank][number][step] if number < len(rounds[rank]) else None
                if part is not None:
                    assert part.source == (rank + 1 + step) % num_ranks
                    sources.append(part.source)
            assert len(sources) == len(set(sources))


def test_worked_example() -> None:
    # Four experts of 10 bytes, one per rank, pages of 4: experts begin at bytes 0, 10, 20, 30.
    layout = build_layout(build_placement(4, 4), expert_bytes=10, granularity=4)
    plan = build_fetch_plan(1, [layout], slice_bytes=8)
    # Rank 1 holds bytes 10-19 and covers pages [8, 20): 8 and 9 are its edge.
    assert plan.lanes == (
        (Slice(2, 0, 20, 4), Slice(2, 0, 24, 6)),
        (Slice(3, 0, 30, 2), Slice(3, 0, 32, 8)),
        (Slice(0, 0, 0, 8),),
    )
    assert plan.num_bytes == 28
    assert list(plan.rounds()) == [
        (Slice(2, 0, 20, 4), Slice(3, 0, 30, 2), Slice(0, 0, 0, 8)),
        (Slice(2, 0, 24, 6), Slice(3, 0, 32, 8), None),
    ]


def test_a_plain_plan_reads_one_source_after_the_other_and_cuts_nothing() -> None:
    placement = build_placement(4, 4)
    layer = [build_layout(placement, expert_bytes, 1) for expert_bytes in (4, 2)]
    for rank in range(4):
        peers = [peer for peer in range(4) if peer != rank]
        wanted = [
            part
            for peer in peers
            for part in (Slice(peer, 0, 4 * peer, 4), Slice(peer, 1, 2 * peer, 2))
        ]
        plan = build_fetch_plan(rank, layer, slice_bytes=None)
        assert [lane[0].source for lane in plan.lanes] == peers
        assert plan.shared_out(1) == [wanted]
        assert plan.shared_out(3) == [wanted, [], []]


def test_sources_that_share_a_lane_alternate() -> None:
    layout = build_layout(build_placement(4, 4), expert_bytes=8, granularity=4)
    plan = build_fetch_plan(0, [layout], slice_bytes=4)
    first, second = plan.shared_out(2)
    assert [part.source for part in first] == [1, 3, 1, 3]
    assert [part.source for part in second] == [2, 2]


def test_lanes_are_in_rotated_order_and_tensors_follow_each_other() -> None:
    placement = build_placement(4, 4)
    layer = [build_layout(placement, expert_bytes, 1) for expert_bytes in (4, 2)]
    for rank in range(4):
        plan = build_fetch_plan(rank, layer, slice_bytes=4)
        assert [lane[0].source for lane in plan.lanes] == [(rank + step) % 4 for step in (1, 2, 3)]
        for lane in plan.lanes:
            assert [part.tensor for part in lane] == [0, 1]


def test_neighbouring_experts_of_one_source_make_one_slice() -> None:
    layout = build_layout(build_placement(6, 2), expert_bytes=10, granularity=1)
    assert build_fetch_plan(0, [layout], slice_bytes=64).lanes == ((Slice(1, 0, 30, 30),),)


def test_resident_experts_between_two_of_one_source_are_not_fetched() -> None:
    placement = Placement(
        num_experts=3,
        num_ranks=2,
        resident=((ExpertRange(1, 2),), (ExpertRange(0, 3),)),
        sources=((1, 0, 1), (1, 1, 1)),
    )
    layout = build_layout(placement, expert_bytes=4, granularity=4)
    plan = build_fetch_plan(0, [layout], slice_bytes=64)
    assert plan.lanes == ((Slice(1, 0, 0, 4), Slice(1, 0, 8, 4)),)


def test_sources_with_nothing_to_read_have_no_lane() -> None:
    # Each rank stores 3 of 5 experts, so it reads 2: from at most two of its three peers.
    placement = build_placement(5, 4, num_experts_per_worker=3)
    layout = build_layout(placement, expert_bytes=4, granularity=4)
    for rank in range(4):
        plan = build_fetch_plan(rank, [layout], slice_bytes=4)
        sources = [lane[0].source for lane in plan.lanes]
        assert len(sources) in (1, 2)
        for entries in plan.rounds():
            assert len(entries) == 3


@pytest.mark.parametrize("rule", [Rule(5, 1), Rule(5, 3, 5)])
def test_nothing_remote_makes_an_empty_plan(rule: Rule) -> None:
    plan = build_fetch_plan(0, [build_layout(rule.build(), 5, 4)], slice_bytes=8)
    assert plan.lanes == ()
    assert plan.num_bytes == 0
    assert list(plan.rounds()) == []


def test_impossible_plans_are_refused() -> None:
    two, three = (build_layout(build_placement(6, n), 5, 4) for n in (2, 3))
    with pytest.raises(ValueError, match="at least one expert tensor"):
        build_fetch_plan(0, [], 8)
    with pytest.raises(ValueError, match="tensor 1 is laid out for 3 ranks, expert tensor 0 for 2"):
        build_fetch_plan(0, [two, three], 8)
    with pytest.raises(ValueError, match="Rank 2 is not in a group of 2"):
        build_fetch_plan(2, [two], 8)
    with pytest.raises(ValueError, match="Rank -1 is not in a group"):
        build_fetch_plan(-1, [two], 8)
    with pytest.raises(ValueError, match="slice_bytes is 0"):
        build_fetch_plan(0, [two], 0)


@given(layers(), st.integers(1, 100))
def test_slices_are_the_fetch_ranges_cut_up(layer: list[TensorLayout], slice_bytes: int) -> None:
    num_ranks = layer[0].placement.num_ranks
    plans = [build_fetch_plan(rank, layer, slice_bytes) for rank in range(num_ranks)]
    for rank, plan in enumerate(plans):
        wanted = [
            (tensor, byte, part.source)
            for tensor, layout in enumerate(layer)
            for part in layout.fetch_ranges(rank)
            for byte in range(part.start, part.stop)
        ]
        slices = [part for lane in plan.lanes for part in lane]
        moved = [
            (part.tensor, part.start + i, part.source)
            for part in slices
            for i in range(part.num_bytes)
        ]
        assert sorted(moved) == wanted
        assert plan.num_bytes == len(wanted)
        for part in slices:
            assert 0 < part.num_bytes <= slice_bytes
            last = part.start + part.num_bytes - 1
            assert part.start // slice_bytes == last // slice_bytes
        for lane in plan.lanes:
            assert lane
            assert len({part.source for part in lane}) == 1
            positions = [(part.tensor, part.start) for part in lane]
            assert positions == sorted(positions)
        in_rounds = [part for entries in plan.rounds() for part in entries if part is not None]
        assert sorted(in_rounds) == sorted(slices)
        assert all(any(entries) for entries in plan.rounds())
    assert_no_source_is_read_twice(plans)


@pytest.mark.parametrize("num_ranks", [2, 3, 8, 36, 71, 72])
def test_every_step_of_a_round_is_a_permutation_where_all_have_slices(num_ranks: int) -> None:
    layout = build_layout(build_placement(2 * num_ranks, num_ranks), 6, 1)
    plans = [build_fetch_plan(rank, [layout], slice_bytes=4) for rank in range(num_ranks)]
    assert_no_source_is_read_twice(plans)
    rounds = [next(plan.rounds()) for plan in plans]
    for step in range(num_ranks - 1):
        sources = [part.source for entries in rounds if (part := entries[step]) is not None]
        assert sorted(sources) == list(range(num_ranks))


class RankBytes:
    """What one rank stores of one expert tensor: a byte array per piece and per slot part."""

    def __init__(self, layout: TensorLayout, rank: int, full: bytes) -> None:
        self.layout = layout
        self.rank = rank
        self.pieces = {
            piece: bytearray(layout.pieces[piece].stop - layout.pieces[piece].start)
            for piece in layout.rank_pieces(rank)
        }
        self.slot = [bytearray(stop - start) for start, stop in layout.slot_parts(rank)]
        for start, stop in layout.placement.resident[rank]:
            for byte in range(start * layout.expert_bytes, stop * layout.expert_bytes):
                self.write_piece(byte, full[byte])

    def _find(self, byte: int) -> tuple[int, int]:
        for piece in self.pieces:
            start, stop = self.layout.pieces[piece]
            if start <= byte < stop:
                return piece, byte - start
        raise AssertionError(f"rank {self.rank} does not store byte {byte}")

    def write_piece(self, byte: int, value: int) -> None:
        piece, offset = self._find(byte)
        assert self.pieces[piece][offset] == 0, f"byte {byte} is written twice"
        self.pieces[piece][offset] = value

    def read_piece(self, byte: int) -> int:
        piece, offset = self._find(byte)
        assert self.pieces[piece][offset] != 0, f"byte {byte} is read before it is there"
        return self.pieces[piece][offset]

    def write_slot(self, byte: int, value: int) -> None:
        for part, (start, stop) in enumerate(self.layout.slot_parts(self.rank)):
            if start <= byte < stop:
                assert self.slot[part][byte - start] == 0, f"byte {byte} is written twice"
                self.slot[part][byte - start] = value
                return
        raise AssertionError(f"byte {byte} is in no slot part of rank {self.rank}")

    def staged(self) -> bytes:
        parts = []
        for segment in self.layout.staged_segments(self.rank):
            if segment.piece is not None:
                parts.append(self.pieces[segment.piece])
            else:
                assert segment.slot_part is not None
                parts.append(self.slot[segment.slot_part])
        return b"".join(parts)

    def direct(self, group: list[RankBytes]) -> bytes:
        segments = self.layout.direct_segments(self.rank)
        return b"".join(group[segment.rank].pieces[segment.piece] for segment in segments)


@settings(max_examples=100)
@given(layers(), st.integers(1, 100), st.integers(0, 2**32))
def test_composite_tensors_hold_the_full_tensor(
    layer: list[TensorLayout], slice_bytes: int, seed: int
) -> None:
    num_ranks = layer[0].placement.num_ranks
    random_bytes = random.Random(seed)
    full = [bytes(random_bytes.choices(range(1, 256), k=t.total_bytes)) for t in layer]
    group = [
        [RankBytes(layout, rank, data) for rank in range(num_ranks)]
        for layout, data in zip(layer, full, strict=True)
    ]

    for layout, ranks in zip(layer, group, strict=True):
        for rank in range(num_ranks):
            for edge in layout.edges(rank):
                for byte in range(edge.start, edge.stop):
                    ranks[rank].write_piece(byte, ranks[edge.source].read_piece(byte))

    for rank in range(num_ranks):
        for entries in build_fetch_plan(rank, layer, slice_bytes).rounds():
            for part in entries:
                if part is not None:
                    ranks = group[part.tensor]
                    for byte in range(part.start, part.start + part.num_bytes):
                        ranks[rank].write_slot(byte, ranks[part.source].read_piece(byte))

    for layout, ranks, data in zip(layer, group, full, strict=True):
        padding = bytes(layout.mapped_bytes - layout.total_bytes)
        for rank in range(num_ranks):
            assert ranks[rank].staged() == data + padding
            assert ranks[rank].direct(ranks) == data + padding
