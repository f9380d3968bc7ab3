"""Operators and the roofline: counted by hand, and by properties that hold for any model."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dwdp.perf.demand import crossover_tokens
from dwdp.perf.hardware import Hardware, load_hardware
from dwdp.perf.model import Formats, Layer, Mixer, Model, Moe
from dwdp.perf.model_config import load_model
from dwdp.perf.operators import Batch, Sequences, attention_core, layer_operators, matrix_product
from dwdp.perf.roofline import (
    Collective,
    Group,
    hiding_length,
    iteration_time,
    layer_fetch,
    operator_time,
    winning_batch,
    winning_length,
)

R1 = load_model("deepseek-r1-nvfp4")
GB200 = load_hardware("gb200").at_peak()


@st.composite
def models(draw: st.DrawFn) -> Model:
    heads = draw(st.sampled_from([4, 8, 32]))
    mixer = Mixer(
        "gqa",
        heads,
        draw(st.sampled_from([1, 2, heads])),
        qk_head_dim=draw(st.sampled_from([64, 128])),
        v_head_dim=draw(st.sampled_from([64, 128])),
        window=draw(st.none() | st.integers(1, 4096)),
    )
    num_experts = draw(st.integers(4, 128))
    moe = Moe(
        num_experts,
        draw(st.integers(1, min(8, num_experts))),
        draw(st.integers(64, 2048)),
        draw(st.sampled_from([0, 512])),
    )
    layers = (Layer(mixer, None, 1024),) + (Layer(mixer, moe),) * draw(st.integers(1, 8))
    routed = draw(st.sampled_from(["bf16", "fp8", "nvfp4"]))
    return Model("any", draw(st.sampled_from([512, 4096])), 1000, layers, Formats(routed=routed))


@given(
    st.lists(
        st.tuples(st.integers(1, 60), st.integers(0, 60), st.integers(1, 3)), min_size=1, max_size=4
    ),
    st.none() | st.integers(1, 50),
)
def test_pairs_are_those_of_a_mask_drawn_by_hand(
    sequences: list[tuple[int, int, int]], window: int | None
) -> None:
    batch = Batch(tuple(Sequences(*part) for part in sequences))
    by_hand = sum(
        count * sum(min(past + i, window or past + i) for i in range(1, new + 1))
        for new, past, count in sequences
    )
    assert batch.pairs(window) == by_hand
    assert batch.keys_read(window) <= sum(count * (new + past) for new, past, count in sequences)


def test_a_product_is_counted_as_every_textbook_does() -> None:
    product = matrix_product("x", 10, 128, 256, "bf16")
    assert product.flops == 2 * 10 * 128 * 256
    assert product.num_bytes == 2 * (128 * 256 + 10 * 128 + 10 * 256)


def test_absorbed_and_decompressed_latent_attention() -> None:
    mixer = R1.layers[0].mixer
    assert mixer is not None
    prefill = attention_core(mixer, Batch.prefill([100]), 1)
    assert prefill.flops == 2 * (100 * 101 / 2) * 128 * (192 + 128)
    decode = attention_core(mixer, Batch.decode(3, 99), 1)
    assert decode.flops == 2 * 3 * 100 * 128 * (576 + 512)
    assert decode.num_bytes == 3 * 100 * 576 + 3 * 128 * (576 + 512) * 2


def test_an_operator_takes_the_larger_of_its_two_times() -> None:
    few = operator_time(GB200, matrix_product("x", 1, 8192, 8192, "bf16"))
    many = operator_time(GB200, matrix_product("x", 100_000, 8192, 8192, "bf16"))
    assert few.bound == "memory" and few.seconds == few.memory_s > few.compute_s
    assert many.bound == "compute" and many.seconds == many.compute_s > many.memory_s
    assert many.compute_s == pytest.approx(2 * 100_000 * 8192**2 / 2.5e15)


def test_the_flops_of_a_token_are_twice_its_active_weights() -> None:
    """DeepSeek-R1 activates 37 billion weights per token (its technical report, arXiv 2412.19437)."""
    batch = Batch.prefill([1] * 64)
    flops = sum(
        op.flops
        for layer in R1.layers
        for op in layer_operators(R1, layer, batch)
        if op.category != "attention"
    )
    assert flops / 64 / 2 == pytest.approx(37e9, rel=0.05)


def test_a_fetch_of_deepseek_r1_takes_what_its_bytes_take() -> None:
    time = iteration_time(R1, GB200, Batch.prefill([8192]), Group(4))
    assert time.prefetch_s == pytest.approx(58 * 0.75 * 6.342e9 / 900e9, rel=1e-3)


@settings(max_examples=50)
@given(models(), st.integers(1, 3000), st.integers(1, 4), st.integers(2, 4))
def test_times_grow_with_work_and_ranks_only_change_what_is_shared(
    model: Model, length: int, count: int, ranks: int
) -> None:
    batch, more = Batch.prefill([length] * count), Batch.prefill([length + 64] * count)
    time, longer = (iteration_time(model, GB200, b, Group(ranks)) for b in (batch, more))
    assert longer.compute_s > time.compute_s
    assert longer.prefetch_s == time.prefetch_s
    assert longer.exchange_s > time.exchange_s
    assert time.dwdp_s >= max(time.compute_s, time.prefetch_s) * (1 - 1e-9)
    assert time.dwdp_s <= time.compute_s + time.prefetch_s
    larger_group = iteration_time(model, GB200, batch, Group(ranks * 2 if ranks < 3 else ranks))
    assert larger_group.compute_s == pytest.approx(time.compute_s)
    assert larger_group.prefetch_s >= time.prefetch_s * (1 - 1e-9)


@settings(max_examples=50)
@given(models(), st.integers(1, 3000))
def test_a_group_of_one_neither_fetches_nor_exchanges(model: Model, length: int) -> None:
    time = iteration_time(model, GB200, Batch.prefill([length]), Group(1))
    assert time.prefetch_s == time.exchange_s == 0
    assert time.dep_s == pytest.approx(time.dwdp_s) == pytest.approx(time.compute_s)


@settings(max_examples=50)
@given(models(), st.integers(1, 3000), st.floats(0.1, 0.9))
def test_a_uniform_derating_changes_no_ratio(model: Model, length: int, share: float) -> None:
    """The paper's table 1 gives ratios only, so it cannot tell peak rates from a share of all."""
    derated = Hardware.model_validate(
        {
            **GB200.model_dump(),
            "achieved": dict.fromkeys(
                ("attention", "dense_gemm", "grouped_gemm", "memory", "link", "collective"), share
            ),
        }
    )
    batch = Batch.prefill([length])
    peak, slow = (iteration_time(model, hw, batch, Group(4)) for hw in (GB200, derated))
    assert slow.compute_s == pytest.approx(peak.compute_s / share)
    assert slow.compute_to_prefetch == pytest.approx(peak.compute_to_prefetch)
    assert slow.dep_to_dwdp == pytest.approx(peak.dep_to_dwdp)


