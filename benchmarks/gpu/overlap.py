"""Overlap: layers of attention and grouped GEMM with a fetch behind each of them.

The ring is dwdp's own (:class:`dwdp.pipeline.Pipeline`). For every means of copying, the fetch is sized to
take half as long as a layer's compute, as long, and twice as long; the fetch and the compute are also run
alone. With perfect overlap an iteration takes max(compute, fetch), without any it takes their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import click
import torch
from block import DeviceBlock, PinnedBlock, fill_random
from figures import Cell, Column, Table
from harness import (
    Budget,
    benchmark_command,
    cuda_fabric,
    elapsed_ms,
    gbs,
    interleaved,
    nothing,
    over,
)
from layer import QWEN3_235B
from moe_layer import MoeCompute, random_experts

from dwdp import _C
from dwdp.fabric.base import Copy
from dwdp.pipeline import Pipeline, PreparedLayer, assign_slots

MIB = 1 << 20
NUM_LAYERS, NUM_SLOTS, NUM_SOURCES = 4, 2, 3
SLICE_BYTES = 4 * MIB
RATIOS = (0.5, 1.0, 2.0)
ROUNDS = 5
MEANS = ("copy engine", "pinned host", "plain")
MAX_FETCH_BYTES = 6 << 30


@dataclass(frozen=True)
class Measured:
    """Milliseconds per layer, and the fetch's bytes."""

    num_bytes: int
    compute_ms: float
    fetch_ms: float
    together_ms: float


