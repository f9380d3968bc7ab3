"""The driver's calls of device discovery through ctypes, for machines without cuda-python.

They are named, and answer, as in ``cuda.bindings.driver``: with a tuple of the result and the values.
"""

from __future__ import annotations

import builtins
import ctypes
from enum import IntEnum
from typing import Any

LIBRARY = "libcuda.so.1"


class CUdevice_attribute(IntEnum):
    """Those that discovery asks for, with the numbers of cuda.h."""

    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16
    CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT = 40
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76
    CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 102
    CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED = 103
    CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED = 128


class CUresult(int):
    """What a call returned."""

    CUDA_SUCCESS = 0

    @property
    def name(self) -> str:
        text = ctypes.c_char_p()
        ctypes.CDLL(LIBRARY).cuGetErrorName(int(self), ctypes.byref(text))
        return (text.value or b"CUDA_ERROR_UNKNOWN").decode()


class CUuuid(ctypes.Structure):
    """16 bytes."""

    _fields_ = (("raw", ctypes.c_ubyte * 16),)

    @property
    def bytes(self) -> builtins.bytes:
        return builtins.bytes(self.raw)


def _call(function: str, *arguments: Any) -> CUresult:
    """Raises RuntimeError, as cuda-python does, when the driver cannot be loaded or lacks the call."""
    try:
        return CUresult(getattr(ctypes.CDLL(LIBRARY), function)(*arguments))
    except (OSError, AttributeError) as error:
        raise RuntimeError(str(error)) from error


def _number(function: str, *arguments: Any) -> tuple[CUresult, int]:
    """Of a call whose first parameter is an int to be written."""
    value = ctypes.c_int()
    return _call(function, ctypes.byref(value), *arguments), value.value


def cuInit(flags: int) -> tuple[CUresult]:
    return (_call("cuInit", flags),)


def cuDriverGetVersion() -> tuple[CUresult, int]:
    return _number("cuDriverGetVersion")


def cuDeviceGetCount() -> tuple[CUresult, int]:
    return _number("cuDeviceGetCount")


def cuDeviceGet(ordinal: int) -> tuple[CUresult, int]:
    return _number("cuDeviceGet", ordinal)


def cuDeviceGetAttribute(kind: int, device: int) -> tuple[CUresult, int]:
    return _number("cuDeviceGetAttribute", int(kind), device)


def cuDeviceGetName(length: int, device: int) -> tuple[CUresult, bytes]:
    text = ctypes.create_string_buffer(length)
    return _call("cuDeviceGetName", text, length, device), text.raw


def cuDeviceGetUuid(device: int) -> tuple[CUresult, CUuuid]:
    uuid = CUuuid()
    return _call("cuDeviceGetUuid_v2", ctypes.byref(uuid), device), uuid


def cuDeviceTotalMem(device: int) -> tuple[CUresult, int]:
    num_bytes = ctypes.c_size_t()
    return _call("cuDeviceTotalMem_v2", ctypes.byref(num_bytes), device), num_bytes.value
