"""The GPUs of this machine and what they can do, asked of the driver: through cuda-python if it is there."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from functools import cache
from typing import Any

from dwdp.fabric.base import FabricError


@dataclass(frozen=True)
class CudaDeviceInfo:
    """One GPU.

    Attributes:
        ordinal: as this process counts them (after ``CUDA_VISIBLE_DEVICES``).
        uuid: names the GPU, or the part of one, whoever counts.
        memory_bytes: physical.
        compute_capability: ``(9, 0)`` for instance.
        num_copy_engines: copies that can run at a time, beside compute.
        supports_virtual_memory: ``cuMemCreate`` and ``cuMemMap`` work.
        supports_posix_handles, supports_fabric_handles: how memory can be exported, as the device
            says; whether fabric handles really work shows when one is exported.
    """

    ordinal: int
    name: str
    uuid: str
    memory_bytes: int
    compute_capability: tuple[int, int]
    num_multiprocessors: int
    num_copy_engines: int
    supports_virtual_memory: bool
    supports_posix_handles: bool
    supports_fabric_handles: bool


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError:
        from dwdp.fabric import cuda_library as driver
    return driver


def _check(call: str, answer: tuple[Any, ...]) -> Any:
    driver = _driver()
    result, *values = answer
    if result != driver.CUresult.CUDA_SUCCESS:
        raise FabricError(f"{call} failed: {result.name} ({int(result)})")
    return values[0] if len(values) == 1 else tuple(values)


@cache
def list_devices() -> tuple[CudaDeviceInfo, ...]:
    """Every GPU this process may use, by ordinal.

    Raises:
        FabricError: the driver is not there, or refuses.
    """
    driver = _driver()
    try:
        _check("cuInit", driver.cuInit(0))
    except RuntimeError as error:  # when libcuda.so.1 cannot be loaded
        if isinstance(error, FabricError):
            raise
        raise FabricError(f"the NVIDIA driver cannot be loaded: {error}") from error
    count = _check("cuDeviceGetCount", driver.cuDeviceGetCount())
    return tuple(_describe(driver, ordinal) for ordinal in range(count))


def driver_version() -> tuple[int, int]:
    """The newest CUDA version that the installed driver supports, ``(13, 0)`` for instance.

    Raises:
        FabricError: as :func:`list_devices`.
    """
    list_devices()
    version = _check("cuDriverGetVersion", _driver().cuDriverGetVersion())
    return version // 1000, version % 1000 // 10


def _describe(driver: Any, ordinal: int) -> CudaDeviceInfo:
    device = _check("cuDeviceGet", driver.cuDeviceGet(ordinal))
    kinds = driver.CUdevice_attribute

    def attribute(name: str) -> int:
        kind = getattr(kinds, f"CU_DEVICE_ATTRIBUTE_{name}")
        value: int = _check(
            f"cuDeviceGetAttribute({name})", driver.cuDeviceGetAttribute(kind, device)
        )
        return value

    name = _check("cuDeviceGetName", driver.cuDeviceGetName(128, device))
    raw = _check("cuDeviceGetUuid", driver.cuDeviceGetUuid(device))
    return CudaDeviceInfo(
        ordinal=ordinal,
        name=name.split(b"\0")[0].decode(),
        uuid=str(uuid.UUID(bytes=bytes(raw.bytes))),
        memory_bytes=_check("cuDeviceTotalMem", driver.cuDeviceTotalMem(device)),
        compute_capability=(
            attribute("COMPUTE_CAPABILITY_MAJOR"),
            attribute("COMPUTE_CAPABILITY_MINOR"),
        ),
        num_multiprocessors=attribute("MULTIPROCESSOR_COUNT"),
        num_copy_engines=attribute("ASYNC_ENGINE_COUNT"),
        supports_virtual_memory=bool(attribute("VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED")),
        supports_posix_handles=bool(attribute("HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED")),
        supports_fabric_handles=bool(attribute("HANDLE_TYPE_FABRIC_SUPPORTED")),
    )
