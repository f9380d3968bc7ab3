"""Who stores which experts, and how evenly the ranks serve each other."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from itertools import groupby

import networkx as nx  # type: ignore[import-untyped]
import pytest
from arithmetic_cases import Rule, rules
from hypothesis import given, settings

from dwdp.placement import ExpertRange, Placement, build_placement


def stored(placement: Placement, rank: int) -> list[int]:
    return [expert for start, stop in placement.resident[rank] for expert in range(start, stop)]


def served(placement: Placement) -> list[int]:
    return [placement.num_served(rank) for rank in range(placement.num_ranks)]


def max_reads_served(placement: Placement, at_most: int, extra: int = 0) -> int:
    """Reads that the holders can serve, each up to ``at_most``, and ``extra`` of them one more."""
    graph = nx.DiGraph()
    graph.add_edge("spare", "sink", capacity=extra)
    for rank in range(placement.num_ranks):
        graph.add_edge(("holder", rank), "sink", capacity=at_most)
        graph.add_edge(("holder", rank), "spare", capacity=1)
        for expert in range(placement.num_experts):
            holders = [
                peer for peer in range(placement.num_ranks) if expert in stored(placement, peer)
            ]
            if rank not in holders:
                graph.add_edge("start", ("read", rank, expert), capacity=1)
                for holder in holders:
                    graph.add_edge(("read", rank, expert), ("holder", holder), capacity=1)
    return nx.maximum_flow_value(graph, "start", "sink") if "start" in graph else 0


def test_even_split() -> None:
    placement = build_placement(8, 3)
    assert placement.resident == ((ExpertRange(0, 3),), (ExpertRange(3, 6),), (ExpertRange(6, 8),))
    assert placement.sources == ((0, 0, 0, 1, 1, 1, 2, 2),) * 3
    assert served(placement) == [6, 6, 4]
    assert placement.is_resident(1, 3)
    assert not placement.is_resident(1, 2)
    assert placement.resident_experts(2) == (6, 7)
    assert placement.remote_experts(2) == (0, 1, 2, 3, 4, 5)


def test_redundant_experts_wrap_and_even_out_what_is_served() -> None:
    placement = build_placement(8, 3, num_experts_per_worker=4)
    assert placement.resident == (
        (ExpertRange(0, 4),),
        (ExpertRange(2, 6),),
        (ExpertRange(0, 1), ExpertRange(5, 8)),
    )
    assert placement.sources == (
        (0, 0, 0, 0, 1, 1, 2, 2),
        (0, 0, 1, 1, 1, 1, 2, 2),
        (2, 0, 0, 1, 1, 2, 2, 2),
    )
    assert served(placement) == [4, 4, 4]


def test_stride_given() -> None:
    placement = build_placement(10, 3, num_experts_per_worker=5, num_prefetch_experts=3)
    assert placement.resident == ((ExpertRange(0, 5),), (ExpertRange(3, 8),), (ExpertRange(6, 10),))


def test_stride_alone_is_also_the_number_stored() -> None:
    placement = build_placement(10, 3, num_prefetch_experts=4)
    assert placement.resident == ((ExpertRange(0, 4),), (ExpertRange(4, 8),), (ExpertRange(8, 10),))


@pytest.mark.parametrize("rule", [Rule(5, 1), Rule(5, 1, 5), Rule(5, 1, 7, 6), Rule(1, 1)])
def test_one_rank_stores_everything(rule: Rule) -> None:
    placement = rule.build()
    assert placement.resident == ((ExpertRange(0, rule.num_experts),),)
    assert placement.remote_experts(0) == ()
    assert placement.num_served(0) == 0


def test_full_replication_reads_nothing() -> None:
    placement = build_placement(6, 4, num_experts_per_worker=6)
    assert placement.resident == ((ExpertRange(0, 6),),) * 4
    assert placement.sources == tuple((rank,) * 6 for rank in range(4))
    assert served(placement) == [0, 0, 0, 0]


@given(rules())
def test_each_rank_stores_what_the_rule_says(rule: Rule) -> None:
    placement = rule.build()
    num_experts, num_ranks, num_stored, stride = rule
    everything = range(num_experts)
    for rank in range(num_ranks):
        if num_stored is None:
            first = sum(
                num_experts // num_ranks + (r < num_experts % num_ranks) for r in range(rank)
            )
            count = num_experts // num_ranks + (rank < num_experts % num_ranks)
            expected = list(everything[first : first + count])
        elif stride is None:
            first = rank * num_experts // num_ranks
            expected = sorted((first + i) % num_experts for i in range(num_stored))
        else:
            expected = list(everything[rank * stride : rank * stride + num_stored])
        assert stored(placement, rank) == expected


@given(rules())
def test_every_expert_is_stored_and_read_from_who_stores_it(rule: Rule) -> None:
    placement = rule.build()
    for rank in range(rule.num_ranks):
        ranges = placement.resident[rank]
        assert len(ranges) in (1, 2)
        assert all(start < stop for start, stop in ranges)
        assert all(ranges[i].stop < ranges[i + 1].start for i in range(len(ranges) - 1))
        assert placement.resident_experts(rank) == tuple(stored(placement, rank))
        assert sorted(placement.resident_experts(rank) + placement.remote_experts(rank)) == list(
            range(rule.num_experts)
        )
    for expert in range(rule.num_experts):
        holders = [rank for rank in range(rule.num_ranks) if expert in stored(placement, rank)]
        assert holders
        for rank in range(rule.num_ranks):
            assert placement.is_resident(rank, expert) == (rank in holders)
            assert placement.sources[rank][expert] in ([rank] if rank in holders else holders)
    assert sum(served(placement)) == sum(
        len(placement.remote_experts(rank)) for rank in range(rule.num_ranks)
    )


@settings(max_examples=150)
@given(rules(max_experts=20, max_ranks=7))
def test_served_experts_are_balanced_as_well_as_any_choice_can(rule: Rule) -> None:
    placement = rule.build()
    counts = served(placement)
    share, rest = divmod(sum(counts), rule.num_ranks)
    if max_reads_served(placement, share, rest) == sum(counts):
        assert max(counts) - min(counts) <= 1
    # Whether or not that can be had: nobody could serve less than the busiest rank does, ...
    if max(counts):
        assert max_reads_served(placement, max(counts) - 1) < sum(counts)
    # ... and not all ranks could serve more than the least busy one does.
    assert max_reads_served(placement, min(counts) + 1) < rule.num_ranks * (min(counts) + 1)


@pytest.mark.parametrize("num_ranks", range(1, 73))
def test_an_even_split_serves_evenly_up_to_one_nvlink_domain(num_ranks: int) -> None:
    for num_experts in (num_ranks, 2 * num_ranks):
        assert set(served(build_placement(num_experts, num_ranks))) == {
            num_experts - num_experts // num_ranks
        }
    # One copy of each expert, so there is no choice: everybody reads it from where it is.
    placement = build_placement(101, num_ranks)
    assert served(placement) == [
        len(placement.resident_experts(rank)) * (num_ranks - 1) for rank in range(num_ranks)
    ]
    assert max(served(placement)) - min(served(placement)) in (0, num_ranks - 1)


@pytest.mark.parametrize("num_ranks", range(5, 73))
def test_redundancy_that_is_alike_for_all_ranks_is_served_evenly(num_ranks: int) -> None:
    num_experts, num_stored = 2 * num_ranks, 3 + num_ranks % 3
    placement = build_placement(num_experts, num_ranks, num_experts_per_worker=num_stored)
    assert set(served(placement)) == {num_experts - num_stored}


@pytest.mark.parametrize(
    ("rule", "spread"),
    [
        (Rule(256, 72, 8), 0),
        (Rule(512, 72, 16), 0),
        (Rule(512, 72, 256), 0),
        (Rule(512, 72, 16, 7), 1),
        (Rule(512, 72, 300, 3), 1),
    ],
)
def test_the_largest_groups_are_balanced(rule: Rule, spread: int) -> None:
    counts = served(rule.build())
    assert max(counts) - min(counts) == spread


def test_reads_are_spread_over_the_sources() -> None:
    placement = build_placement(256, 4, num_experts_per_worker=96)
    assert served(placement) == [160] * 4
    for rank in range(4):
        reads = Counter(source for source in placement.sources[rank] if source != rank)
        assert sorted(reads.values()) == [53, 53, 54]


@given(rules())
def test_neighbouring_experts_come_from_one_source(rule: Rule) -> None:
    placement = rule.build()
    for rank in range(rule.num_ranks):
        by_holders: dict[tuple[int, ...], list[int]] = {}
        for expert in placement.remote_experts(rank):
            peers = range(rule.num_ranks)
            holders = tuple(peer for peer in peers if placement.is_resident(peer, expert))
            by_holders.setdefault(holders, []).append(placement.sources[rank][expert])
        for sources in by_holders.values():
            runs = [source for source, _ in groupby(sources)]
            assert len(runs) == len(set(runs))


def test_every_process_computes_the_same_placement() -> None:
    program = (
        "from dwdp.placement import build_placement as build;"
        "print(build(100, 9, num_experts_per_worker=30));"
        "print(build(100, 9, num_experts_per_worker=40, num_prefetch_experts=8))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    here = (
        f"{build_placement(100, 9, num_experts_per_worker=30)}\n"
        f"{build_placement(100, 9, num_experts_per_worker=40, num_prefetch_experts=8)}\n"
    )
    assert outputs == {here}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(4, 5), "5 ranks cannot share 4 experts: .* Use a group of at most 4"),
        (Rule(0, 1), "num_experts is 0"),
        (Rule(8, 0), r"has 0 ranks \(dwdp_size\): use at least 1"),
        (Rule(100, 73), r"has 73 ranks \(dwdp_size\): use at most 72"),
        (Rule(8, 2, 0), "num_experts_per_worker is 0: use at least 1"),
        (Rule(8, 2, None, 0), "num_prefetch_experts is 0: use at least 1"),
        (Rule(10, 3, 3), "store at most 9 of 10 experts. Use at least 4"),
        (Rule(8, 2, 9), "num_experts_per_worker is 9, but the layer has 8 experts. Use at most 8"),
        (Rule(8, 2, 3, 4), r"num_prefetch_experts \(4\) is larger than num_experts_per_worker"),
        (
            Rule(10, 9, 4, 2),
            "rank 5 would start at expert 10 of 10 .* group of at most 5, .* most 1",
        ),
        (Rule(10, 3, None, 3), "cover 9 of 10 experts. Raise num_experts_per_worker to 4 or more"),
    ],
)
def test_impossible_placements_are_refused(rule: Rule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule.build()


@given(rules())
def test_the_advice_for_an_uncovered_expert_works(rule: Rule) -> None:
    num_experts, num_ranks, num_stored, stride = rule
    if stride is None or num_stored is None or num_ranks == 1:
        return
    needed = max(stride, num_experts - (num_ranks - 1) * stride)
    if needed > stride:
        with pytest.raises(ValueError, match=f"num_experts_per_worker to {needed} or more"):
            build_placement(
                num_experts,
                num_ranks,
                num_experts_per_worker=needed - 1,
                num_prefetch_experts=stride,
            )
    rule._replace(num_experts_per_worker=needed).build()
