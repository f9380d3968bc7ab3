"""The simulators against arithmetic done by hand, a published study's figures, and invariants."""

from __future__ import annotations

import heapq
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dwdp.perf.dep import simulate_dep
from dwdp.perf.fetches import (
    ALL_AT_ONCE,
    HOST,
    SERIAL_FIXED,
    Chunk,
    FetchPolicy,
    order_chunks,
    source_bytes,
)
from dwdp.perf.hardware import load_hardware
from dwdp.perf.links import max_min_rates
from dwdp.perf.model_config import load_model
from dwdp.perf.operators import Batch
from dwdp.perf.roofline import Group
from dwdp.perf.simulator import EXACT_RANKS, GroupRun, Interconnect, simulate_group
from dwdp.perf.transfers import BundledTransfers
from dwdp.perf.work import PARTS, LayerWork, RankWork, Segment, rank_work
from dwdp.placement import build_placement

LAYERS = 20
SERIAL = FetchPolicy(num_lanes=1)


def even_work(layer_s: float, num_layers: int = LAYERS) -> RankWork:
    """Layers of the same length: seven tenths before the experts, three tenths in them."""
    layer = LayerWork((Segment("attention", 0.7 * layer_s),), 0.3 * layer_s, 0.3 * layer_s, 0.2)
    return RankWork((layer,) * num_layers)


def run(
    num_ranks: int,
    layer_s: float,
    policy: FetchPolicy = ALL_AT_ONCE,
    *,
    noise_cv: float = 0.0,
    iterations: int = 3,
    num_layers: int = LAYERS,
    interconnect: Interconnect | None = None,
    stored: int | None = None,
    seed: int = 0,
    with_spans: bool = False,
) -> GroupRun:
    """A group whose fetches take 1 s by themselves when every rank stores an even share."""
    placement = build_placement(12 * num_ranks, num_ranks, num_experts_per_worker=stored)
    expert_bytes = 1 / max(1, 12 * (num_ranks - 1))
    return simulate_group(
        [[even_work(layer_s, num_layers)] * iterations] * num_ranks,
        placement,
        expert_bytes,
        interconnect or Interconnect(1.0),
        policy,
        noise_cv=noise_cv,
        seed=seed,
        with_spans=with_spans,
    )


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(lambda pair: pair[0] != pair[1]),
        min_size=1,
        max_size=15,
    )
)
def test_rates_are_max_min_fair(pairs: list[tuple[int, int]]) -> None:
    flows = {i: (("out", a), ("in", b)) for i, (a, b) in enumerate(pairs)}
    rates = max_min_rates(flows, {"out": 1.0, "in": 1.0})
    ports = {port for used in flows.values() for port in used}
    load = {p: sum(rates[i] for i, used in flows.items() if p in used) for p in ports}
    assert all(total <= 1 + 1e-9 for total in load.values())
    for flow, used in flows.items():
        # Some port on the way is full, and nobody on it gets more.
        assert any(
            load[port] >= 1 - 1e-9
            and all(rates[i] <= rates[flow] + 1e-9 for i, other in flows.items() if port in other)
            for port in used
        )


def test_the_first_layer_of_serial_pulls_in_fixed_order_is_what_paper_and_pencil_say() -> None:
    """Ranks 1-3 share rank 0 first; rank 0 has rank 1 to itself: it ends at 1, the others at 5/3, 2, 2."""
    result = run(4, 0.0, SERIAL_FIXED, iterations=1, num_layers=1)
    assert [rank[0].seconds for rank in result.forwards] == pytest.approx([1, 5 / 3, 2, 2])


@pytest.mark.parametrize("num_ranks", [2, 4, 7])
def test_all_sources_at_once_never_contend(num_ranks: int) -> None:
    for layer_s in (0.5, 1.0, 2.0):
        result = run(num_ranks, layer_s, noise_cv=0.2)
        assert result.mean_fetch_s() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("num_ranks", "policy", "layer_s", "inflation"),
    [
        (4, replace(SERIAL, order="fixed"), 0.8, 1.61),
        (4, replace(SERIAL, order="fixed"), 1.5, 1.56),
        (4, SERIAL, 1.2, 1.53),
        (4, FetchPolicy(num_lanes=2, chunks_per_source=8), 1.0, 1.17),
        (8, SERIAL, 1.2, 1.81),
        (8, replace(SERIAL, order="fixed"), 1.0, 1.83),
    ],
)
def test_serial_pulls_contend_as_an_independent_study_found(
    num_ranks: int, policy: FetchPolicy, layer_s: float, inflation: float
) -> None:
    """Mean fetch time over the ideal, ranks drifting apart by 20 % noise per layer."""
    result = run(num_ranks, layer_s, policy, noise_cv=0.2, num_layers=60, iterations=5)
    assert result.mean_fetch_s(1) == pytest.approx(inflation, rel=0.06)


