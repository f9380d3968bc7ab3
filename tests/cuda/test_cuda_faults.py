"""Every call of the driver can fail: nothing is lost then, and the error says what was wanted."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import cuda_processes as processes
import driver as cu
import pytest
from cuda_support import TOKEN, mapped, pattern
from driver import Driver
from standin import Standin

from dwdp import _C
from dwdp.fabric import FabricError

Scenario = Callable[[Driver, list[Any]], None]
"""Uses the fabric, putting what it makes into a list."""


def compose(driver: Driver, made: list[Any]) -> None:
    """A composite of two regions, one of them exported and imported again."""
    device = _C.CudaDevice(0)
    made.append(device)
    page = device.granularity
    assert device.choose_handle_type(False) == "posix_fd"
    regions = [_C.CudaRegion(device, pages * page, "posix_fd") for pages in (1, 2)]
    made.append(regions)
    server = _C.DescriptorServer(TOKEN)
    made.append(server)
    server.publish("pieces", regions[:1])
    made += _C.fetch_cuda_regions(device, server.address, TOKEN, "pieces", [page], 20.0)
    memory = _C.CudaAddressRange(device, 3 * page)
    made.append(memory)
    memory.map(0, made[-2])
    memory.map(page, regions[1])
    memory.enable_access(False)
    made.append(memory.bytes_capsule(0, 3 * page))
    server.close()


def fetch(driver: Driver, made: list[Any]) -> None:
    """Fetches on streams and on demand."""
    device = _C.CudaDevice(0)
    made.append(device)
    num_bytes = device.granularity
    source, target = _range(device, made), _range(device, made)
    engine = _C.CudaCopyEngine(device, 2, 2)
    made.append(engine)
    slices = [
        (target.address + start, source.address + start, num_bytes // 8)
        for start in range(0, num_bytes, num_bytes // 8)
    ]
    made.append(engine.prepare([slices[:4], slices[4:]], [source, target]))
    made.append(engine.prepare_demand([slices], [source, target]))
    free, ready = _C.CudaEvent(device), _C.CudaEvent(device)
    made += [free, ready]
    stream = made_stream(driver, made)
    free.record(stream.address)
    engine.submit(made[3 + 1], after=free, done=ready)
    ready.wait(stream.address)
    engine.fetch_activated(made[5], target.address, 1, 4, stream.address)
    ready.synchronize()
    assert engine.demanded_bytes in (0, num_bytes)


def capture(driver: Driver, made: list[Any]) -> None:
    """A fetch captured into a graph."""
    device = _C.CudaDevice(0)
    made.append(device)
    source, target = _range(device, made), _range(device, made)
    engine = _C.CudaCopyEngine(device, 1, 1)
    made.append(engine)
    fetch = engine.prepare([[(target.address, source.address, 4096)]], [source, target])
    made.append(fetch)
    free, ready = _C.CudaEvent(device), _C.CudaEvent(device)
    made += [free, ready]
    stream = made_stream(driver, made)
    with stream.capture() as graph:
        made.append(graph)
        free.record(stream.address)
        engine.submit(fetch, after=free, done=ready)
        ready.wait(stream.address)


def _range(device: _C.CudaDevice, made: list[Any]) -> _C.CudaAddressRange:
    memory = _C.CudaAddressRange(device, device.granularity)
    made.append(memory)
    memory.map(0, _C.CudaRegion(device, device.granularity, "posix_fd"))
    memory.enable_access(True)
    return memory


def made_stream(driver: Driver, made: list[Any]) -> cu.Stream:
    stream = driver.stream()
    made.append(stream)
    return stream


def give_back(made: list[Any]) -> None:
    for thing in made:
        if isinstance(thing, _C.CudaCopyEngine):
            thing.close()
    for thing in made:
        if isinstance(thing, cu.Stream | cu.Graph):
            thing.destroy()
    made.clear()


@pytest.mark.parametrize("scenario", [compose, fetch, capture])
@pytest.mark.parametrize("code", [cu.OUT_OF_MEMORY, cu.NOT_PERMITTED])
def test_no_failing_call_loses_anything(
    driver: Driver, standin: Standin, scenario: Scenario, code: int
) -> None:
    gc.collect()
    before = standin.live()
    raised: set[str] = set()
    for nth in range(1, 1000):
        made: list[Any] = []
        standin.fail("*", nth, code)
        try:
            scenario(driver, made)
        except (FabricError, cu.DriverError):
            if not standin.fault_raised():
                raise
        finally:
            failed = standin.fault_raised()
            standin.fail("", 0)
            give_back(made)
        assert standin.live() == before, f"after a failing {failed}, call {nth}"
        if not failed:
            break
        raised.add(failed)
    assert len(raised) > 8, "the scenario uses too little of the driver"
    assert nth > 30


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ("cuMemCreate", "cuMemCreate failed: CUDA_ERROR_NOT_PERMITTED .*a region of"),
        ("cuMemMap", "cuMemMap failed: CUDA_ERROR_NOT_PERMITTED .*at offset 0 of a range of"),
        ("cuMemSetAccess", "cuMemSetAccess failed: CUDA_ERROR_NOT_PERMITTED .*writable"),
        ("cuStreamCreate", "cuStreamCreate failed: CUDA_ERROR_NOT_PERMITTED"),
        ("cuMemcpyBatchAsync", "cuMemcpyBatchAsync failed: .*2 slices"),
        ("cuModuleLoadData", "cuModuleLoadData failed: .*architectures"),
    ],
)
def test_an_error_names_the_call_and_what_was_wanted(
    driver: Driver, standin: Standin, call: str, text: str
) -> None:
    made: list[Any] = []
    standin.fail(call, 1, cu.NOT_PERMITTED)
    with pytest.raises(FabricError, match=f"(?s){text}"):
        fetch(driver, made)
    give_back(made)


@pytest.mark.parametrize("call", ["cuCtxPushCurrent", "cuThreadExchangeStreamCaptureMode"])
def test_a_context_that_cannot_be_entered_is_left(
    device: _C.CudaDevice, standin: Standin, call: str
) -> None:
    before = standin.live()["current"]
    standin.fail(call, 1, cu.NOT_PERMITTED)
    with pytest.raises(FabricError, match=f"{call} failed: .*entering the context of GPU 0"):
        _C.CudaEvent(device)
    assert standin.live()["current"] == before


def test_the_fabric_works_on_after_a_failed_copy(
    driver: Driver, device: _C.CudaDevice, standin: Standin
) -> None:
    source, target = (mapped(driver, device, 4096, seed=i) for i in range(2))
    engine, done = _C.CudaCopyEngine(device, 2, 1), _C.CudaEvent(device)
    fetch = engine.prepare(
        [
            [(target.address, source.address, 2048)],
            [(target.address + 2048, source.address + 2048, 2048)],
        ]
    )
    standin.fail("cuMemcpyBatchAsync", 2, cu.OUT_OF_MEMORY)
    with pytest.raises(FabricError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        engine.submit(fetch, after=None, done=done)
    engine.submit(fetch, after=None, done=done)
    done.synchronize()
    assert driver.read(target.address, 4096) == pattern(0, 4096)
    engine.close()


@pytest.mark.parametrize("code", [cu.INVALID_VALUE, cu.NOT_SUPPORTED, cu.NOT_PERMITTED])
def test_a_driver_that_maps_nothing_read_only_is_asked_once_and_served(
    driver: Driver, device: _C.CudaDevice, standin: Standin, code: int
) -> None:
    page = device.granularity
    region = _C.CudaRegion(device, page, "posix_fd")
    standin.fail("cuMemSetAccess", 1, code)
    calls = standin.calls("cuMemSetAccess")
    for expected in (2, 3):
        memory = _C.CudaAddressRange(device, page)
        memory.map(0, region)
        memory.enable_access(False)
        assert standin.calls("cuMemSetAccess") == calls + expected
        assert driver.read(memory.address, page) == bytes(page)


# Machines on which it cannot work


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"DEVICES": 0}, "cuInit failed: CUDA_ERROR_NO_DEVICE .*sees no GPU"),
        ({"DRIVER_VERSION": 11020}, "lacks cu[A-Za-z]+; install one of CUDA 12.0 or newer"),
        ({"HIDE": "cuMemSetAccess"}, "lacks cuMemSetAccess; install one of CUDA 12.0 or newer"),
        ({"VMM": 0}, "does not support virtual memory management"),
        ({"POSIX": 0}, "neither as file descriptors nor as fabric handles"),
        ({"POSIX": 0, "FABRIC": "deny-create"}, "by fabric handles, .*CUDA_ERROR_NOT_PERMITTED"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("standin", "device")
def test_an_unusable_machine_is_one_clear_error(settings: dict[str, object], text: str) -> None:
    outcome = processes.outcome_of("open_device", settings)
    assert isinstance(outcome, str)
    with pytest.raises(FabricError, match=f"(?s){text}"):
        raise FabricError(outcome)


@pytest.mark.usefixtures("standin", "device")
def test_only_fabric_handles_will_do_on_one_host_too() -> None:
    assert processes.outcome_of("open_device", {"POSIX": 0, "FABRIC": 1}) == ("fabric", 65536)


def test_no_driver_is_one_clear_error(driver: Driver, standin: Standin) -> None:
    assert "the NVIDIA driver is not installed" in processes.outcome_of("open_without_driver")


def test_devices_without_peer_access_say_so(standin: Standin) -> None:
    standin.set("DEVICES", 2)
    assert [_C.CudaDevice(0).can_access_peer(ordinal) for ordinal in (0, 1)] == [True, True]
    standin.set("PEER_ACCESS", 0)
    assert [_C.CudaDevice(1).can_access_peer(ordinal) for ordinal in (0, 1)] == [False, True]
    with pytest.raises(FabricError, match="there is no GPU 2: this process sees 2"):
        _C.CudaDevice(2)
