"""A worker runs on the processors next to its own GPU.

TensorRT-LLM asks NVML, which counts all GPUs of the machine, for the number that CUDA has for a visible one.
Every rank sees one GPU, so all of them would be bound to the processors next to the first.
"""

from __future__ import annotations

import functools
import os
from importlib import import_module
from typing import Any

from dwdp.engines.tensorrt_llm import launch, log

_VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


def patch(module: Any) -> None:
    """Let ``get_numa_aware_cpu_affinity`` of ``tensorrt_llm.llmapi.utils`` count GPUs as the worker does."""
    affinity = module.get_numa_aware_cpu_affinity

    @functools.wraps(affinity)
    def affinity_of_visible(device_id: int) -> Any:
        visible = os.environ.get(_VISIBLE_DEVICES, "").split(",")
        if launch.DWDP_PREPARED not in os.environ or device_id >= len(visible):
            return affinity(device_id)
        index = _nvml_index(visible[device_id], device_id)
        # Any processor is better than those next to another GPU.
        return list(range(os.cpu_count() or 1)) if index is None else affinity(index)

    module.get_numa_aware_cpu_affinity = affinity_of_visible


def _nvml_index(name: str, ordinal: int) -> int | None:
    """NVML's number of the GPU that ``CUDA_VISIBLE_DEVICES`` calls ``name``; None if NVML knows none.

    Args:
        name: a number, a UUID, the beginning of one, or a MIG instance.
        ordinal: CUDA's number for it, which is the answer where ``name`` is none of these.
    """
    if name.isdecimal():
        return int(name)
    if not name.startswith(("GPU-", "MIG-")):
        return ordinal
    try:
        pynvml: Any = import_module("pynvml")
        pynvml.nvmlInit()
        try:
            return _nvml_index_of_uuid(pynvml, name)
        finally:
            pynvml.nvmlShutdown()
    except Exception as error:  # Without NVML, or where a container keeps it from the process.
        log.info(f"the processors next to {name} are not known: {error!r}")
        return None


def _nvml_index_of_uuid(pynvml: Any, name: str) -> int | None:
    if name.startswith("MIG-"):
        instance = pynvml.nvmlDeviceGetHandleByUUID(name)
        gpu = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(instance)
        return int(pynvml.nvmlDeviceGetIndex(gpu))
    for index in range(pynvml.nvmlDeviceGetCount()):
        uuid = pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(index))
        if uuid.startswith(name):
            return index
    return None
