"""How much memory a group will need, and whether it is there, before any of it is taken."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dwdp.config import DwdpConfig
from dwdp.group import Group
from dwdp.layout import TensorLayout, build_layout, is_packed, pack
from dwdp.pipeline import assign_slots
from dwdp.placement import build_placement
from dwdp.system_memory import MemoryPool, memory_pools


class NotEnoughMemoryError(ValueError, MemoryError):
    """What was asked for does not fit. A ValueError besides, because the user can ask for less."""


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
    tensors = [layouts[tensor] for layer in layers for tensor in layer]
    _, packed_bytes = pack([t.total_bytes for t in tensors if is_packed(t)], granularity)
    resident = tuple(
        packed_bytes + sum(t.resident_bytes(rank) for t in tensors if not is_packed(t))
        for rank in range(size)
    )
    buffers = _slot_buffers(layers, config) if staged and size > 1 else []
    staging = tuple(
        sum(layouts[tensor].slot_bytes(rank) for tensor in buffers) for rank in range(size)
    )
    return MemoryPlan((dense_bytes,) * size, resident, staging)


def _slot_buffers(
    layers: Sequence[Sequence[ExpertTensorSize]], config: DwdpConfig
) -> list[ExpertTensorSize]:
    """The buffers of all slots. Layers of one slot share buffers, tensors of one layer never do."""
    slots: Sequence[int]
    if config.fetch_mode == "demand":  # nothing is fetched ahead
        slots = (0,) * len(layers)
    else:
        slots = assign_slots(len(layers), config.num_slots)
    counts: dict[tuple[int, ExpertTensorSize], int] = {}
    for slot, layer in zip(slots, layers, strict=True):
        for tensor in set(layer):
            needed = sum(other == tensor for other in layer)
            counts[slot, tensor] = max(counts.get((slot, tensor), 0), needed)
    return [tensor for (_, tensor), count in counts.items() for _ in range(count)]


def available_memory_bytes() -> int:
    """Memory that this process can take now: what the machine, or a control group's limit, leaves."""
    return min(pool.available_bytes for pool in memory_pools())


GroupPools = Mapping[int, Sequence[MemoryPool]]
"""By rank, the pools of memory that it draws on."""


def group_memory_pools(group: Group) -> GroupPools:
    """What memory there is for the ranks, all of one machine. Every rank calls it, before any takes memory.

    A rank that rejoins looks at its own alone: the others have taken theirs.

    Raises:
        GroupError: a peer failed or did not answer.
    """
    pools = memory_pools()
    if group.incarnation:
        return {group.rank: pools}
    published = group.exchange("memory pools", json.dumps(pools).encode())
    return {
        rank: [MemoryPool(*pool) for pool in json.loads(raw)] for rank, raw in enumerate(published)
    }


def check_group_memory(group_pools: GroupPools, plan: MemoryPlan) -> None:
    """Refuse ``plan`` if the ranks cannot hold it.

    They take memory at the same time, so each pool (the machine's, or a control group's limit) is
    compared with what all the ranks that draw on it need together. Every rank decides on the same
    figures, and comes to the same end.

    Raises:
        NotEnoughMemoryError: the text names the sum needed, what is available, and what to change.
    """
    for key in dict.fromkeys(pool.key for pools in group_pools.values() for pool in pools):
        seen = {
            rank: pool for rank, pools in group_pools.items() for pool in pools if pool.key == key
        }
        _check_pool(plan, seen)


def _check_pool(plan: MemoryPlan, seen: Mapping[int, MemoryPool]) -> None:
    """``seen``: one pool, as each of the ranks that draw on it sees it."""
    dense = sum(plan.dense_bytes[rank] for rank in seen)
    resident = sum(plan.resident_expert_bytes[rank] for rank in seen)
    staging = sum(plan.staging_bytes[rank] for rank in seen)
    available, name = min((pool.available_bytes, pool.name) for pool in seen.values())
    if dense + resident + staging > available:
        weights = f"{_gib(dense)} of dense weights, " if dense else ""
        raise NotEnoughMemoryError(
            f"{len(seen)} rank(s) need {_gib(dense + resident + staging)}: {weights}"
            f"{_gib(resident)} of resident experts and {_gib(staging)} of staging slots; "
            f"{_gib(available)} are available {name}. Lower num_experts_per_worker or num_slots, set "
            'fetch_mode to "direct", load in a smaller dtype, or free memory'
        )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB"
