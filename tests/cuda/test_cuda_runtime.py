"""The whole runtime over the CUDA fabric of the stand-in: ranks are threads, compute is a stream each."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import driver as cu
import pytest
import torch
from cuda_support import StandinCompute
from driver import Driver, Stream
from ranks import layers_of, load, reference, run_ranks
from standin import Standin

from dwdp.config import DwdpConfig
from dwdp.fabric import FabricError
from dwdp.fabric.cuda import CudaFabric
from dwdp.fabric.cuda_devices import list_devices
from dwdp.group import Group
from dwdp.rendezvous import GroupError, PeerFailure
from dwdp.runtime import DwdpRuntime
from dwdp.weights import LayerSpec

MODES = ("staged", "direct", "demand", "auto")


@pytest.fixture(autouse=True)
def devices_are_asked_for_anew(standin: Standin, device: object) -> Iterator[None]:
    list_devices.cache_clear()
    yield
    list_devices.cache_clear()


def odd_layers(num_layers: int = 4) -> list[LayerSpec]:
    """Experts that end in the midst of pages, and a tensor small enough to be packed."""
    return layers_of((30, 1100), (700, 30), (5,), num_layers=num_layers, num_experts=10)


@contextmanager
def attached(
    driver: Driver, group: Group, config: DwdpConfig, layers: list[LayerSpec]
) -> Iterator[tuple[DwdpRuntime, Stream]]:
    """A runtime with its experts loaded, in a thread that is a rank, and its stream of compute."""
    driver.make_current()
    stream = driver.stream()
    try:
        fabric = CudaFabric(0, compute=StandinCompute(driver, stream))
        with DwdpRuntime(group, config, fabric) as runtime:
            load(runtime.allocate(layers), group.rank, reference(layers))
            runtime.attach()
            yield runtime, stream
    finally:
        stream.destroy()


def forward(
    driver: Driver,
    runtime: DwdpRuntime,
    stream: Stream,
    layers: list[LayerSpec],
    results: list[Any],
) -> None:
    """Compute is a copy of every composite tensor to the host, in the order of the stream."""
    for index, layer in enumerate(layers):
        indices = torch.arange(layer.num_experts, dtype=torch.int64)[None]
        runtime.begin(index, indices)
        for spec in layer.tensors:
            tensor = runtime.tensors(index)[spec.name]
            result = torch.zeros_like(tensor)
            num_bytes = result.numel() * result.itemsize
            driver.copy(result.data_ptr(), tensor.data_ptr(), num_bytes, stream)
            results.append((index, spec.name, result, indices))
        runtime.end(index)


def wrong(results: list[Any], layers: list[LayerSpec]) -> list[tuple[int, str]]:
    full = reference(layers)
    return [
        (index, name)
        for index, name, result, _ in results
        if not torch.equal(result.view(torch.int32), full[index][name].view(torch.int32))
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_every_rank_reads_every_expert_however_late_things_are(
    driver: Driver, standin: Standin, mode: str, num_ranks: int
) -> None:
    layers = odd_layers()
    config = DwdpConfig(
        dwdp_size=num_ranks, fetch_mode=mode, slice_bytes=100_000, demand_max_tokens=1
    )
    attached_ones = iter(range(num_ranks))

    def body(group: Group) -> list[tuple[int, str]]:
        with attached(driver, group, config, layers) as (runtime, stream):
            if next(attached_ones) == num_ranks - 1:
                standin.set("JITTER_US", 1000)
            results: list[Any] = []
            for _ in range(4):
                forward(driver, runtime, stream, layers, results)
            stream.synchronize()
            return wrong(results, layers)

    assert run_ranks(num_ranks, body) == [[]] * num_ranks


def test_peers_memory_takes_no_access_call_of_its_own_for_every_tensor(
    driver: Driver, standin: Standin
) -> None:
    """Of NVLink fabric memory each call takes a routing entry, and there are about 900."""
    config = DwdpConfig(dwdp_size=3, fetch_mode="staged")

    def num_lasting_calls() -> int:
        # Memory that is new is mapped by itself for a moment, to be zeroed.
        return standin.calls("cuMemSetAccess") - standin.calls("cuMemCreate")

    def num_calls_to_attach(num_layers: int) -> int:
        layers = odd_layers(num_layers)

        def body(group: Group) -> None:
            with attached(driver, group, config, layers):
                return

        before = num_lasting_calls()
        run_ranks(3, body)
        return num_lasting_calls() - before

    # One where a rank's own experts are loaded, and one for the composite tensor.
    num_ranges, num_large_tensors = 2, 2
    more = num_calls_to_attach(6) - num_calls_to_attach(4)
    assert more == 2 * 3 * num_large_tensors * num_ranges


@pytest.mark.parametrize("mode", ["staged", "demand"])
def test_a_captured_forward_replays_right(driver: Driver, standin: Standin, mode: str) -> None:
    """Amid forwards that are not captured, and with replays close on each other."""
    layers = odd_layers(num_layers=3)
    config = DwdpConfig(dwdp_size=2, fetch_mode=mode)

    def body(group: Group) -> list[tuple[int, str]]:
        with attached(driver, group, config, layers) as (runtime, stream):
            found: list[Any] = []
            forward(driver, runtime, stream, layers, found)
            captured: list[Any] = []
            with stream.capture() as graph:
                forward(driver, runtime, stream, layers, captured)
            graph.instantiate()
            wrong_ones = []
            for _ in range(3):
                for _, _, result, _ in captured:
                    result.zero_()
                for _ in range(3):
                    graph.launch(stream)
                forward(driver, runtime, stream, layers, found)
                stream.synchronize()
                wrong_ones += wrong(captured, layers)
            graph.destroy()
            return wrong_ones + wrong(found, layers)

    standin.set("JITTER_US", 500)
    assert run_ranks(2, body) == [[], []]


@pytest.mark.parametrize("num_layers", [4, 5])
@pytest.mark.usefixtures("standin")
def test_a_forward_that_finds_nothing_fetched_fills_every_slot_at_once(
    driver: Driver, num_layers: int
) -> None:
    """In a graph, and without one after it. Of 5 layers in 2 slots, the last one has a third slot."""
    layers = odd_layers(num_layers)
    config = DwdpConfig(dwdp_size=2, fetch_mode="staged", num_slots=2)
    num_slots = 2 + num_layers % 2

    def fetches_in_begin(runtime: DwdpRuntime) -> list[int]:
        """Of one forward, by layer."""
        counts = []
        for index in range(num_layers):
            before = runtime.stats().num_fetches
            runtime.begin(index)
            counts.append(runtime.stats().num_fetches - before)
            runtime.end(index)
        return counts

    def body(group: Group) -> list[list[int]]:
        with attached(driver, group, config, layers) as (runtime, stream):
            counts = [fetches_in_begin(runtime)]
            with stream.capture() as graph:
                counts.append(fetches_in_begin(runtime))
            graph.destroy()
            counts += [fetches_in_begin(runtime) for _ in range(2)]
            stream.synchronize()
            return counts

    at_once = [num_slots] + [0] * (num_layers - 1)
    assert run_ranks(2, body) == [[[0] * num_layers, at_once, at_once, at_once]] * 2


def attach_and_run(
    driver: Driver, mode: str, layers: list[LayerSpec], at_end: Callable[[], None] = lambda: None
) -> list[Any]:
    """Attach two ranks and run a forward; returns what was read wrong on each."""
    config = DwdpConfig(dwdp_size=2, fetch_mode=mode)

    def body(group: Group) -> list[tuple[int, str]]:
        with attached(driver, group, config, layers) as (runtime, stream):
            results: list[Any] = []
            forward(driver, runtime, stream, layers, results)
            stream.synchronize()
            at_end()
            return wrong(results, layers)

    return run_ranks(2, body, timeout_s=20.0)


@pytest.mark.parametrize("mode", ["staged", "demand"])
def test_running_out_of_memory_while_attaching_leaves_the_process_usable(
    driver: Driver, standin: Standin, mode: str
) -> None:
    layers = odd_layers()
    before = standin.live()
    assert attach_and_run(driver, mode, layers) == [[], []]
    for megabytes in (0, 2, 8, 10):
        standin.set("MEMORY_BYTES", megabytes << 20)
        if fails(lambda: attach_and_run(driver, mode, layers)) != "CUDA_ERROR_OUT_OF_MEMORY":
            pytest.fail(f"{megabytes} MiB are not too little, or the error does not say so")
        gc.collect()
        assert standin.live() == before
    standin.set("MEMORY_BYTES", "")
    assert attach_and_run(driver, mode, layers) == [[], []]


def test_a_failing_call_while_attaching_ends_the_group_and_leaves_nothing(
    driver: Driver, standin: Standin
) -> None:
    """Wherever it fails, on whichever rank."""
    layers = odd_layers(num_layers=2)
    before = standin.live()
    first = standin.calls("*")
    ends: list[int] = []
    attach_and_run(driver, "staged", layers, lambda: ends.append(standin.calls("*")))
    num_calls = min(ends) - first  # detaching is not among them: what cannot be given back stays
    for nth in range(1, num_calls, num_calls // 16):
        standin.fail("*", nth, cu.NOT_PERMITTED)
        try:
            fails(lambda: attach_and_run(driver, "staged", layers))
        finally:
            failed = standin.fault_raised()
            standin.fail("", 0)
        gc.collect()
        assert standin.live() == before, f"after a failing {failed}, call {nth} of {num_calls}"


def fails(action: Callable[[], object]) -> str:
    """The name of the driver's error that ``action`` ends with, on any rank; empty without one."""
    try:
        action()
    except (FabricError, GroupError, PeerFailure, cu.DriverError) as error:
        found = re.search(r"CUDA_ERROR_\w+", str(error))
        return found.group() if found else str(error)
    return ""
