"""How much memory a group will need, and whether it is there, before any of it is taken."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from dwdp.config import DwdpConfig
from dwdp.group import Group
from dwdp.layout import TensorLayout, build_layout, is_packed, pack
from dwdp.pipeline import layer_slots
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
    """Bytes per rank, in rank order. Activations and the interpreter come on top.

    Attributes:
        kv_cache_bytes: key-value cache that every rank sets aside before its first request.
        reducible: names of the options that take less memory with a lower value, which they can have.
    """

    dense_bytes: tuple[int, ...]
    resident_expert_bytes: tuple[int, ...]
    staging_bytes: tuple[int, ...]
    kv_cache_bytes: int = 0
    reducible: tuple[str, ...] = ()

    def parts(self, ranks: Collection[int]) -> dict[str, int]:
        """Bytes that ``ranks`` hold together, by what they are for."""
        return {
            "dense weights": sum(self.dense_bytes[rank] for rank in ranks),
            "resident experts": sum(self.resident_expert_bytes[rank] for rank in ranks),
            "staging slots": sum(self.staging_bytes[rank] for rank in ranks),
            "key-value cache": self.kv_cache_bytes * len(ranks),
        }


def plan_memory(
    layers: Sequence[Sequence[ExpertTensorSize]],
    config: DwdpConfig,
    *,
    dense_bytes: int,
    staged: bool,
    granularity: int,
    kv_cache_bytes: int = 0,
) -> MemoryPlan:
    """What a group of ``config.dwdp_size`` ranks holds.

    Args:
        layers: the expert tensors of every MoE layer, in the order of the forward.
        dense_bytes: weights that each rank holds whole.
        staged: whether remote experts are copied into slots.
        granularity: page size of the fabric, in bytes.
        kv_cache_bytes: key-value cache of each rank.

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
    needs_slots = staged and size > 1
    buffers = _slot_buffers(layers, config) if needs_slots else []
    staging = tuple(
        sum(layouts[tensor].slot_bytes(rank) for tensor in buffers) for rank in range(size)
    )
    reducible = [
        *(["num_experts_per_worker"] if _can_store_less(layouts, config) else []),
        *(["num_slots"] if needs_slots and _can_have_fewer_slots(len(layers), config) else []),
        *(["kv_cache_tokens"] if kv_cache_bytes else []),
    ]
    return MemoryPlan((dense_bytes,) * size, resident, staging, kv_cache_bytes, tuple(reducible))


def _can_store_less(sizes: Collection[ExpertTensorSize], config: DwdpConfig) -> bool:
    """Whether every expert would still be stored if each rank stored one fewer of each layer."""
    if config.num_experts_per_worker is None:
        return False
    with suppress(ValueError):
        for num_experts in {tensor.num_experts for tensor in sizes}:
            build_placement(
                num_experts,
                config.dwdp_size,
                num_experts_per_worker=config.num_experts_per_worker - 1,
                num_prefetch_experts=config.num_prefetch_experts,
            )
        return True
    return False


def _can_have_fewer_slots(num_layers: int, config: DwdpConfig) -> bool:
    fewest = layer_slots(num_layers, config.model_copy(update={"num_slots": 2}))
    return max(fewest, default=0) < max(layer_slots(num_layers, config), default=0)


def _slot_buffers(
    layers: Sequence[Sequence[ExpertTensorSize]], config: DwdpConfig
) -> list[ExpertTensorSize]:
    """The buffers of all slots. Layers of one slot share buffers, tensors of one layer never do."""
    slots = layer_slots(len(layers), config)
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
    for pool, ranks in _shared_pools(group_pools):
        parts = {name: size for name, size in plan.parts(ranks).items() if size}
        if sum(parts.values()) > pool.available_bytes:
            raise NotEnoughMemoryError(
                f"{len(ranks)} rank(s) need {_gib(sum(parts.values()))}: {_sum_of(parts)}; "
                f"{_gib(pool.available_bytes)} are available {pool.name}. {_advice(plan, ranks)}"
            )


def describe_rejoin_shortage(group_pools: GroupPools, plan: MemoryPlan) -> str | None:
    """What will be missing when one rank has died and is started again; None if nothing.

    The experts of the dead rank stay in memory for as long as a survivor maps them, and the new process
    stores its share once more. So there has to be room for the largest share that draws on a pool, besides
    ``plan`` itself. Ranks that die later, while others still map the dead one's experts, can need as much
    again each.
    """
    if len(plan.resident_expert_bytes) == 1:  # nobody is left to map anything
        return None
    for pool, ranks in _shared_pools(group_pools):
        share = max(plan.resident_expert_bytes[rank] for rank in ranks)
        left = pool.available_bytes - sum(plan.parts(ranks).values())
        if left < share:
            return (
                f"a rank that is started again needs {_gib(share)} for its experts while the others map "
                f"those of the one that died, and only {_gib(max(left, 0))} will be left {pool.name}"
            )
    return None


def _shared_pools(group_pools: GroupPools) -> Iterator[tuple[MemoryPool, list[int]]]:
    """Every pool, as the rank that sees least of it sees it, and the ranks that draw on it."""
    for key in dict.fromkeys(pool.key for pools in group_pools.values() for pool in pools):
        seen = {
            rank: pool for rank, pools in group_pools.items() for pool in pools if pool.key == key
        }
        yield min(seen.values(), key=lambda pool: (pool.available_bytes, pool.name)), list(seen)


def _sum_of(parts: Mapping[str, int]) -> str:
    *most, last = (f"{_gib(size)} of {name}" for name, size in parts.items())
    return f"{', '.join(most)} and {last}" if most else last


def _advice(plan: MemoryPlan, ranks: Collection[int]) -> str:
    """What would make ``ranks``, which draw on one pool, need less of it."""
    ways = []
    if plan.reducible:
        *most, last = plan.reducible
        ways.append(f"lower {', '.join(most)} or {last}" if most else f"lower {last}")
    if any(plan.staging_bytes[rank] for rank in ranks):
        ways.append('set fetch_mode to "direct"')
    if len(ranks) > 1:
        ways.append("use fewer ranks")
    text = ", ".join([*ways, "load in a smaller dtype", "or free memory"])
    return text[0].upper() + text[1:]


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB"
