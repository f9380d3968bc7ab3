"""Workloads, and what users and owners of a deployment see."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwdp.perf.hardware import load_hardware
from dwdp.perf.model_config import load_model
from dwdp.perf.operators import Batch, Sequences
from dwdp.perf.roofline import Group
from dwdp.perf.serving import (
    Deployment,
    Generation,
    PrefillScenario,
    ServingResult,
    prefill_curve,
    prefill_rate,
    rate_match,
    serve,
)
from dwdp.perf.workload import (
    Lengths,
    Request,
    batches_of_trace,
    pack,
    poisson_requests,
    rank_loads,
    read_trace,
)

R1, GB200 = load_model("deepseek-r1-nvfp4"), load_hardware("gb200")
GENERATION = Generation(R1, GB200, num_gpus=8, context_tokens=8192)


@given(
    st.lists(st.integers(1, 100), max_size=40),
    st.integers(1, 150),
    st.none() | st.integers(1, 5),
)
def test_packing_keeps_order_loses_nothing_and_never_overfills(
    lengths: list[int], most: int, most_prompts: int | None
) -> None:
    batches = list(pack(lengths, most, most_prompts))
    start = 0
    for batch in batches:
        packed = [part.new for part in batch.sequences for _ in range(part.times)]
        assert packed == sorted(lengths[start : start + len(packed)])
        start += len(packed)
        if start < len(lengths) and batch.num_sequences != most_prompts:
            assert batch.num_tokens + lengths[start] > most
    assert start == len(lengths)
    for batch in batches:
        assert batch.num_tokens <= most or batch.num_sequences == 1
        assert most_prompts is None or batch.num_sequences <= most_prompts


def test_equal_prompts_are_counted_not_listed() -> None:
    batch = Batch.prefill([5, 3, 5])
    assert batch.sequences == (Sequences(3), Sequences(5, times=2))
    assert batch.num_tokens == 13 and batch.pairs(None) == 6 + 2 * 15


def test_a_percentile_is_the_nearest_rank() -> None:
    result = ServingResult(1.0, 1.0, tuple(float(i) for i in range(1, 101)), 1.0)
    assert [result.ttft_percentile_s(p) for p in (0, 50, 90, 99, 100)] == [1, 50, 90, 99, 100]


def test_generation_without_room_for_a_sequence_is_refused() -> None:
    deployment = Deployment("dwdp", 4, 4, lambda tokens: 1.0, 8192, replace(GENERATION, num_gpus=1))
    with pytest.raises(ValueError, match="1 generation GPUs have no memory"):
        serve(deployment, [Request(0.0, 100, 10)])


def test_lengths_are_drawn_as_described() -> None:
    random_numbers = random.Random(0)
    uniform = [Lengths(1000, ratio=0.5).draw(random_numbers) for _ in range(5000)]
    assert min(uniform) >= 500 and max(uniform) <= 1000
    assert fmean(uniform) == pytest.approx(Lengths(1000, ratio=0.5).mean, rel=0.02)
    normal = [Lengths(1000, cv=0.2).draw(random_numbers) for _ in range(5000)]
    assert fmean(normal) == pytest.approx(1000, rel=0.02)
    assert pstdev(normal) == pytest.approx(200, rel=0.05)
    loads = [load for rank in rank_loads(0.2, 4, 2000) for load in rank]
    assert pstdev(loads) == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize(
    "values", [{"longest": 0}, {"longest": 9, "ratio": 1.5}, {"longest": 9, "cv": -1}]
)
def test_impossible_lengths_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"length"):
        Lengths(**values)  # type: ignore[arg-type]


def test_a_trace_is_read_sorted_and_shared_out(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [(2.0, 10, 5), (1.0, 30, 5), (3.0, 20, 5), (4.0, 5, 5)]
    path.write_text(
        "\n".join(json.dumps(dict(zip(Request._fields, row, strict=True))) for row in rows) + "\n\n"
    )
    requests = read_trace(path)
    assert [request.arrival_s for request in requests] == [1.0, 2.0, 3.0, 4.0]
    batches = batches_of_trace(requests, 2, 1000)
    assert [sum(batch.num_tokens for batch in rank) for rank in batches] == [35, 30]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "trace.jsonl:1: not JSON"),
        ("[1]", "arrival_s"),
        ('{"arrival_s": 0, "input_tokens": 0, "output_tokens": 1}', "input_tokens: 0"),
        ('{"arrival_s": 0, "input_tokens": 3}', "output_tokens"),
        ('{"arrival_s": NaN, "input_tokens": 3, "output_tokens": 1}', "arrival_s: nan"),
        ('{"arrival_s": 0, "input_tokens": 1.5, "output_tokens": 1}', "input_tokens: 1.5"),
        ('{"arrival_s": 0, "input_tokens": 1, "output_tokens": Infinity}', "output_tokens: inf"),
        ("", "no requests"),
    ],
)
def test_a_wrong_trace_is_one_line_with_the_key(line: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=named):
        read_trace(path)


def test_uneven_load_costs_expert_parallelism_and_not_dwdp() -> None:
    rates = {
        (strategy, cv): prefill_rate(
            R1, GB200, Group(4), PrefillScenario(Lengths(8192), load_cv=cv, seed=3), strategy
        )
        for strategy in ("dep", "dwdp")
        for cv in (0.0, 0.2)
    }
    assert rates["dep", 0.2].tokens_per_s < 0.93 * rates["dep", 0.0].tokens_per_s
    assert rates["dwdp", 0.2].tokens_per_s == pytest.approx(
        rates["dwdp", 0.0].tokens_per_s, rel=0.02
    )
    assert rates["dwdp", 0.2].wait_s == pytest.approx(0, abs=0.01)
    assert rates["dep", 0.2].wait_s > 0.05


@given(st.floats(1, 200), st.floats(0.1, 50))
def test_more_sequences_are_slower_for_each_and_faster_for_all(
    sequences: float, more: float
) -> None:
    fewer, many = (GENERATION.step_s(count) for count in (sequences, sequences + more))
    assert many >= fewer
    assert (sequences + more) / many >= sequences / fewer * (1 - 1e-9)


def test_sequences_at_a_speed_are_the_most_that_reach_it() -> None:
    for tps in (20.0, 50.0, 100.0):
        count = GENERATION.sequences_at(tps)
        assert GENERATION.tps_per_user(count) >= tps
        if count < GENERATION.max_sequences_per_gpu():
            assert GENERATION.tps_per_user(count + 1) < tps
    assert GENERATION.sequences_at(1e6) == 0
    assert rate_match(1e4, GENERATION, 8192, 1024, 1e6) is None


def test_matched_rates_are_gpu_time_per_request() -> None:
    match = rate_match(16_384.0, GENERATION, 8192, 1024, 50)
    assert match is not None
    assert match.prefill_gpu_s == 0.5
    sequences = GENERATION.sequences_at(50)
    assert match.generation_gpu_s == pytest.approx(1024 * GENERATION.step_s(sequences) / sequences)
    assert match.tps_per_gpu == pytest.approx(1024 / (0.5 + match.generation_gpu_s))


def deployment(strategy: str, ranks: int, seconds: float = 1.0) -> Deployment:
    return Deployment(strategy, ranks, 4, lambda _tokens: seconds, 8192, GENERATION)  # type: ignore[arg-type]


def test_one_request_is_served_at_once() -> None:
    result = serve(deployment("dwdp", 1), [Request(5.0, 100, 11)])
    assert result.ttft_s == (1.0,)
    decode_s = 10 * GENERATION.step_s(1 / 8)
    assert result.tps_per_user == pytest.approx(10 / decode_s)
    assert result.tps_per_gpu == pytest.approx(11 / (1.0 + decode_s) / 9)


def test_prefill_queues_in_order() -> None:
    """Two ranks, one prompt of 8192 tokens each per second; five requests at once."""
    result = serve(deployment("dwdp", 2), [Request(0.0, 8192, 2)] * 5)
    assert result.ttft_s == (1.0, 1.0, 2.0, 2.0, 3.0)
    assert result.ttft_percentile_s(50) == 2.0 and result.ttft_percentile_s(99) == 3.0
    # A DEP group takes four at once and keeps its ranks together.
    assert serve(deployment("dep", 4), [Request(0.0, 8192, 2)] * 5).ttft_s == (1, 1, 1, 1, 2)


def test_fewer_prefill_ranks_mean_later_first_tokens() -> None:
    requests = poisson_requests(Lengths(8192, ratio=0.8), 64, 4.5, 300, seed=1)
    ttft = [serve(deployment("dwdp", n), requests).ttft_percentile_s(90) for n in (4, 5, 8)]
    assert ttft[0] > ttft[1] > ttft[2] >= 1.0


def test_impossible_deployments_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of 4"):
        serve(deployment("dep", 6), [Request(0.0, 1, 1)])
    with pytest.raises(ValueError, match="no requests"):
        serve(deployment("dwdp", 1), [])


def test_a_short_forward_waits_for_its_fetches_and_a_long_one_is_interpolated() -> None:
    scenario = PrefillScenario(Lengths(8192), 32768, num_iterations=3)
    seconds = prefill_curve(R1, GB200, Group(4), scenario, "dwdp")
    fetch_s = 58 * 0.75 * 6.342e9 / (900e9 * GB200.achieved.link)
    assert seconds(100) > 0.9 * fetch_s
    assert seconds(8192) < seconds(20_000) < seconds(32_768)
    assert seconds(65_536) == pytest.approx(2 * seconds(32_768))
