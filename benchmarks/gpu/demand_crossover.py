"""Fetching on demand against fetching ahead (staged), by the number of tokens in a step.

Layers of attention, router and grouped GEMM run over dwdp's own ring, with the expert shapes of DeepSeek-R1
and Qwen3-235B in bfloat16, for rank 0 of 4 whose peers' experts lie in the same GPU. Staged fetches move
all remote experts while the layer before computes; on demand, the activated ones move after the router.
The same layers with all experts resident are the baseline of both.

The performance model's expectation (dwdp.perf.demand) stands beside the measured crossover: once for the
device's own link, and once for the bandwidths that were measured here, which are not a link's.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from figures import Cell, Column, Table
from harness import (
    Budget,
    benchmark_command,
    cuda_fabric,
    elapsed_ms,
    free_bytes,
    gbs,
    interleaved,
    over,
)
from layer import DEEPSEEK_R1, QWEN3_235B, ExpertShape, GpuLayer
from moe_layer import MoeCompute

from dwdp.perf.demand import MAX_TOKENS, LayerFetch, crossover_tokens
from dwdp.perf.hardware import find_hardware
from dwdp.pipeline import Pipeline, PreparedLayer

NUM_RANKS = 4
SLOTS = (0, 1, 0, 1)
"""Of four layers in a ring of two. The first two bring it into a steady state, the others are timed."""
NUM_TIMED = 2
SLICE_BYTES = 4 << 20
ROUNDS = 3
MEMORY_SHARE = 0.8
TOKENS = (1, 64, 4096, 8, 512, 16, 128, 32, 256, 1024, 2, 4, 2048)
"""From coarse to fine: what the budget cuts off is the end."""


@dataclass(frozen=True)
class Step:
    """Milliseconds per layer; bytes per layer that a fetch on demand moved."""

    resident_ms: float
    staged_ms: float
    demand_ms: float
    demand_bytes: float


class Bench:
    """Layers of one shape that share their experts' memory, and both ways to fetch them."""

    def __init__(self, shape: ExpertShape) -> None:
        self.shape = shape
        self.fabric = cuda_fabric()
        self.layer = GpuLayer(self.fabric, shape.bf16_tensors(), NUM_RANKS, max(SLOTS) + 1)
        self.whole = self.layer.whole()
        for tensor in self.whole.values():
            tensor.normal_(0.0, tensor.shape[-1] ** -0.5)
        by_slot = [self.layer.composites(slot) for slot in sorted(set(SLOTS))]
        self.composites = [by_slot[slot] for slot in SLOTS]
        self.engine = self.fabric.copy_engine(NUM_RANKS - 1, 1)
        self.prepared = [self._prepare(slot) for slot in sorted(set(SLOTS))]

    def pipeline(self, demand_max_tokens: float) -> Pipeline:
        """A ring of its own; nothing may be under way in the slots."""
        layers = [self.prepared[slot] for slot in SLOTS]
        return Pipeline(self.fabric, self.engine, layers, SLOTS, demand_max_tokens)

    def check(self) -> None:
        """End the program if a layer's output depends on how its experts were fetched."""
        compute = MoeCompute(self.shape, 16)
        expected = compute.experts(compute.hidden_states, self.whole)
        for threshold in (0, math.inf):
            pipeline = self.pipeline(threshold)
            for index in range(len(SLOTS)):
                pipeline.begin(index, compute.indices)
                actual = compute.experts(compute.hidden_states, self.composites[index])
                pipeline.end(index)
                if not torch.equal(actual, expected):
                    raise SystemExit(f"error: wrong experts, demand up to {threshold} tokens")
            torch.cuda.synchronize()

    def resident_ms(self, compute: MoeCompute) -> float:
        """Of one layer with all experts in place."""

        def run() -> None:
            for _ in range(NUM_TIMED):
                compute.experts(compute.attention(), self.whole)

        return elapsed_ms(run, before=run) / NUM_TIMED

    def fetched_ms(self, compute: MoeCompute, demand_max_tokens: float) -> float:
        """Of one layer in the steady state of the ring."""
        pipeline = self.pipeline(demand_max_tokens)

        def run(layers: range) -> None:
            for index in layers:
                hidden_states = compute.attention()
                pipeline.begin(index, compute.indices)
                compute.experts(hidden_states, self.composites[index])
                pipeline.end(index)

        first = len(SLOTS) - NUM_TIMED
        timed = elapsed_ms(lambda: run(range(first, len(SLOTS))), before=lambda: run(range(first)))
        return timed / NUM_TIMED

    def _prepare(self, slot: int) -> PreparedLayer:
        ranges = self.layer.ranges(slot)
        return PreparedLayer(
            self.engine.prepare(self.layer.lanes(slot, SLICE_BYTES, NUM_RANKS - 1), ranges),
            self.layer.num_fetched_bytes,
            self.engine.prepare_demand(self.layer.experts(slot), ranges),
        )

    def measure(self, num_tokens: int, budget: Budget) -> Step:
        """Steps of ``num_tokens``."""
        compute = MoeCompute(self.shape, num_tokens)
        ms = interleaved(
            {
                "resident": lambda: self.resident_ms(compute),
                "staged": lambda: self.fetched_ms(compute, 0),
                "demand": lambda: self.fetched_ms(compute, math.inf),
            },
            ROUNDS,
            budget,
        )
        activated = compute.indices.unique()
        first_remote = self.shape.num_experts - self.layer.num_remote_experts
        num_bytes = int((activated >= first_remote).sum()) * self.layer.expert_bytes
        return Step(ms["resident"], ms["staged"], ms["demand"], num_bytes)

    def expected_crossover(self, **speeds: float) -> int:
        """By the performance model: tokens up to which demand exposes no more than staged."""
        return crossover_tokens(
            LayerFetch(
                self.layer.expert_bytes,
                self.shape.num_experts,
                self.layer.num_remote_experts,
                self.shape.top_k,
                self.shape.hidden_size,
                NUM_RANKS,
                **speeds,
            )
        )


