"""Plain memory for copies to run between: a device region, mapped, or pinned host memory."""

from __future__ import annotations

import torch

from dwdp.fabric.base import Fabric


class DeviceBlock:
    """``num_bytes`` of device memory from the fabric, rounded up to whole pages, in one region."""

    def __init__(self, fabric: Fabric, num_bytes: int) -> None:
        page = fabric.granularity
        mapped_bytes = -(-num_bytes // page) * page
        self.memory = fabric.reserve(mapped_bytes)
        self.region = fabric.allocate(mapped_bytes)
        self.memory.map(0, self.region)
        self.memory.enable_access(writable=True)
        self.tensor = self.memory.bytes_tensor(0, num_bytes)

    @property
    def address(self) -> int:
        return self.memory.address


class PinnedBlock:
    """``num_bytes`` of host memory that copy engines read directly."""

    def __init__(self, num_bytes: int) -> None:
        self.tensor = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    @property
    def address(self) -> int:
        return self.tensor.data_ptr()


def fill_random(tensor: torch.Tensor, seed: int) -> None:
    """Bytes that differ everywhere: zeros copy faster than data and hide what was not copied."""
    generator = torch.Generator(tensor.device).manual_seed(seed)
    tensor.random_(0, 256, generator=generator)
