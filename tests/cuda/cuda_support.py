"""What the tests of the CUDA fabric share: mapped memory, patterns, compute without torch's CUDA."""

from __future__ import annotations

import ctypes
import random
from ctypes import byref, c_int, c_void_p, py_object
from typing import TYPE_CHECKING, Any

from driver import Driver, Stream

from dwdp import _C

if TYPE_CHECKING:
    import torch

TOKEN = b"0123456789abcdef"


def pattern(seed: int, num_bytes: int) -> bytes:
    """Bytes that differ for every seed."""
    return random.Random(seed).randbytes(num_bytes)


def mapped(
    driver: Driver, device: _C.CudaDevice, num_bytes: int, seed: int | None = None
) -> _C.CudaAddressRange:
    """A writable range of at least ``num_bytes``, of a pattern when there is a ``seed``."""
    rounded = -(-num_bytes // device.granularity) * device.granularity
    address_range = _C.CudaAddressRange(device, rounded)
    address_range.map(0, _C.CudaRegion(device, rounded, "posix_fd"))
    address_range.enable_access(True)
    if seed is not None:
        driver.write(address_range.address, pattern(seed, num_bytes))
    return address_range


def random_lanes(
    rng: random.Random, num_lanes: int, dst: int, src: int, num_bytes: int, largest: int
) -> list[list[tuple[int, int, int]]]:
    """``num_bytes`` from ``src`` to ``dst`` in random slices, spread over lanes."""
    lanes: list[list[tuple[int, int, int]]] = [[] for _ in range(num_lanes)]
    start = 0
    while start < num_bytes:
        length = min(num_bytes - start, rng.randint(1, largest))
        rng.choice(lanes).append((dst + start, src + start, length))
        start += length
    return lanes


class StandinCompute:
    """Compute of the stand-in's device: one stream, and tensors of its memory, which the host can touch."""

    device_type = "cpu"

    def __init__(self, driver: Driver, stream: Stream) -> None:
        self._driver = driver
        self._stream = stream

    def stream(self) -> int:
        return self._stream.address

    def is_capturing(self) -> bool:
        status = c_int()
        self._driver.call("cuStreamIsCapturing", self._stream.handle, byref(status))
        return status.value != 0

    def synchronize(self) -> None:
        self._stream.synchronize()

    def tensor(self, capsule: Any) -> torch.Tensor:
        import torch

        managed = capsule_tensor(capsule)
        buffer = (ctypes.c_ubyte * managed.num_bytes).from_address(managed.data)
        buffer.capsule = capsule  # the mapping lives as long as the tensor
        return torch.frombuffer(buffer, dtype=torch.uint8)


class BytesTensor(ctypes.Structure):
    """The start of a DLManagedTensor of bytes."""

    _fields_ = (
        ("data", c_void_p),
        ("device_type", c_int),
        ("device_id", c_int),
        ("num_dimensions", c_int),
        ("data_type", ctypes.c_uint32),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
    )

    @property
    def num_bytes(self) -> int:
        return int(self.shape[0])


def capsule_tensor(capsule: Any) -> BytesTensor:
    """What a DLPack capsule points to; valid as long as the capsule is."""
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = c_void_p, (py_object, ctypes.c_char_p)
    return BytesTensor.from_address(get_pointer(capsule, b"dltensor"))
