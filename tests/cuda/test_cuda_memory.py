"""Regions and address ranges of the CUDA fabric, within one process and across several."""

from __future__ import annotations

import gc
import os
import re
import signal

import cuda_processes as processes
import driver as cu
import pytest
from cuda_support import TOKEN, capsule_tensor, mapped, pattern
from driver import Driver
from standin import Standin

from dwdp import _C
from dwdp.fabric import FabricError


def test_region_is_zeroed_memory(driver: Driver, device: _C.CudaDevice) -> None:
    num_bytes = 3 * device.granularity
    memory = mapped(driver, device, num_bytes)
    assert driver.read(memory.address, num_bytes) == bytes(num_bytes)


@pytest.mark.parametrize("num_bytes", [0, 1, 4096])
def test_sizes_are_multiples_of_the_granularity(device: _C.CudaDevice, num_bytes: int) -> None:
    for make in (
        lambda: _C.CudaRegion(device, num_bytes, "posix_fd"),
        lambda: _C.CudaAddressRange(device, num_bytes),
    ):
        with pytest.raises(FabricError, match=f"multiple of {device.granularity} bytes"):
            make()


def test_a_composite_is_made_accessible_by_one_call_for_each_run_of_regions(
    driver: Driver, device: _C.CudaDevice, standin: Standin
) -> None:
    """A call takes an entry of a table of about 900 on NVLink fabric, whatever its size."""
    page = device.granularity
    regions = [_C.CudaRegion(device, pages * page, "posix_fd") for pages in (1, 3, 2)]
    tiled, holed = _C.CudaAddressRange(device, 6 * page), _C.CudaAddressRange(device, 8 * page)
    for address_range, offsets, num_runs in ((tiled, (5, 0, 3), 1), (holed, (0, 1, 6), 2)):
        for region, offset in zip(regions, offsets, strict=True):
            address_range.map(offset * page, region)
        before = standin.calls("cuMemSetAccess")
        address_range.enable_access(False)
        assert standin.calls("cuMemSetAccess") == before + num_runs
    with pytest.raises(cu.DriverError):
        driver.write(tiled.address, b"x")  # made readable only


def test_one_region_seen_through_two_ranges_is_one_memory(
    driver: Driver, device: _C.CudaDevice
) -> None:
    page = device.granularity
    region = _C.CudaRegion(device, page, "posix_fd")
    ranges = [_C.CudaAddressRange(device, 2 * page) for _ in range(2)]
    for offset, address_range in zip((0, page), ranges, strict=True):
        address_range.map(offset, region)
        address_range.enable_access(True)
    region.close()
    driver.write(ranges[0].address + 100, b"seen twice")
    assert driver.read(ranges[1].address + page + 100, 10) == b"seen twice"
    with pytest.raises(FabricError, match="is closed"):
        ranges[0].map(page, region)


def test_a_view_keeps_the_range_mapped(driver: Driver, device: _C.CudaDevice) -> None:
    memory = mapped(driver, device, 2 * device.granularity, seed=1)
    expected = pattern(1, 2 * device.granularity)[10:20]
    capsule = memory.bytes_capsule(10, 10)
    view = capsule_tensor(capsule)
    assert (view.device_type, view.device_id, view.num_bytes) == (2, 0, 10)
    assert view.data == memory.address + 10
    memory.close()
    with pytest.raises(FabricError, match="is closed"):
        memory.address  # noqa: B018
    del memory
    gc.collect()
    assert driver.read(view.data, 10) == expected


def test_a_range_goes_only_when_the_gpu_has_finished(
    driver: Driver, device: _C.CudaDevice, standin: Standin
) -> None:
    """Closing while a copy is under way: the copy ends well, and then nothing is mapped any more."""
    source = mapped(driver, device, 4 * device.granularity, seed=2)
    target = driver.allocate(4 * device.granularity)
    stream = driver.stream()
    device.spin(stream.address, 30_000_000)
    driver.copy(target, source.address, 4 * device.granularity, stream)
    source.close()
    stream.synchronize()
    assert standin.context_error() == 0
    assert driver.read(target, 4 * device.granularity) == pattern(2, 4 * device.granularity)
    driver.free(target)
    stream.destroy()


