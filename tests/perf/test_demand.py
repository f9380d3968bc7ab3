"""The number of experts that a step activates, and what it decides."""

from __future__ import annotations

import doctest
import itertools
import random
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwdp.perf import demand
from dwdp.perf.beyond import demand_gains
from dwdp.perf.demand import MAX_TOKENS, LayerFetch, crossover_tokens, expected_activated_experts
from dwdp.perf.hardware import load_hardware
from dwdp.perf.model_config import load_model
from dwdp.perf.operators import Batch
from dwdp.perf.roofline import Group, layer_fetch, layer_time

DEEPSEEK_R1 = LayerFetch(
    expert_bytes=24_772_608,
    num_experts=256,
    num_remote_experts=192,
    top_k=8,
    hidden_size=7168,
    num_ranks=4,
    link_gbs=900,
    memory_gbs=8000,
    compute_tflops=10_000,
    bits_per_weight=4.5,
)


@st.composite
def layers(draw: st.DrawFn) -> LayerFetch:
    num_experts = draw(st.integers(1, 512))
    return LayerFetch(
        expert_bytes=draw(st.integers(1, 1 << 28)),
        num_experts=num_experts,
        num_remote_experts=draw(st.integers(0, num_experts)),
        top_k=draw(st.integers(1, num_experts)),
        hidden_size=draw(st.integers(1, 1 << 14)),
        num_ranks=draw(st.integers(1, 72)),
        link_gbs=draw(st.floats(1, 2000)),
        demand_gbs=draw(st.none() | st.floats(1, 2000)),
        memory_gbs=draw(st.floats(1, 20_000)),
        compute_tflops=draw(st.floats(0.01, 20_000)),
        bits_per_weight=draw(st.sampled_from([4.25, 4.5, 8.0, 16.0, 32.0])),
        setup_s=draw(st.floats(0, 1e-3)),
    )


def test_the_expectation_is_that_of_all_possible_routings() -> None:
    for num_experts, top_k, num_tokens in [(3, 1, 2), (4, 2, 2), (5, 3, 2), (4, 2, 3)]:
        choices = list(itertools.combinations(range(num_experts), top_k))
        routings = list(itertools.product(choices, repeat=num_tokens))
        mean = sum(len(set().union(*routing)) for routing in routings) / len(routings)
        assert expected_activated_experts(num_experts, top_k, num_tokens) == pytest.approx(mean)


def test_the_expectation_agrees_with_drawn_routings() -> None:
    random_numbers = random.Random(1)
    drawn = [
        len({e for _ in range(64) for e in random_numbers.sample(range(256), 8)})
        for _ in range(200)
    ]
    mean = sum(drawn) / len(drawn)
    assert expected_activated_experts(256, 8, 64) == pytest.approx(mean, rel=0.01)


