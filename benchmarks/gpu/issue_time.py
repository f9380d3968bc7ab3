"""Host time to issue one fetch of a DeepSeek-R1-sized layer (NVFP4, four ranks).

    dwdp              one submit of a fetch that was prepared once
    torch copy_       one non-blocking ``copy_`` per slice, between views made beforehand
    cuda-python       one ``cuMemcpyBatchAsync`` through cuda-python, from lists made beforehand

All move the same slices with the GPU idle, so that only issuing is timed. Copies by torch are issued
in groups, with the device synchronised in between: else a full launch queue would be timed too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click
import torch
from figures import Column, Limit, Table
from harness import Budget, benchmark_command, cuda_fabric, interleaved, over
from layer import DEEPSEEK_R1, GpuLayer

from dwdp.fabric.base import Copy, Fabric

NUM_RANKS = 4
MAX_RATIO = 1 / 3
ROUNDS = 15
GROUP = 256
"""Copies between two synchronisations: a quarter of what CUDA's launch queue is known to hold."""

OURS, TORCH, LISTS = "dwdp, prepared once", "torch copy_ per slice", "cuda-python, lists"


def issue_time_us(issue: Callable[[], object]) -> float:
    """Host time of ``issue`` in microseconds, with an idle device."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    issue()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds * 1e6


def submit(layer: GpuLayer, fabric: Fabric, slice_bytes: int) -> Callable[[], float]:
    """Ours: prepared once, submitted every time."""
    lanes = layer.lanes(0, slice_bytes, NUM_RANKS - 1)
    engine = fabric.copy_engine(NUM_RANKS - 1, 1)
    fetch = engine.prepare(lanes, layer.ranges(0))
    free, ready = fabric.event(), fabric.event()
    free.record()
    return lambda: issue_time_us(lambda: engine.submit(fetch, after=free, done=ready))


def copies_by_torch(layer: GpuLayer, slice_bytes: int) -> Callable[[], float]:
    """One ``copy_`` per slice, on a stream of its own."""
    views = layer.slice_views(0, slice_bytes)
    stream = torch.cuda.Stream()

    def issue(group: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for destination, source in group:
            destination.copy_(source, non_blocking=True)

    def measure() -> float:
        with torch.cuda.stream(stream):
            groups = [views[start : start + GROUP] for start in range(0, len(views), GROUP)]
            return sum(issue_time_us(lambda group=group: issue(group)) for group in groups)

    return measure


def batch_from_lists(copies: Sequence[Copy]) -> Callable[[], float] | str:
    """One batch through cuda-python; why not, where that cannot be."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return "cuda-python is not installed"
    if not hasattr(driver, "cuMemcpyBatchAsync"):
        return "this cuda-python has no cuMemcpyBatchAsync"
    attributes = driver.CUmemcpyAttributes()
    attributes.srcAccessOrder = driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_ANY
    attributes.flags = int(driver.CUmemcpyFlags.CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE)
    destinations = [driver.CUdeviceptr(copy.dst) for copy in copies]
    sources = [driver.CUdeviceptr(copy.src) for copy in copies]
    sizes = [copy.num_bytes for copy in copies]
    torch_stream = torch.cuda.Stream()
    stream = driver.CUstream(torch_stream.cuda_stream)

    def issue() -> tuple[Any, ...]:
        answer: tuple[Any, ...] = driver.cuMemcpyBatchAsync(
            destinations, sources, sizes, len(sizes), [attributes], [0], 1, stream
        )
        return answer

    try:
        result = issue()[0]
    except Exception as error:  # A signature of another release.
        return f"cuMemcpyBatchAsync of this cuda-python: {type(error).__name__}: {error}"
    torch.cuda.synchronize()
    if result != driver.CUresult.CUDA_SUCCESS:
        return f"cuMemcpyBatchAsync of this cuda-python: {result.name}"
    # The stream goes with the function, and the function with the stream.
    return lambda: issue_time_us(lambda: (issue(), torch_stream))


def table_of(us: dict[str, float], num_slices: int, why_not: str) -> Table:
    """The table of issue times; ``why_not`` says why a baseline is missing."""
    best = min((us[name] for name in (TORCH, LISTS) if name in us), default=None)
    rows = [
        (
            name,
            num_slices,
            us.get(name),
            us[name] * 1e3 / num_slices if name in us else None,
            over(us.get(name), best),
        )
        for name in (OURS, TORCH, LISTS)
    ]
    notes = [
        "One MoE layer of DeepSeek-R1 in NVFP4 for rank 0 of 4. Ratio: over the better of the other two."
    ]
    if why_not:
        notes.append(f"{LISTS}: not measured: {why_not}.")
    return Table(
        "Host time to issue one fetch",
        (
            Column("how"),
            Column("slices"),
            Column("host us", ".1f"),
            Column("ns per slice", ".0f"),
            Column("ratio", ".3f"),
        ),
        tuple(rows),
        tuple(notes),
        (Limit("ratio to the better baseline", over(us.get(OURS), best), at_most=MAX_RATIO),),
    )


@benchmark_command
@click.option(
    "--slice-mib", default=4, help="Largest slice (the default of --slice-bytes is 4 MiB)."
)
def main(budget: Budget, slice_mib: int) -> Iterator[list[Table]]:
    """Measure the host time to issue one fetch of a DeepSeek-R1-sized layer."""
    fabric = cuda_fabric()
    layer = GpuLayer(fabric, DEEPSEEK_R1.nvfp4_tensors(), NUM_RANKS, num_slots=1)
    slice_bytes = slice_mib << 20
    copies = [copy for lane in layer.lanes(0, slice_bytes, NUM_RANKS - 1) for copy in lane]
    variants = {
        OURS: submit(layer, fabric, slice_bytes),
        TORCH: copies_by_torch(layer, slice_bytes),
    }
    lists = batch_from_lists(copies)
    if not isinstance(lists, str):
        variants[LISTS] = lists
    us = interleaved(variants, ROUNDS, budget)
    yield [table_of(us, len(copies), lists if isinstance(lists, str) else "")]


if __name__ == "__main__":
    main()
