"""Discovery of GPUs without cuda-python: the same answers, by ctypes."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from driver import Driver

from dwdp.fabric import FabricError, cuda_devices, cuda_library


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    cuda_devices.list_devices.cache_clear()
    yield
    cuda_devices.list_devices.cache_clear()


@pytest.fixture
def without_cuda_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_devices, "_driver", lambda: cuda_library)


@pytest.mark.usefixtures("without_cuda_python", "driver")
def test_devices_are_found_and_described() -> None:
    devices = cuda_devices.list_devices()
    assert [device.ordinal for device in devices] == list(range(len(devices))) != []
    for device in devices:
        assert device.name and "\0" not in device.name
        assert uuid.UUID(device.uuid).int != 0
        assert device.memory_bytes > 0
        assert device.compute_capability >= (3, 0)
        assert device.num_multiprocessors > 0 and device.num_copy_engines > 0
        assert device.supports_virtual_memory
        assert device.supports_posix_handles or device.supports_fabric_handles
    assert len({device.uuid for device in devices}) == len(devices)
    assert cuda_devices.driver_version() >= (12, 0)


@pytest.mark.usefixtures("driver")
def test_both_ways_of_asking_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings.driver")
    by_cuda_python = cuda_devices.list_devices()
    monkeypatch.setattr(cuda_devices, "_driver", lambda: cuda_library)
    cuda_devices.list_devices.cache_clear()
    assert cuda_devices.list_devices() == by_cuda_python


@pytest.mark.usefixtures("without_cuda_python")
def test_a_missing_driver_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_library, "LIBRARY", "libnowhere.so.1")
    with pytest.raises(FabricError, match=r"driver cannot be loaded: libnowhere\.so\.1"):
        cuda_devices.list_devices()


@pytest.mark.usefixtures("without_cuda_python")
def test_a_refusal_is_named(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = (cuda_library.CUresult(101), 0)
    monkeypatch.setattr(cuda_library, "cuDeviceGetCount", lambda: refusal)
    with pytest.raises(FabricError, match="cuDeviceGetCount failed: CUDA_ERROR_INVALID_DEVICE"):
        cuda_devices.list_devices()