def test_concurrency_over_sources_is_what_helps_not_their_order() -> None:
    times = [
        run(4, 1.0, policy, noise_cv=0.2).mean_s(1)
        for policy in (SERIAL, replace(SERIAL, chunks_per_source=8), ALL_AT_ONCE)
    ]
    assert times[2] < 0.75 * min(times[0], times[1])
    assert times[1] == pytest.approx(times[0], rel=0.1)


@pytest.mark.parametrize("layer_s", [0.5, 2.0])
def test_without_noise_a_forward_is_as_long_as_the_longer_of_compute_and_fetch(
    layer_s: float,
) -> None:
    result = run(4, layer_s, iterations=4)
    assert result.mean_s(1) == pytest.approx(LAYERS * max(layer_s, 1.0))
    exposed = result.mean_part_s("wait", 1)
    assert exposed == pytest.approx(LAYERS * max(0.0, 1.0 - layer_s))


def test_fetches_that_wrap_around_hide_the_first_ones() -> None:
    wrapping, not_wrapping = (
        run(4, 2.0, replace(ALL_AT_ONCE, wrap_around=flag), iterations=4) for flag in (True, False)
    )
    assert wrapping.mean_part_s("wait", 1) == 0
    # Two slots: only the first fetch of a forward is exposed, by what the first window does not hide.
    assert not_wrapping.mean_part_s("wait", 1) == pytest.approx(max(0.0, 1.0 - 1.4))
    short = run(4, 1.0, replace(ALL_AT_ONCE, wrap_around=False), iterations=4)
    assert short.mean_part_s("wait", 1) == pytest.approx(1.0 - 0.7)


def test_compute_beside_a_copy_is_slower_and_only_there() -> None:
    slow = run(4, 4.0, interconnect=Interconnect(1.0, copy_slowdown=1.25), iterations=4)
    # A fetch of 1 s costs a fifth of the work done beside it: 1 s of wall time does 0.8 s of work.
    for rank in slow.forwards:
        for forward in rank[1:-1]:  # the last one has nothing to fetch for a next one
            assert forward.seconds == pytest.approx(LAYERS * 4.2)
            assert forward.parts["grouped_gemm"] == pytest.approx(LAYERS * 1.2)


def test_set_up_per_slice_is_paid_where_lanes_do_not_hide_it() -> None:
    """Set-up as long as a slice: one lane takes twice as long, three in step a third longer."""
    slices = 64
    interconnect = Interconnect(float(slices), copy_setup_s=1 / slices)
    busy = [[RankWork((LayerWork((Segment("other", 99.0),), 0.0),))]]
    fetch_s = {
        lanes: simulate_group(
            [[RankWork((LayerWork((), 0.0),))], *busy * 3],
            build_placement(48, 4),
            slices / 36,
            interconnect,
            FetchPolicy(num_lanes=lanes, slice_bytes=1),
        )
        .forwards[0][0]
        .fetch_s
        for lanes in (1, 3)
    }
    # The other ranks fetch once as well, in step: rotated single pulls never meet.
    assert fetch_s == pytest.approx({1: 2.0, 3: 4 / 3})


def test_host_memory_beside_the_peers_shortens_the_fetch() -> None:
    interconnect = Interconnect(1.0, host_bytes_per_s=0.5)
    times = [
        run(
            4, 0.1, replace(ALL_AT_ONCE, host_share=share), interconnect=interconnect
        ).mean_fetch_s()
        for share in (0.0, 1 / 3, 0.5)
    ]
    assert times == pytest.approx([1.0, 2 / 3, 1.0])