@given(st.integers(1, 16), st.integers(1, 72), st.integers(1, 8192))
def test_sending_a_token_once_per_rank_is_never_more_than_once_per_expert(
    top_k: int, ranks: int, hidden: int
) -> None:
    per_rank, per_expert = (
        Collective(deduplicated=flag).bytes_per_token(hidden, top_k, ranks)
        for flag in (True, False)
    )
    assert 0 <= per_rank <= per_expert * (1 + 1e-9)


def test_redundant_experts_shorten_the_fetch() -> None:
    times = [
        iteration_time(R1, GB200, Batch.prefill([8192]), Group(4, stored)).prefetch_s
        for stored in (None, 64, 96, 128, 256)
    ]
    assert times[0] == times[1] > times[2] > times[3] > times[4] == 0


def test_crossings_are_where_the_ratios_pass_one() -> None:
    group = Group(4)
    hiding = hiding_length(R1, GB200, group)
    winning = winning_length(R1, GB200, group)
    assert hiding is not None and winning is not None and winning <= hiding

    def ratios(length: int, count: int = 1) -> tuple[float, float]:
        time = iteration_time(R1, GB200, Batch.prefill([length] * count), group)
        return time.compute_to_prefetch, time.dep_to_dwdp

    assert ratios(hiding)[0] >= 1 > ratios(hiding - 1)[0]
    assert ratios(winning)[1] >= 1 > ratios(winning - 1)[1]
    batch = winning_batch(R1, GB200, group, 1024)
    assert batch is not None and ratios(1024, batch)[1] >= 1 > ratios(1024, batch - 1)[1]
    slow_link = GB200.model_copy(update={"link": GB200.link.model_copy(update={"gbs": 0.001})})
    assert hiding_length(R1, slow_link, group, longest=2048) is None


def test_what_a_runtime_is_told_agrees_with_the_roofline() -> None:
    layer = layer_fetch(R1, GB200, Group(4))
    assert layer.prefetch_s * 58 == pytest.approx(
        iteration_time(R1, GB200, Batch.prefill([1]), Group(4)).prefetch_s
    )
    moe_layer = R1.moe_layers[0]
    for tokens in (1, 64, 4096):
        full = sum(
            operator_time(GB200, op).seconds
            for op in layer_operators(R1, moe_layer, Batch.decode(tokens, 0))
        )
        assert 0.4 * full < layer.window_s(tokens) < 1.1 * full
    assert crossover_tokens(layer) > crossover_tokens(replace(layer, demand_gbs=90.0))
