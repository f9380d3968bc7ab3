"""Fetch bandwidth against one large copy of the same bytes by the same means.

A fetch moves the same number of bytes as the copy, in slices, from 1 to 7 sources, over 1 to 8 lanes.
The sources are regions of one GPU, as peers' memory is where ranks share it, so the three means are:

    copy engine    within the GPU, with the hint to overlap with compute (what dwdp uses)
    plain          within the GPU, without the hint: the driver copies with the GPU's processors
    pinned host    from pinned host memory, by a copy engine over PCIe

They say nothing about NVLink. What they show is what slicing, lanes and sources cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import click
import torch
from block import DeviceBlock, PinnedBlock, fill_random
from figures import Column, Limit, Table
from harness import Budget, benchmark_command, cuda_fabric, elapsed_ms, gbs, interleaved, over

from dwdp import _C
from dwdp.fabric.base import Copy

KIB, MIB = 1 << 10, 1 << 20
MIN_RATIO = 0.95
ROUNDS = 5
MAX_SOURCES = 7

# Most telling first: what the budget cuts off is the end.
SLICES = (4 * MIB, 256 * KIB, 1 * MIB, 16 * MIB, 64 * MIB)
MEANS = ("copy engine", "plain", "pinned host")


@dataclass(frozen=True)
class Shape:
    """How a fetch is spread: sources, lanes, and slices in flight per lane."""

    sources: int
    lanes: int
    depth: int = 1


SHAPES = (
    Shape(3, 3),
    Shape(1, 1),
    Shape(7, 7),
    Shape(3, 1),
    Shape(7, 1),
    Shape(7, 4),
    Shape(7, 8),
    Shape(2, 2),
    Shape(3, 3, depth=2),
    Shape(3, 3, depth=4),
)


def lanes_of(
    sources: Sequence[int], destination: int, part_bytes: int, slice_bytes: int, num_lanes: int
) -> list[list[Copy]]:
    """The slices of ``part_bytes`` from each source address, by lane.

    With fewer lanes than sources, sources share a lane and their slices alternate; with more, the
    slices of a source alternate between its lanes.
    """
    lanes: list[list[Copy]] = [[] for _ in range(num_lanes)]
    num_sources = len(sources)
    for number, start in enumerate(range(0, part_bytes, slice_bytes)):
        num_bytes = min(slice_bytes, part_bytes - start)
        for index, source in enumerate(sources):
            own_lanes = range(index % num_lanes, num_lanes, num_sources)
            lane = own_lanes[number % len(own_lanes)]
            copy = Copy(destination + index * part_bytes + start, source + start, num_bytes)
            lanes[lane].append(copy)
    return lanes


class Bench:
    """Memory, and a timed fetch of it by one of the means."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.fabric = cuda_fabric()
        self.device = _C.CudaDevice(torch.cuda.current_device())
        self.sources = [DeviceBlock(self.fabric, total_bytes) for _ in range(MAX_SOURCES)]
        for seed, block in enumerate(self.sources):
            fill_random(block.tensor, seed)
        self.destination = DeviceBlock(self.fabric, total_bytes)
        self.pinned = PinnedBlock(total_bytes)
        self.pinned.tensor.copy_(self.sources[0].tensor)
        self.free, self.ready = self.fabric.event(), self.fabric.event()

    def part_bytes(self, num_sources: int) -> int:
        """Bytes from each source: a multiple of what kernels and copy engines like."""
        return self.total_bytes // num_sources // 4096 * 4096

    def source_tensors(self, means: str, num_sources: int) -> list[torch.Tensor]:
        part = self.part_bytes(num_sources)
        if means == "pinned host":
            return [self.pinned.tensor[i * part : (i + 1) * part] for i in range(num_sources)]
        return [block.tensor[:part] for block in self.sources[:num_sources]]

    def fetch(self, means: str, shape: Shape, slice_bytes: int) -> TimedFetch:
        tensors = self.source_tensors(means, shape.sources)
        part = self.part_bytes(shape.sources)
        addresses = [tensor.data_ptr() for tensor in tensors]
        lanes = lanes_of(addresses, self.destination.address, part, slice_bytes, shape.lanes)
        fetch = TimedFetch(self, means, lanes, shape.depth)
        fetch.check(torch.cat([tensor.cuda() for tensor in tensors]))
        return fetch

    def one_copy(self, means: str, num_bytes: int) -> TimedFetch:
        source = self.source_tensors(means, 1)[0]
        copy = Copy(self.destination.address, source.data_ptr(), num_bytes)
        return TimedFetch(self, means, [[copy]], 1)