def test_redundant_experts_shorten_the_fetch() -> None:
    times = [run(4, 0.1, stored=stored).mean_fetch_s() for stored in (12, 24, 48)]
    assert times[0] == pytest.approx(1.0)
    assert times[1] == pytest.approx(24 / 36)
    assert times[2] == 0


def test_a_slow_rank_slows_nobody_else() -> None:
    works = [[even_work(1.5)] * 3, [even_work(1.5)] * 3, [even_work(60.0)] * 3]
    result = simulate_group(works, build_placement(36, 3), 1 / 24, Interconnect(1.0))
    assert [forward.seconds for forward in result.forwards[0]][1:] == pytest.approx(
        [LAYERS * 1.5] * 2
    )


@settings(max_examples=40)
@given(
    st.integers(1, 5),
    st.floats(0.1, 3),
    st.sampled_from(
        [ALL_AT_ONCE, SERIAL, SERIAL_FIXED, FetchPolicy(num_lanes=2, chunks_per_source=3)]
    ),
    st.floats(0, 0.3),
    st.floats(1, 1.5),
    st.integers(0, 5),
)
def test_time_is_accounted_for_and_bounded(
    num_ranks: int, layer_s: float, policy: FetchPolicy, noise: float, slowdown: float, seed: int
) -> None:
    interconnect = Interconnect(1.0, copy_slowdown=slowdown)
    result = run(
        num_ranks,
        layer_s,
        policy,
        noise_cv=noise,
        interconnect=interconnect,
        seed=seed,
        num_layers=6,
    )
    again = run(
        num_ranks,
        layer_s,
        policy,
        noise_cv=noise,
        interconnect=interconnect,
        seed=seed,
        num_layers=6,
    )
    assert result == again
    for rank in result.forwards:
        for before, after in pairwise(rank):
            assert after.start_s == before.end_s
        for forward in rank:
            assert sum(forward.parts.values()) == pytest.approx(forward.seconds, abs=1e-6)
            assert set(forward.parts) == set(PARTS)
            if num_ranks > 1:
                assert forward.fetch_s >= 1 - 1e-6
            else:
                assert forward.parts["wait"] == 0