def fitting(shape: ExpertShape, available_bytes: int) -> ExpertShape:
    """The shape with as many of its experts as memory allows; experts per token shrink alike."""
    while True:
        needed = GpuLayer.needed_bytes(shape.bf16_tensors(), NUM_RANKS, max(SLOTS) + 1)
        if needed <= available_bytes or shape.num_experts <= 8:
            return shape
        shape = replace(shape, num_experts=shape.num_experts // 2, top_k=max(1, shape.top_k // 2))


def crossover_text(steps: dict[int, Step]) -> str:
    """Between which measured numbers of tokens staged becomes the faster one."""
    tokens = sorted(steps)
    wins = [count for count in tokens if steps[count].demand_ms <= steps[count].staged_ms]
    loses = [count for count in tokens if steps[count].demand_ms > steps[count].staged_ms]
    if not tokens:
        return "not measured"
    if not loses:
        return f"demand is as fast or faster up to {tokens[-1]} tokens, the most that were measured"
    if not wins:
        return f"staged is faster from {tokens[0]} token(s) on"
    if max(wins) < min(loses):
        return f"between {max(wins)} tokens (demand) and {min(loses)} tokens (staged)"
    return (
        f"not a single one: demand wins at {', '.join(map(str, wins))} tokens, "
        f"staged at {', '.join(map(str, loses))}"
    )


def up_to(tokens: int) -> str:
    return "demand always" if tokens == MAX_TOKENS else f"demand up to {tokens} tokens"


def expectations(bench: Bench, steps: dict[int, Step]) -> list[str]:
    """What the performance model expects, for the device's link and for what was measured here."""
    notes = []
    hardware = find_hardware(bench.fabric.device_name)
    if hardware is None:
        notes.append(f"Expected over a link: no description of {bench.fabric.device_name}.")
    else:
        expected = bench.expected_crossover(
            link_gbs=hardware.link.gbs * hardware.achieved.link,
            memory_gbs=hardware.memory_gbs * hardware.achieved.memory,
            compute_tflops=hardware.peak_flops("bf16") * hardware.achieved.grouped_gemm / 1e12,
        )
        notes.append(
            f"Expected by dwdp.perf.demand with {hardware.name} peers over {hardware.link.gbs:.0f} GB/s: "
            f"{up_to(expected)}."
        )
    moved_ms = bench.engine.demand_waited_s * 1e3
    if steps and moved_ms > 0:
        staged = gbs(bench.layer.num_fetched_bytes, steps[min(steps)].staged_ms)
        demand = gbs(bench.engine.demanded_bytes, moved_ms)
        expected = bench.expected_crossover(link_gbs=staged, demand_gbs=demand)
        notes.append(
            f"Expected by dwdp.perf.demand with the bandwidths seen here (staged {staged:.0f} GB/s, on "
            f"demand {demand:.0f} GB/s): {up_to(expected)}."
        )
    return notes


def table_of(bench: Bench, steps: dict[int, Step], full: ExpertShape) -> Table:
    """The table of one shape; numbers of tokens that were not reached are not measured."""
    shape = bench.shape
    rows: list[tuple[Cell, ...]] = []
    for tokens in sorted(TOKENS):
        step = steps.get(tokens)
        if step is None:
            rows.append((tokens, *[None] * 6))
            continue
        share = step.demand_bytes / bench.layer.num_fetched_bytes
        times = (step.resident_ms, step.staged_ms, step.demand_ms)
        faster = "demand" if step.demand_ms <= step.staged_ms else "staged"
        rows.append((tokens, share, *times, over(step.demand_ms, step.staged_ms), faster))
    size = (
        f"{shape.num_experts} experts of {bench.layer.expert_bytes / 1e6:.1f} MB, top-{shape.top_k}"
    )
    scaled = (
        ""
        if shape == full
        else f" (scaled to the memory: {full.name} has {full.num_experts} experts, top-{full.top_k})"
    )
    return Table(
        f"Demand against staged: {shape.name} experts in bf16",
        (
            Column("tokens"),
            Column("remote experts activated", ".2f"),
            Column("all resident ms", ".3f"),
            Column("staged ms", ".3f"),
            Column("demand ms", ".3f"),
            Column("ratio demand / staged", ".3f"),
            Column("faster"),
        ),
        tuple(rows),
        (
            f"Per layer; {size}{scaled}; rank 0 of {NUM_RANKS}, sources in the same GPU, uniform routing.",
            f"Crossover: {crossover_text(steps)}.",
            *expectations(bench, steps),
        ),
    )


def measure_shape(full: ExpertShape, budget: Budget) -> Iterator[Table]:
    """All numbers of tokens that fit the time: the table after each of them."""
    gc.collect()
    bench = Bench(fitting(full, int(free_bytes() * MEMORY_SHARE)))
    bench.check()
    steps = {}
    for num_tokens in TOKENS:
        if budget.is_spent:
            break
        steps[num_tokens] = bench.measure(num_tokens, budget)
        yield table_of(bench, steps, full)
    yield table_of(bench, steps, full)
    bench.engine.close()


@benchmark_command
def main(budget: Budget) -> Iterator[list[Table]]:
    """Measure fetches on demand against staged ones, by tokens per step."""
    for qwen in measure_shape(QWEN3_235B, Budget(budget.left_s / 2)):
        yield [qwen]
    for r1 in measure_shape(DEEPSEEK_R1, budget):
        yield [qwen, r1]


if __name__ == "__main__":
    main()
