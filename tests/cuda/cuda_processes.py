"""What the other processes of the CUDA tests do."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import random
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from typing import Any, NamedTuple

import standin
from cuda_support import TOKEN, mapped, pattern, random_lanes
from driver import Driver, DriverError

from dwdp import _C
from dwdp.fabric import FabricError


def load_driver(**settings: object) -> Driver:
    """The driver that the tests use, in a fresh process; settings are for the stand-in."""
    if os.environ.get("DWDP_TEST_DRIVER") != "standin" and standin.real_device():
        return Driver(ctypes.CDLL("libcuda.so.1"))
    loaded = standin.Standin()
    for name, value in {"GRANULARITY": 64 << 10, **settings}.items():
        loaded.set(name, value)
    return Driver(loaded.library)


def start(target: Callable[..., None], *arguments: Any) -> tuple[BaseProcess, Connection]:
    """Run ``target(connection, *arguments)`` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return process, ours


class Exporter(NamedTuple):
    process: BaseProcess
    descriptor: int

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def join(self) -> None:
        self.process.join()


def start_exporter(data: bytes, num_bytes: int) -> Exporter:
    """A process that holds memory beginning with ``data``, and a descriptor of it here."""
    process, connection = start(export, data, num_bytes)
    return Exporter(process, connection.recv().detach())


def export(connection: Connection, data: bytes, num_bytes: int) -> None:
    driver = load_driver()
    handle, address = driver.create(num_bytes), driver.reserve(num_bytes)
    driver.map(address, num_bytes, handle)
    driver.set_access(address, num_bytes)
    driver.write(address, data)
    connection.send(DupFd(driver.export(handle)))
    connection.recv()


def outcome_of(name: str, *arguments: Any) -> Any:
    """What a function of this module sends from a fresh process."""
    process, connection = start(globals()[name], *arguments)
    outcome = connection.recv()
    process.join()
    return outcome


def copy_after_unmap(connection: Connection) -> None:
    """Unmap what a copy in flight still reads; send the error of everything after it."""
    driver = load_driver()
    page = driver.granularity()
    handle, address, target = driver.create(page), driver.reserve(page), driver.allocate(page)
    driver.map(address, page, handle)
    driver.set_access(address, page)
    stream = driver.stream()
    unmapped = multiprocessing.Event()
    stream.call_host(lambda: unmapped.wait(20.0) and None)
    driver.copy(target, address, page, stream)
    driver.unmap(address, page)
    unmapped.set()
    codes = {driver.result("cuStreamSynchronize", stream.handle)}
    try:
        driver.event()
    except DriverError as error:
        codes.add(error.code)
    connection.send(codes.pop() if len(codes) == 1 else codes)


def publish(connection: Connection, seeds: list[int], num_pages: list[int]) -> None:
    """Publish one region per seed under "pieces"; send the address; hold them until told to stop."""
    driver = load_driver()
    device = _C.CudaDevice(0)
    regions = [region_of(driver, device, *piece) for piece in zip(seeds, num_pages, strict=True)]
    server = _C.DescriptorServer(TOKEN)
    server.publish("pieces", regions)
    connection.send(server.address)
    connection.recv()


def export_fabric(connection: Connection, seed: int, num_pages: int) -> None:
    """Send the fabric handle of a region, and hold it until told to stop."""
    driver = load_driver(FABRIC=1)
    region = region_of(driver, _C.CudaDevice(0), seed, num_pages, "fabric")
    connection.send(region.export_fabric())
    connection.recv()


def region_of(
    driver: Driver, device: _C.CudaDevice, seed: int, num_pages: int, handle_type: str = "posix_fd"
) -> _C.CudaRegion:
    """A region filled with the pattern of ``seed``."""
    num_bytes = num_pages * device.granularity
    region = _C.CudaRegion(device, num_bytes, handle_type)
    memory = _C.CudaAddressRange(device, num_bytes)
    memory.map(0, region)
    memory.enable_access(True)
    driver.write(memory.address, pattern(seed, num_bytes))
    memory.close()
    return region


def fetch_twice(connection: Connection, settings: dict[str, object]) -> None:
    """Fetch at once and in a graph, with the driver of ``settings``; send how that went."""
    driver = load_driver(**settings)
    device = _C.CudaDevice(0)
    source, target = (mapped(driver, device, 5000, seed=i) for i in range(2))
    engine = _C.CudaCopyEngine(device, 2, 2)
    free, done = _C.CudaEvent(device), _C.CudaEvent(device)
    lanes = random_lanes(random.Random(0), 2, target.address, source.address, 5000, 300)
    fetch = engine.prepare(lanes, [source, target])
    stream = driver.stream()
    engine.submit(fetch, after=None, done=done)
    done.synchronize()
    copies = [driver.read(target.address, 5000)]
    driver.write(target.address, bytes(5000))
    with stream.capture() as graph:
        free.record(stream.address)
        engine.submit(fetch, after=free, done=done)
        done.wait(stream.address)
    graph.instantiate().launch(stream)
    stream.synchronize()
    copies.append(driver.read(target.address, 5000))
    copied = copies == [pattern(0, 5000)] * 2
    connection.send(
        (
            "copied" if copied else "lost",
            device.driver_version,
            engine.uses_batch_copies,
            standin.Standin().misuses("unknown version"),
        )
    )


def open_device(connection: Connection, settings: dict[str, object]) -> None:
    """Send how the device of ``settings`` exports memory, and its granularity; or the error."""
    loaded = standin.Standin()
    for name, value in {"GRANULARITY": 64 << 10, **settings}.items():
        loaded.set(name, value)
    try:
        device = _C.CudaDevice(0)
        connection.send((device.choose_handle_type(False), device.granularity))
    except FabricError as error:
        connection.send(str(error))


def open_without_driver(connection: Connection) -> None:
    """Where nothing is loaded under the driver's name; send the error."""
    try:
        _C.CudaDevice(0)
        connection.send("opened")
    except FabricError as error:
        connection.send(str(error))
