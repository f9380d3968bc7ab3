"""A worker runs on the processors next to its own GPU, whatever ``CUDA_VISIBLE_DEVICES`` calls it."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest

from dwdp.engines.tensorrt_llm import affinity
from dwdp.engines.tensorrt_llm.launch import DWDP_PREPARED

UUIDS = [f"GPU-{digit * 8}-0000-0000-0000-000000000000" for digit in "abcd"]
MIG = "MIG-12345678-0000-0000-0000-000000000000"


class NotFound(Exception):
    """NVML's error for a device that it does not know."""


class Nvml:
    """A ``pynvml`` of four GPUs, the third of which has a MIG instance."""

    def __init__(self) -> None:
        self.num_open = 0

    def nvmlInit(self) -> None:
        self.num_open += 1

    def nvmlShutdown(self) -> None:
        self.num_open -= 1

    def nvmlDeviceGetCount(self) -> int:
        assert self.num_open == 1
        return len(UUIDS)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return UUIDS[index]

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return handle

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != MIG:
            raise NotFound(uuid)
        return uuid

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> str:
        assert handle == MIG
        return UUIDS[2]

    def nvmlDeviceGetIndex(self, handle: str) -> int:
        return UUIDS.index(handle)


def processors_of(device_id: int, environ: dict[str, str], patch: pytest.MonkeyPatch) -> list[int]:
    """What a worker is bound to where TensorRT-LLM would say ``[100 + number of the GPU]``."""
    for name in (DWDP_PREPARED, "CUDA_VISIBLE_DEVICES"):
        patch.delenv(name, raising=False)
    for name, value in environ.items():
        patch.setenv(name, value)
    utils = SimpleNamespace(get_numa_aware_cpu_affinity=lambda device_id: [100 + device_id])
    affinity.patch(utils)
    found: list[int] = utils.get_numa_aware_cpu_affinity(device_id)
    return found


@pytest.mark.parametrize(
    ("environ", "asked"),
    [
        ({DWDP_PREPARED: "1", "CUDA_VISIBLE_DEVICES": "3"}, 3),
        ({DWDP_PREPARED: "1", "CUDA_VISIBLE_DEVICES": UUIDS[3]}, 3),
        ({DWDP_PREPARED: "1", "CUDA_VISIBLE_DEVICES": "GPU-bbbb"}, 1),
        ({DWDP_PREPARED: "1", "CUDA_VISIBLE_DEVICES": MIG}, 2),
        ({DWDP_PREPARED: "1"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "3"}, 0),
        ({"CUDA_VISIBLE_DEVICES": UUIDS[3]}, 0),
    ],
)
def test_a_worker_runs_beside_its_own_gpu(
    environ: dict[str, str], asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert processors_of(0, environ, monkeypatch) == [100 + asked]
    assert nvml.num_open == 0


@pytest.mark.parametrize("name", ["GPU-ffff", "MIG-ffff"])
@pytest.mark.parametrize("nvml", [Nvml(), None])
def test_beside_no_gpu_rather_than_another_one(
    name: str, nvml: Nvml | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVML may know no such name, or not be there (None: its import fails)."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr("dwdp.engines.tensorrt_llm.log.info", lambda message: None)
    environ = {DWDP_PREPARED: "1", "CUDA_VISIBLE_DEVICES": name}
    assert processors_of(0, environ, monkeypatch) == list(range(os.cpu_count() or 1))