@pytest.mark.parametrize("num_ranks", [EXACT_RANKS + 1, 24])
def test_bundles_agree_with_single_pieces(num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bundled = run(num_ranks, 0.9, noise_cv=0.1, num_layers=3, iterations=2)
    monkeypatch.setattr("dwdp.perf.simulator.EXACT_RANKS", 100)
    exact = run(num_ranks, 0.9, noise_cv=0.1, num_layers=3, iterations=2)
    assert bundled.mean_s() == pytest.approx(exact.mean_s())
    assert bundled.mean_fetch_s() == pytest.approx(exact.mean_fetch_s())


def test_bundles_stay_close_where_a_source_is_overloaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def uneven() -> GroupRun:
        return simulate_group(
            [[even_work(0.1, 4)]] * 20,
            build_placement(50, 20),
            1 / 47,
            Interconnect(1.0),
            noise_cv=0.1,
        )

    bundled = uneven()
    monkeypatch.setattr("dwdp.perf.simulator.EXACT_RANKS", 100)
    exact = uneven()
    assert exact.mean_fetch_s() > 1.1
    assert bundled.mean_fetch_s() == pytest.approx(exact.mean_fetch_s(), rel=0.1)


def test_ranks_in_step_share_links_once_for_all() -> None:
    num_ranks, events = 32, 0
    queue: list[tuple[float, int, int]] = []
    capacity = {"in": 1.0, "out": 1.0}
    transfers = BundledTransfers(
        num_ranks, capacity, 0.0, lambda *event: heapq.heappush(queue, event)
    )
    for reader in range(num_ranks):
        peers = [peer for peer in range(num_ranks) if peer != reader]
        transfers.start(0.0, reader, [Chunk(peer, 1.0) for peer in peers])
    finished = []
    while queue:
        now_s, key, version = heapq.heappop(queue)
        done = transfers.on_event(now_s, key, version)
        finished += [(piece.reader, now_s) for piece in done]
        events += bool(done)
    assert events == 1
    assert [reader for reader, _ in finished] == list(range(num_ranks))
    assert all(now_s == pytest.approx(num_ranks - 1) for _, now_s in finished)
    assert not any(transfers.is_fetching(reader) for reader in range(num_ranks))


def test_a_rack_of_deepseek_r1_runs_as_one_group_and_as_groups_of_four() -> None:
    model, hardware = load_model("deepseek-r1-nvfp4"), load_hardware("gb200")
    for size in (4, 72):
        work = rank_work(model, hardware, Batch.prefill([8192] * 4), Group(size))
        result = simulate_group(
            [[work]] * size,
            build_placement(256, size),
            model.expert_bytes(model.moe),
            Interconnect.of(hardware),
            noise_cv=0.05,
        )
        assert work.compute_s < result.mean_s() < 1.2 * work.compute_s


def test_spans_show_what_ran_when() -> None:
    result = run(3, 0.5, iterations=2, num_layers=2, with_spans=True)
    copies = [span for span in result.spans if span.lane.startswith("from")]
    assert len(copies) == 3 * 2 * 4  # ranks, sources, fetches
    assert all(span.end_s > span.start_s for span in result.spans)
    assert any(span.label == "wait" for span in result.spans)


def test_lanes_start_at_the_next_rank() -> None:
    placement = build_placement(8, 4)
    by_source = source_bytes(placement, 1, 10)
    assert by_source == {0: 20, 2: 20, 3: 20}
    assert [c.source for c in order_chunks(1, 4, by_source, ALL_AT_ONCE)] == [2, 3, 0]
    assert [c.source for c in order_chunks(1, 4, by_source, SERIAL_FIXED)] == [0, 2, 3]
    pieces = order_chunks(1, 4, by_source, FetchPolicy(chunks_per_source=2, host_share=0.5))
    assert pieces[0] == (HOST, 30)
    assert [c.source for c in pieces[1:]] == [2, 3, 0, 2, 3, 0]
    assert sum(c.num_bytes for c in pieces) == 60


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_lanes": 0}, "num_lanes"),
        ({"slice_bytes": 0}, "slice_bytes"),
        ({"host_share": 2}, "host_sh"),
    ],
)
def test_impossible_policies_are_refused(change: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        replace(ALL_AT_ONCE, **change)


def test_impossible_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="num_slots"):
        simulate_group([[even_work(1)]], build_placement(4, 1), 1, Interconnect(1), num_slots=1)
    with pytest.raises(ValueError, match="group of 2"):
        simulate_group([[even_work(1)]], build_placement(4, 2), 1, Interconnect(1))


class TestDep:
    def test_the_slowest_rank_sets_the_pace(self) -> None:
        fast, slow = even_work(1.0), even_work(2.0)
        result = simulate_dep([[fast], [slow]])
        experts, exchange = (0.3 + 0.6) / 2, 0.2
        assert result.mean_s() == pytest.approx(LAYERS * (1.4 + experts + exchange))
        waits = [rank[0].parts["wait"] for rank in result.forwards]
        assert waits == pytest.approx([LAYERS * 0.7, 0.0])

    def test_equal_ranks_wait_for_nobody(self) -> None:
        result = simulate_dep([[even_work(1.0)] * 2] * 4)
        assert result.mean_part_s("wait") == 0
        assert result.mean_part_s("exchange") == pytest.approx(LAYERS * 0.2)

    def test_skewed_routing_makes_everybody_wait(self) -> None:
        result = simulate_dep([[even_work(1.0)]] * 4, expert_skew=2.0)
        assert result.mean_part_s("grouped_gemm") == pytest.approx(LAYERS * 0.3)
        assert result.mean_part_s("wait") == pytest.approx(LAYERS * 0.3)
        with pytest.raises(ValueError, match="expert_skew"):
            simulate_dep([[even_work(1.0)]] * 4, expert_skew=5.0)

    @given(st.integers(1, 6), st.floats(0, 0.3), st.integers(0, 3))
    def test_time_is_accounted_for(self, num_ranks: int, noise: float, seed: int) -> None:
        result = simulate_dep([[even_work(1.0, 5)] * 2] * num_ranks, noise, seed=seed)
        assert result == simulate_dep([[even_work(1.0, 5)] * 2] * num_ranks, noise, seed=seed)
        for rank in result.forwards:
            for forward in rank:
                assert sum(forward.parts.values()) == pytest.approx(forward.seconds)
