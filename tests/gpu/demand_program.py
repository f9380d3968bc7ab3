"""A small program around the demand kernel, without torch, for checkers that slow everything down.

Experts of even and odd sizes, at even and odd addresses, are fetched by int32 and int64 choices with
repeated ids and ids of no expert. Every byte of the slot is compared.
"""

from __future__ import annotations

import ctypes
import random
import struct
import sys
from typing import Any

from dwdp import _C
from dwdp.fabric import cuda_devices, cuda_library
from dwdp.fabric.base import Copy
from dwdp.fabric.cuda import CudaFabric

NUM_EXPERTS, FIRST_REMOTE = 6, 2
SIZES = (16, 1001, 4096, 65_552, 300_007)
CHOICES = ([], [5], [0, 1], [2, 2, 3, 2], [5, 4, 3, 2, 1, 0], [-1, 6, 2**30, 4])
FILLER = 0xEE


class Driver:
    """The few driver calls that move bytes between host and device."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)

    def write(self, address: int, data: bytes) -> None:
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), data, ctypes.c_size_t(len(data)))

    def read(self, address: int, num_bytes: int) -> bytes:
        buffer = ctypes.create_string_buffer(num_bytes)
        self._call("cuMemcpyDtoH_v2", buffer, ctypes.c_uint64(address), ctypes.c_size_t(num_bytes))
        return buffer.raw

    def synchronize(self) -> None:
        self._call("cuCtxSynchronize")

    def _call(self, name: str, *arguments: Any) -> None:
        result = getattr(self._cuda, name)(*arguments)
        if result != 0:
            raise SystemExit(f"{name} failed: {result}")


class LegacyStream:
    """Compute on the legacy default stream, without torch."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def stream(self) -> int:
        return 0

    def is_capturing(self) -> bool:
        return False

    def synchronize(self) -> None:
        self._driver.synchronize()

    def tensor(self, capsule: Any) -> Any:
        raise AssertionError("there are no tensors here")


def memory(fabric: CudaFabric, num_bytes: int) -> Any:
    """A range of at least ``num_bytes``, mapped and writable."""
    num_bytes = -(-num_bytes // fabric.granularity) * fabric.granularity
    address_range = fabric.reserve(num_bytes)
    address_range.map(0, fabric.allocate(num_bytes))
    address_range.enable_access(writable=True)
    return address_range


def check(fabric: CudaFabric, driver: Driver, expert_bytes: int, index_bytes: int) -> None:
    """All choices for one size."""
    total = NUM_EXPERTS * expert_bytes
    source, slot, indices = (memory(fabric, size) for size in (total, total, 4096))
    data = random.Random(expert_bytes).randbytes(total)
    driver.write(source.address, data)
    copies: list[list[Copy]] = [[] for _ in range(FIRST_REMOTE)]
    for expert in range(FIRST_REMOTE, NUM_EXPERTS):
        start, half = expert * expert_bytes, expert_bytes // 2
        parts = ((start, half), (start + half, expert_bytes - half))
        copies.append([Copy(slot.address + at, source.address + at, size) for at, size in parts])
    engine = fabric.copy_engine(1, 1)
    demand = engine.prepare_demand(copies, [source, slot])
    moved = 0
    for choice in CHOICES:
        driver.write(slot.address, bytes([FILLER]) * total)
        packed = struct.pack(f"<{len(choice)}{'i' if index_bytes == 4 else 'q'}", *choice)
        driver.write(indices.address, packed + b"\0")
        _C.CudaCopyEngine.fetch_activated(
            engine, demand, indices.address, len(choice), index_bytes, 0
        )
        driver.synchronize()
        activated = {id_ for id_ in choice if FIRST_REMOTE <= id_ < NUM_EXPERTS}
        expected = b"".join(
            data[id_ * expert_bytes : (id_ + 1) * expert_bytes]
            if id_ in activated
            else bytes([FILLER]) * expert_bytes
            for id_ in range(NUM_EXPERTS)
        )
        moved += len(activated) * expert_bytes
        if driver.read(slot.address, total) != expected:
            raise SystemExit(f"{expert_bytes} bytes, choice {choice}: the slot is wrong")
    if engine.demanded_bytes != moved:
        raise SystemExit(f"{engine.demanded_bytes} bytes counted, {moved} moved")
    engine.close()


def main() -> None:
    # When cuda-python is loaded it asks the driver for calls that an older one lacks, which memcheck
    # takes for errors.
    cuda_devices._driver = lambda: cuda_library
    driver = Driver()
    fabric = CudaFabric(0, compute=LegacyStream(driver))  # type: ignore[arg-type]
    for expert_bytes in SIZES:
        for index_bytes in (4, 8):
            check(fabric, driver, expert_bytes, index_bytes)
    fabric.close()
    print("every slot is right")


if __name__ == "__main__":
    sys.exit(main())