class Bench:
    """Compute of one layer, and memory that fetches run between."""

    def __init__(self, sequence_length: int, num_sequences: int) -> None:
        self.fabric = cuda_fabric()
        self.device = _C.CudaDevice(torch.cuda.current_device())
        self.compute = MoeCompute(QWEN3_235B, sequence_length, num_sequences)
        self.experts = random_experts(QWEN3_235B)
        self.source = DeviceBlock(self.fabric, 1 << 30)
        fill_random(self.source.tensor, 0)
        self.pinned = PinnedBlock(1 << 30)
        self.pinned.tensor.copy_(self.source.tensor)
        self.slots = [DeviceBlock(self.fabric, 1 << 30) for _ in range(NUM_SLOTS)]

    def engine(self, means: str) -> _C.CudaCopyEngine:
        return _C.CudaCopyEngine(self.device, NUM_SOURCES, 1, overlap=means != "plain")

    def lanes(self, means: str, slot: int, num_bytes: int) -> list[list[Copy]]:
        """Slices of ``num_bytes`` in all; they go round through a block as often as that takes."""
        source = (self.pinned if means == "pinned host" else self.source).address
        num_slots_in_block = (1 << 30) // SLICE_BYTES
        lanes: list[list[Copy]] = [[] for _ in range(NUM_SOURCES)]
        for number in range(num_bytes // SLICE_BYTES):
            offset = number % num_slots_in_block * SLICE_BYTES
            copy = Copy(self.slots[slot].address + offset, source + offset, SLICE_BYTES)
            lanes[number % NUM_SOURCES].append(copy)
        return lanes

    def pipeline(self, means: str, num_bytes: int) -> Pipeline:
        """Every layer fetches ``num_bytes`` into its slot."""
        engine = self.engine(means)
        slots = assign_slots(NUM_LAYERS, NUM_SLOTS)
        by_slot = [engine.prepare(self.lanes(means, slot, num_bytes)) for slot in range(NUM_SLOTS)]
        layers = [PreparedLayer(by_slot[slot], num_bytes) for slot in slots]
        pipeline = Pipeline(self.fabric, engine, layers, slots)
        pipeline.start()
        return pipeline

    def run_layer(self) -> None:
        self.compute.experts(self.compute.attention(), self.experts)

    def compute_ms(self) -> float:
        """Of one layer."""
        return elapsed_ms(lambda: repeat(NUM_LAYERS, self.run_layer)) / NUM_LAYERS

    def bandwidth_gbs(self, means: str) -> float:
        """Of fetches that nothing runs beside."""
        num_bytes = 1 << 30
        pipeline = self.pipeline(means, num_bytes)
        try:
            ms = interleaved({"fetch": lambda: self.fetch_ms(pipeline)}, 2)["fetch"]
        finally:
            close(pipeline)
        return gbs(num_bytes, ms)

    def fetch_ms(self, pipeline: Pipeline) -> float:
        """Of one layer's fetch, in a ring that does nothing else."""
        return steady_ms(lambda: forward(pipeline, (nothing, nothing)))

    def together_ms(self, pipeline: Pipeline) -> float:
        """Of one layer with the fetches of the layers behind it."""

        def experts() -> None:
            self.compute.experts(self.compute.hidden_states, self.experts)

        return steady_ms(lambda: forward(pipeline, (self.compute.attention, experts)))


def forward(pipeline: Pipeline, layer: tuple[Callable[[], object], Callable[[], object]]) -> None:
    attention, experts = layer
    for index in range(NUM_LAYERS):
        attention()
        pipeline.begin(index)
        experts()
        pipeline.end(index)


def steady_ms(run: Callable[[], None]) -> float:
    """Per layer: a forward that brings the ring into its steady state, then one that is timed."""
    return elapsed_ms(run, before=run) / NUM_LAYERS


def repeat(times: int, work: Callable[[], object]) -> None:
    for _ in range(times):
        work()


def close(pipeline: Pipeline) -> None:
    torch.cuda.synchronize()
    pipeline.close()


def measure(bench: Bench, means: str, num_bytes: int, budget: Budget) -> Measured:
    """One size of fetch by one means."""
    pipeline = bench.pipeline(means, num_bytes)
    try:
        ms = interleaved(
            {
                "compute": bench.compute_ms,
                "fetch": lambda: bench.fetch_ms(pipeline),
                "together": lambda: bench.together_ms(pipeline),
            },
            ROUNDS,
            budget,
        )
    finally:
        close(pipeline)
    return Measured(num_bytes, ms["compute"], ms["fetch"], ms["together"])


def table_of(figures: dict[tuple[str, float], Measured], title: str) -> Table:
    """The table of what was measured; the rest is not measured."""
    return Table(
        title,
        (
            Column("means"),
            Column("fetch MiB", ".0f"),
            Column("compute ms", ".3f"),
            Column("fetch ms", ".3f"),
            Column("together ms", ".3f"),
            Column("ratio to max(compute, fetch)", ".3f"),
            Column("ratio to compute + fetch", ".3f"),
        ),
        tuple(
            row_of(means, figures.get((means, ratio))) for means, ratio in product(MEANS, RATIOS)
        ),
        (
            "Per layer. Baselines: the same compute and the same fetches alone, in the same rounds. "
            "1 in the first ratio is perfect overlap, 1 in the second is none.",
        ),
    )


def row_of(means: str, figures: Measured | None) -> tuple[Cell, ...]:
    if figures is None:
        return (means, *[None] * 6)
    compute, fetch, together = figures.compute_ms, figures.fetch_ms, figures.together_ms
    ratios = (over(together, max(compute, fetch)), over(together, compute + fetch))
    return (means, figures.num_bytes / MIB, compute, fetch, together, *ratios)


def fetch_sizes(compute_ms: float, bandwidth_gbs: float) -> Sequence[int]:
    """Bytes, in whole slices, whose fetch takes each of RATIOS times the compute."""
    per_ratio = compute_ms * 1e-3 * bandwidth_gbs * 1e9
    wanted = [min(MAX_FETCH_BYTES, int(ratio * per_ratio)) for ratio in RATIOS]
    return [max(NUM_SOURCES, num_bytes // SLICE_BYTES) * SLICE_BYTES for num_bytes in wanted]


@benchmark_command
@click.option("--sequence-length", default=8192)
@click.option("--num-sequences", default=1)
def main(budget: Budget, sequence_length: int, num_sequences: int) -> Iterator[list[Table]]:
    """Measure layers of attention and grouped GEMM with fetches behind them."""
    bench = Bench(sequence_length, num_sequences)
    compute_ms = interleaved({"compute": bench.compute_ms}, 3)["compute"]
    title = (
        f"Overlap: a layer of {QWEN3_235B.name} shape (bf16, {num_sequences} x {sequence_length} tokens) "
        "with a fetch behind it"
    )
    figures = {}
    for means in MEANS:
        if budget.is_spent:
            break
        sizes = fetch_sizes(compute_ms, bench.bandwidth_gbs(means))
        for ratio, num_bytes in zip(RATIOS, sizes, strict=True):
            if not budget.is_spent:
                figures[means, ratio] = measure(bench, means, num_bytes, budget)
                yield [table_of(figures, title)]
    yield [table_of(figures, title)]


if __name__ == "__main__":
    main()
