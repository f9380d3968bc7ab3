"""How much memory a group will need, before any of it is taken. Pure arithmetic, except for what is free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import NamedTuple

from dwdp.config import DwdpConfig
from dwdp.layout import TensorLayout, build_layout
from dwdp.pipeline import assign_slots
from dwdp.placement import build_placement

_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_FILES = (
    ("memory.max", "memory.current", ""),  # version 2
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_"),  # version 1
)


class ExpertTensorSize(NamedTuple):
    """An expert tensor, as far as memory is concerned."""

    num_experts: int
    expert_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per rank, in rank order. Activations, key-value caches and the interpreter come on top."""

    dense_bytes: tuple[int, ...]
    resident_expert_bytes: tuple[int, ...]
    staging_bytes: tuple[int, ...]

    @property
    def total_bytes(self) -> int:
        return sum(self.dense_bytes) + sum(self.resident_expert_bytes) + sum(self.staging_bytes)


def plan_memory(
    layers: Sequence[Sequence[ExpertTensorSize]],
    config: DwdpConfig,
    *,
    dense_bytes: int,
    staged: bool,
    granularity: int,
) -> MemoryPlan:
    """What a group of ``config.dwdp_size`` ranks holds.

    Args:
        layers: the expert tensors of every MoE layer, in the order of the forward.
        dense_bytes: weights that each rank holds whole.
        staged: whether remote experts are copied into slots.
        granularity: page size of the fabric, in bytes.

    Raises:
        ValueError: the experts cannot be placed as ``config`` asks.
    """
    size = config.dwdp_size
    layouts: dict[ExpertTensorSize, TensorLayout] = {}
    for tensor in {tensor for layer in layers for tensor in layer}:
        placement = build_placement(
            tensor.num_experts,
            size,
            num_experts_per_worker=config.num_experts_per_worker,
            num_prefetch_experts=config.num_prefetch_experts,
        )
        layouts[tensor] = build_layout(placement, tensor.expert_bytes, granularity)
    resident = tuple(
        sum(layouts[tensor].resident_bytes(rank) for layer in layers for tensor in layer)
        for rank in range(size)
    )
    buffers = _slot_buffers(layers, config.num_slots) if staged and size > 1 else []
    staging = tuple(
        sum(layouts[tensor].slot_bytes(rank) for tensor in buffers) for rank in range(size)
    )
    return MemoryPlan((dense_bytes,) * size, resident, staging)


def _slot_buffers(
    layers: Sequence[Sequence[ExpertTensorSize]], num_slots: int
) -> list[ExpertTensorSize]:
    """The buffers of all slots. Layers of one slot share buffers, tensors of one layer never do."""
    slots = assign_slots(len(layers), num_slots)
    counts: dict[tuple[int, ExpertTensorSize], int] = {}
    for slot, layer in zip(slots, layers, strict=True):
        for tensor in set(layer):
            needed = sum(other == tensor for other in layer)
            counts[slot, tensor] = max(counts.get((slot, tensor), 0), needed)
    return [tensor for (_, tensor), count in counts.items() for _ in range(count)]


def available_memory_bytes() -> int:
    """Memory that can be taken now: what the machine has left, or what the control group's limit leaves."""
    import psutil

    available: int = psutil.virtual_memory().available
    return int(min([available, *(_left_in(*files) for files in _CGROUP_FILES)]))


def _left_in(limit_file: str, usage_file: str, stat_prefix: str) -> float:
    try:
        limit = int((_CGROUP / limit_file).read_text(encoding="ascii"))
        usage = int((_CGROUP / usage_file).read_text(encoding="ascii"))
        stat_file = (_CGROUP / usage_file).parent / "memory.stat"
        stat = stat_file.read_text(encoding="ascii").split()
    except (OSError, ValueError):  # another version of control groups, or no limit ("max")
        return inf
    # Cached pages of files are given back when memory is needed; shared memory is not among these two.
    counters = dict(zip(stat[::2], stat[1::2], strict=True))
    cached = sum(
        int(counters.get(stat_prefix + key, 0)) for key in ("active_file", "inactive_file")
    )
    return max(0, limit - usage + cached)