class TimedFetch:
    """A prepared fetch on an engine of its own."""

    def __init__(
        self, bench: Bench, means: str, lanes: Sequence[Sequence[Copy]], depth: int
    ) -> None:
        self._bench = bench
        self._engine = _C.CudaCopyEngine(bench.device, len(lanes), depth, overlap=means != "plain")
        self._fetch = self._engine.prepare(lanes)

    def ms(self) -> float:
        return elapsed_ms(self._run, num_slices=self._fetch.num_slices)

    def check(self, expected: torch.Tensor) -> None:
        """Run once; end the program if the bytes did not arrive."""
        moved = self._bench.destination.tensor[: expected.numel()]
        moved.zero_()
        self._run()
        if not torch.equal(moved, expected):
            raise SystemExit("error: a fetch did not move the bytes it was to move")

    def close(self) -> None:
        self._engine.close()

    def _run(self) -> None:
        self._bench.free.record()
        self._engine.submit(self._fetch, after=self._bench.free, done=self._bench.ready)
        self._bench.ready.wait()


def measure(
    bench: Bench, means: str, shape: Shape, slice_bytes: int, budget: Budget
) -> tuple[float, float]:
    """GB/s of the fetch, and of one copy of as many bytes."""
    num_bytes = shape.sources * bench.part_bytes(shape.sources)
    fetch, one_copy = bench.fetch(means, shape, slice_bytes), bench.one_copy(means, num_bytes)
    try:
        ms = interleaved({"fetch": fetch.ms, "copy": one_copy.ms}, ROUNDS, budget)
    finally:
        fetch.close()
        one_copy.close()
    return gbs(num_bytes, ms["fetch"]), gbs(num_bytes, ms["copy"])


def table_of(figures: dict[tuple[str, Shape, int], tuple[float, float]], mib: int) -> Table:
    """The table of what was measured; the rest is not measured."""
    rows = []
    order = sorted(SHAPES, key=lambda shape: (shape.sources, shape.lanes, shape.depth))
    for means, shape, slice_bytes in product(MEANS, order, sorted(SLICES)):
        fetch, copy = figures.get((means, shape, slice_bytes), (None, None))
        size = f"{slice_bytes // MIB} MiB" if slice_bytes >= MIB else f"{slice_bytes // KIB} KiB"
        rows.append(
            (means, shape.sources, shape.lanes, shape.depth, size, fetch, copy, over(fetch, copy))
        )
    return Table(
        "Fetch bandwidth",
        (
            Column("means"),
            Column("sources"),
            Column("lanes"),
            Column("depth"),
            Column("slice"),
            Column("fetch GB/s", ".1f"),
            Column("one copy GB/s", ".1f"),
            Column("ratio", ".3f"),
        ),
        tuple(rows),
        (
            f"{mib} MiB per fetch; baseline: one copy of the same bytes by the same means in the same "
            "round. Sources are regions of one GPU (pinned host: of host memory), not peers over NVLink.",
        ),
        tuple(
            Limit.floor(f"ratio, {means}", [r[-1] for r in rows if r[0] == means], MIN_RATIO)
            for means in MEANS
        ),
    )


@benchmark_command
@click.option("--mib", default=1024, help="Size of one fetch.")
def main(budget: Budget, mib: int) -> Iterator[list[Table]]:
    """Measure fetches against one large copy of the same bytes by the same means."""
    bench = Bench(mib * MIB)
    figures = {}
    for slice_bytes, shape, means in product(SLICES, SHAPES, MEANS):
        if budget.is_spent:
            break
        figures[means, shape, slice_bytes] = measure(bench, means, shape, slice_bytes, budget)
        yield [table_of(figures, mib)]
    yield [table_of(figures, mib)]


if __name__ == "__main__":
    main()