@given(st.integers(1, 4096), st.data())
def test_activation_is_bounded_and_grows(num_experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    tokens = data.draw(st.integers(0, 100_000))
    activated = expected_activated_experts(num_experts, top_k, tokens)
    assert 0 <= activated <= num_experts
    assert activated <= tokens * top_k * (1 + 1e-9)
    assert activated >= min(tokens, 1) * top_k * (1 - 1e-9)
    assert expected_activated_experts(num_experts, top_k, tokens + 1) >= activated


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0, 1, 1), "num_experts"),
        ((8, 9, 1), "top_k"),
        ((8, 0, 1), "top_k"),
        ((8, 2, -1), "num_tok"),
    ],
)
def test_impossible_routing_is_refused(arguments: tuple[int, int, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        expected_activated_experts(*arguments)


@given(layers(), st.integers(0, 1 << 16), st.integers(1, 1 << 12))
def test_demand_never_gets_cheaper_and_staged_never_dearer(
    layer: LayerFetch, tokens: int, more: int
) -> None:
    assert layer.demand_exposed_s(tokens + more) >= layer.demand_exposed_s(tokens)
    assert layer.staged_exposed_s(tokens + more) <= layer.staged_exposed_s(tokens)
    assert layer.demand_bytes(tokens) <= layer.staged_bytes * (1 + 1e-9)


@given(layers())
def test_the_crossover_separates_demand_from_staged(layer: LayerFetch) -> None:
    crossover = crossover_tokens(layer)
    assert 0 <= crossover <= MAX_TOKENS
    for tokens in {1, crossover // 2, crossover} - {0}:
        if tokens <= crossover:
            assert layer.demand_exposed_s(tokens) <= layer.staged_exposed_s(tokens)
    if crossover < MAX_TOKENS and layer.staged_bytes:
        assert layer.demand_exposed_s(crossover + 1) > layer.staged_exposed_s(crossover + 1)


@given(layers(), st.floats(1.01, 8))
def test_a_faster_demand_fetch_moves_the_crossover_up(layer: LayerFetch, factor: float) -> None:
    slow = replace(layer, demand_gbs=layer.link_gbs)
    fast = replace(layer, demand_gbs=layer.link_gbs * factor)
    assert crossover_tokens(fast) >= crossover_tokens(slow)


@given(layers(), st.floats(0.1, 10))
def test_a_uniform_derating_without_setup_changes_nothing(layer: LayerFetch, factor: float) -> None:
    layer = replace(layer, setup_s=0.0, demand_gbs=layer.link_gbs)
    scaled = replace(
        layer,
        link_gbs=layer.link_gbs * factor,
        demand_gbs=layer.link_gbs * factor,
        memory_gbs=layer.memory_gbs * factor,
        compute_tflops=layer.compute_tflops * factor,
    )
    assert abs(crossover_tokens(scaled) - crossover_tokens(layer)) <= 1


def test_decode_of_a_large_model_is_for_demand_and_prefill_for_staged() -> None:
    crossover = crossover_tokens(DEEPSEEK_R1)
    assert 16 < crossover < 256
    assert DEEPSEEK_R1.demand_exposed_s(1) < 0.05 * DEEPSEEK_R1.staged_exposed_s(1)
    assert DEEPSEEK_R1.staged_exposed_s(1 << 17) == 0


@pytest.mark.parametrize("change", [{"num_ranks": 1}, {"num_remote_experts": 0}])
def test_nothing_remote_means_nothing_exposed(change: dict[str, int]) -> None:
    layer = replace(DEEPSEEK_R1, **change)
    assert crossover_tokens(layer) == 0
    assert layer.demand_exposed_s(100) == layer.staged_exposed_s(100) == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_remote_experts": 257}, "num_remote_experts"),
        ({"expert_bytes": 0}, "expert_bytes"),
        ({"link_gbs": 0.0}, "link_gbs"),
        ({"demand_gbs": -1.0}, "demand_gbs"),
        ({"setup_s": -1.0}, "setup_s"),
    ],
)
def test_impossible_layers_are_refused(change: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        replace(DEEPSEEK_R1, **change)


def test_the_examples_in_the_documentation_hold() -> None:
    assert doctest.testmod(demand).failed == 0


def test_it_is_light_enough_for_set_up() -> None:
    code = "import dwdp.perf.demand, sys; print({'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_demand_gains_most_where_few_sequences_activate_few_experts() -> None:
    model, hardware = load_model("deepseek-r1-nvfp4"), load_hardware("gb200")
    gains = {
        (gain.num_sequences, gain.context_tokens, gain.load_cv): gain.gain
        for gain in demand_gains(model, hardware)
    }
    assert gains[4, 8192, 0.0] > gains[16, 8192, 0.0] > 2 > gains[64, 8192, 0.0]
    layer, group = model.moe_layers[0], Group(4)
    compute_s = layer_time(model, layer, hardware, Batch.decode(16, 8192), group).compute_s
    fetch = layer_fetch(model, hardware, group)
    assert compute_s < fetch.prefetch_s
    by_hand = fetch.prefetch_s / (compute_s + fetch.demand_exposed_s(16))
    assert gains[16, 8192, 0.0] == pytest.approx(by_hand)
