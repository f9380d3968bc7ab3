"""Staging slots: memory for remote experts, composite tensors that map it, and what fills it.

A slot holds the remote experts of one layer at a time. Layers of one slot share its memory, buffer by
buffer: a buffer takes a tensor of a certain size, and no two tensors of one layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dwdp.fabric.base import AddressRange, Copy, Fabric, Region
from dwdp.fetch_plan import FetchPlan, build_fetch_plan
from dwdp.layout import TensorLayout
from dwdp.weights import ExpertWeights, MappedTensor

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StagedLayer:
    """What it takes to fill one layer's slot.

    Attributes:
        lanes: all remote experts, slice by slice, by lane.
        experts: for each expert, what it takes alone; nothing for a resident one.
        ranges: the memory that both lie in.
        num_bytes: of all remote experts.
    """

    lanes: tuple[tuple[Copy, ...], ...]
    experts: tuple[tuple[Copy, ...], ...]
    ranges: tuple[AddressRange, ...]
    num_bytes: int


@dataclass(frozen=True)
class _Buffer:
    """Memory for one expert tensor at a time: the parts that a rank does not store itself."""

    parts: tuple[Region, ...]
    memory: AddressRange


def num_slot_regions(weights: ExpertWeights, slots: Sequence[int]) -> int:
    """How many regions the slots of ``weights``' rank are made of."""
    num_parts = {
        (slot, key): len(tensor.layout.slot_parts(weights.rank))
        for layer, slot in zip(weights.tensors, slots, strict=True)
        for tensor, key in zip(layer, _keys(layer), strict=True)
    }
    return sum(num_parts.values())


class Staging:
    """The slots of one rank.

    Args:
        fabric: provides the memory.
        weights: whose edges are filled.
        slots: the slot of every layer, from :func:`dwdp.pipeline.layer_slots`.
    """

    def __init__(self, fabric: Fabric, weights: ExpertWeights, slots: Sequence[int]) -> None:
        self._fabric = fabric
        self._weights = weights
        self._slots = tuple(slots)
        self._buffers: dict[tuple[int, BufferKey], _Buffer] = {}

    @property
    def num_bytes(self) -> int:
        """Physical bytes of all slots."""
        return sum(part.num_bytes for buffer in self._buffers.values() for part in buffer.parts)

    def compose(self) -> list[dict[str, torch.Tensor]]:
        """Per layer, composite tensors whose remote experts lie in the layer's slot.

        Raises:
            FabricError: no memory for the slots.
        """
        composed = []
        for layer, slot in zip(self._weights.tensors, self._slots, strict=True):
            tensors = {}
            for tensor, key in zip(layer, _keys(layer), strict=True):
                if (slot, key) not in self._buffers:
                    self._buffers[slot, key] = self._allocate(tensor.layout)
                parts = self._buffers[slot, key].parts
                layout, rank = tensor.layout, self._weights.rank
                own = [
                    (layout.pieces[piece].start, tensor.resident[piece])
                    for piece in layout.rank_pieces(rank)
                ]
                staged = [
                    (part.start, region)
                    for part, region in zip(layout.slot_parts(rank), parts, strict=True)
                ]
                tensors[tensor.spec.name] = self._weights.compose(tensor, own + staged)
            composed.append(tensors)
        return composed

    def layers(self, num_lanes: int, slice_bytes: int | None) -> list[StagedLayer]:
        """Per layer, what fills its slot, in slices as :mod:`dwdp.fetch_plan` has them. After ``compose``."""
        plans: dict[tuple[TensorLayout, ...], FetchPlan] = {}
        staged = []
        for layer, slot in zip(self._weights.tensors, self._slots, strict=True):
            layouts = tuple(tensor.layout for tensor in layer)
            if layouts not in plans:
                plans[layouts] = build_fetch_plan(self._weights.rank, layouts, slice_bytes)
            buffers = [self._buffers[slot, key].memory for key in _keys(layer)]
            lanes = tuple(
                tuple(
                    self._copy(
                        layer[part.tensor],
                        buffers[part.tensor],
                        part.source,
                        part.start,
                        part.num_bytes,
                    )
                    for part in lane
                )
                for lane in plans[layouts].shared_out(num_lanes)
            )
            experts = self._experts(layer, buffers)
            sources = {part.source for lane in plans[layouts].lanes for part in lane}
            peers = [self._weights.peer_memory(source).memory for source in sorted(sources)]
            staged.append(
                StagedLayer(
                    lanes,
                    experts,
                    (*buffers, *peers),
                    plans[layouts].num_bytes,
                )
            )
        return staged

    def close_regions(self) -> None:
        """Drop the handles of the slots' memory, which stays mapped. Nothing can be composed after that."""
        for buffer in self._buffers.values():
            for part in buffer.parts:
                part.close()

    def close(self) -> None:
        """Give the slots up. Memory that a tensor or a fetch still uses goes with it. Idempotent."""
        self.close_regions()
        for buffer in self._buffers.values():
            buffer.memory.close()
        self._buffers.clear()

    def _experts(
        self, layer: Sequence[MappedTensor], buffers: Sequence[AddressRange]
    ) -> tuple[tuple[Copy, ...], ...]:
        experts: list[list[Copy]] = [[] for _ in range(layer[0].spec.num_experts)]
        for tensor, buffer in zip(layer, buffers, strict=True):
            for source, expert, start, stop in tensor.layout.fetch_ranges(self._weights.rank):
                experts[expert].append(self._copy(tensor, buffer, source, start, stop - start))
        return tuple(map(tuple, experts))

    def _copy(
        self, tensor: MappedTensor, buffer: AddressRange, source: int, start: int, num_bytes: int
    ) -> Copy:
        peer = self._weights.peer_memory(source)
        address = peer.memory.address + peer.offset(tensor, start)
        return Copy(buffer.address + start, address, num_bytes)

    def _allocate(self, layout: TensorLayout) -> _Buffer:
        memory = self._fabric.reserve(layout.mapped_bytes)
        parts = []
        for part in layout.slot_parts(self._weights.rank):
            parts.append(self._fabric.allocate(part.stop - part.start))
            memory.map(part.start, parts[-1])
        memory.enable_access(writable=True)
        return _Buffer(tuple(parts), memory)


BufferKey = tuple[int, int, int]


def _keys(layer: Sequence[MappedTensor]) -> list[BufferKey]:
    """The buffer of each tensor: its number of experts, bytes per expert, and a count of equals."""
    seen: Counter[tuple[int, int]] = Counter()
    keys = []
    for tensor in layer:
        shape = (tensor.spec.num_experts, tensor.spec.expert_bytes)
        keys.append((*shape, seen[shape]))
        seen[shape] += 1
    return keys