def test_a_range_that_goes_during_a_capture_leaves_the_capture_valid(
    driver: Driver, device: _C.CudaDevice
) -> None:
    """As when the garbage collector finds an old tensor: the GPU cannot be waited for then."""
    stream = driver.stream()
    kept, dropped = (mapped(driver, device, device.granularity, seed=i) for i in range(2))
    event = _C.CudaEvent(device)
    with stream.capture() as graph:
        event.record(stream.address)
        driver.copy(kept.address, kept.address + 512, 512, stream)
        dropped.close()
        event.wait(stream.address)
    graph.instantiate().launch(stream)
    stream.synchronize()
    assert driver.read(kept.address, 512) == pattern(0, 1024)[512:]
    graph.destroy()
    kept.close()  # lets go of both, and of the stream
    stream.destroy()


def test_running_out_of_memory_names_both_sizes_and_leaves_the_process_usable(
    driver: Driver, device: _C.CudaDevice, standin: Standin
) -> None:
    page = device.granularity
    standin.set("MEMORY_BYTES", standin.live()["memory_bytes"] + 3 * page)
    held = _C.CudaRegion(device, 2 * page, "posix_fd")
    text = f"a region of {2 * page} bytes is wanted, but only {page} bytes are free"
    with pytest.raises(FabricError, match=text):
        _C.CudaRegion(device, 2 * page, "posix_fd")
    held.close()
    memory = mapped(driver, device, 3 * page, seed=3)
    assert driver.read(memory.address, 3 * page) == pattern(3, 3 * page)


# Other processes


def test_a_peers_region_is_read_only_and_outlives_the_peer(
    driver: Driver, device: _C.CudaDevice
) -> None:
    page = device.granularity
    sizes = [page, 3 * page]
    process, connection = processes.start(processes.publish, [4, 5], [1, 3])
    address = connection.recv()
    regions = _C.fetch_cuda_regions(device, address, TOKEN, "pieces", sizes, 20.0)
    memory = _C.CudaAddressRange(device, 4 * page)
    memory.map(3 * page, regions[0])
    memory.map(0, regions[1])
    with pytest.raises(FabricError, match="received from a peer: it is read-only"):
        memory.enable_access(True)
    memory.enable_access(False)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    for region in regions:
        assert region.imported
        region.close()
    data = driver.read(memory.address, 4 * page)
    assert data == pattern(5, 3 * page) + pattern(4, page)


def test_a_region_of_another_size_is_refused(device: _C.CudaDevice) -> None:
    """At the latest when it is mapped: the driver does not tell how large imported memory is."""
    page = device.granularity
    server = _C.DescriptorServer(TOKEN)
    server.publish("pieces", [_C.CudaRegion(device, page, "posix_fd")])

    def fetch_and_map() -> None:
        [region] = _C.fetch_cuda_regions(device, server.address, TOKEN, "pieces", [2 * page], 20.0)
        _C.CudaAddressRange(device, 2 * page).map(0, region)

    with pytest.raises(FabricError, match=f"{2 * page}"):
        fetch_and_map()
    server.close()


def test_fabric_handles_reach_other_processes(driver: Driver, standin: Standin) -> None:
    standin.set("FABRIC", "1")
    device = _C.CudaDevice(0)
    page = device.granularity
    assert device.choose_handle_type(True) == "fabric"
    assert device.choose_handle_type(False) == "posix_fd"
    process, connection = processes.start(processes.export_fabric, 6, 2)
    handle = connection.recv()
    region = _C.CudaRegion.import_fabric(device, handle, 2 * page)
    connection.send("stop")
    process.join()
    memory = _C.CudaAddressRange(device, 2 * page)
    memory.map(0, region)
    memory.enable_access(False)
    assert driver.read(memory.address, 2 * page) == pattern(6, 2 * page)


@pytest.mark.parametrize("fabric", ["0", "deny-create", "deny-export"])
def test_without_fabric_handles_several_hosts_are_refused_with_the_cause(
    standin: Standin, fabric: str
) -> None:
    standin.set("FABRIC", fabric)
    device = _C.CudaDevice(0)
    assert device.choose_handle_type(False) == "posix_fd"
    cause = "has no fabric handles" if fabric == "0" else "CUDA_ERROR_NOT_PERMITTED.*IMEX"
    with pytest.raises(FabricError, match=re.compile(cause, re.DOTALL)):
        device.choose_handle_type(True)


def test_a_forked_child_ends_quietly(driver: Driver, device: _C.CudaDevice) -> None:
    """It inherits objects whose driver it cannot call."""
    memory = mapped(driver, device, device.granularity)
    child = os.fork()
    if child == 0:
        try:
            memory.close()
            del memory, device
            gc.collect()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
