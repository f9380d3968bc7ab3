"""One rank's view of a MoE layer, with its peers' experts in the memory of the same GPU.

The layout, the slices and the composite tensors are those that a rank of a group gets; only the
sources lie elsewhere: the whole layer is in one range per tensor, cut into the regions that the ranks
would own. All slots are filled from those sources, so that a model of many layers takes the memory of
one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dwdp.fabric.base import AddressRange, Copy, Fabric, Region
from dwdp.fetch_plan import build_fetch_plan
from dwdp.layout import TensorLayout, build_layout, is_packed
from dwdp.placement import build_placement
from dwdp.weights import ExpertTensorSpec

RANK = 0


@dataclass(frozen=True)
class ExpertShape:
    """The experts of one published model's layers.

    Attributes:
        hidden_size, intermediate_size: of one expert, which has a gate, an up and a down projection.
        num_experts, top_k: per layer; experts per token.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int

    def bf16_tensors(self) -> tuple[ExpertTensorSpec, ...]:
        """``gate_up_proj [E, 2I, H]`` and ``down_proj [E, H, I]``."""
        hidden, width = self.hidden_size, self.intermediate_size
        return (
            ExpertTensorSpec("gate_up_proj", self.num_experts, (2 * width, hidden), torch.bfloat16),
            ExpertTensorSpec("down_proj", self.num_experts, (hidden, width), torch.bfloat16),
        )

    def nvfp4_tensors(self) -> tuple[ExpertTensorSpec, ...]:
        """As ``bf16_tensors`` in NVFP4: two weights per byte, and a scale byte per 16 weights."""
        hidden, width = self.hidden_size, self.intermediate_size
        shapes = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
        return tuple(
            ExpertTensorSpec(
                f"{name}{kind}", self.num_experts, (rows, columns // per_byte), torch.uint8
            )
            for name, (rows, columns) in shapes.items()
            for kind, per_byte in (("", 2), ("_scale", 16))
        )


DEEPSEEK_R1 = ExpertShape("DeepSeek-R1", 7168, 2048, 256, 8)
QWEN3_235B = ExpertShape("Qwen3-235B-A22B", 4096, 1536, 128, 8)


@dataclass(frozen=True)
class _Slot:
    memory: AddressRange
    parts: tuple[Region, ...]


class GpuLayer:
    """The expert tensors of one layer as rank 0 of ``num_ranks`` sees them.

    Args:
        fabric: the CUDA fabric.
        tensors: the layer's; none small enough to be packed.
        num_ranks: of the group.
        num_slots: staging slots.
    """

    def __init__(
        self, fabric: Fabric, tensors: Sequence[ExpertTensorSpec], num_ranks: int, num_slots: int
    ) -> None:
        self.specs = tuple(tensors)
        self._fabric = fabric
        placement = build_placement(tensors[0].num_experts, num_ranks)
        self.num_remote_experts = len(placement.remote_experts(RANK))
        self._layouts = tuple(
            build_layout(placement, spec.expert_bytes, fabric.granularity) for spec in tensors
        )
        assert not any(is_packed(layout) for layout in self._layouts)
        self._pieces: list[list[Region]] = []
        self._sources = [self._map_sources(layout) for layout in self._layouts]
        self._slots = [
            [self._map_slot(layout) for layout in self._layouts] for _ in range(num_slots)
        ]
        self._composites: list[AddressRange] = []

    @staticmethod
    def needed_bytes(tensors: Sequence[ExpertTensorSpec], num_ranks: int, num_slots: int) -> int:
        """About how much memory a layer takes."""
        whole = sum(spec.num_experts * spec.expert_bytes for spec in tensors)
        return int(whole * (1 + num_slots * (num_ranks - 1) / num_ranks))

    @property
    def num_fetched_bytes(self) -> int:
        """Bytes of one fetch."""
        return sum(
            stop - start
            for layout in self._layouts
            for _, _, start, stop in layout.fetch_ranges(RANK)
        )

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert, all tensors together."""
        return sum(spec.expert_bytes for spec in self.specs)

    def whole(self) -> dict[str, torch.Tensor]:
        """The tensors with every expert, as an unsharded model has them."""
        return {
            spec.name: _typed(spec, memory)
            for spec, memory in zip(self.specs, self._sources, strict=True)
        }

    def composites(self, slot: int) -> dict[str, torch.Tensor]:
        """Composite tensors: rank 0's own experts, and the remote ones in ``slot``."""
        tensors = {}
        for index, (spec, layout) in enumerate(zip(self.specs, self._layouts, strict=True)):
            memory = self._fabric.reserve(layout.mapped_bytes)
            self._composites.append(memory)
            for piece in layout.rank_pieces(RANK):
                memory.map(layout.pieces[piece].start, self._pieces[index][piece])
            parts = zip(layout.slot_parts(RANK), self._slots[slot][index].parts, strict=True)
            for part, region in parts:
                memory.map(part.start, region)
            memory.enable_access(writable=False)
            tensors[spec.name] = _typed(spec, memory)
        return tensors

    def lanes(self, slot: int, slice_bytes: int, num_lanes: int) -> list[list[Copy]]:
        """The slices of a fetch into ``slot``, by lane, as the fetch plan gives them."""
        plan = build_fetch_plan(RANK, self._layouts, slice_bytes)
        lanes: list[list[Copy]] = [[] for _ in range(num_lanes)]
        for round_ in plan.rounds():
            for position, part in enumerate(round_):
                if part is not None:
                    copy = self._copy(slot, part.tensor, part.start, part.num_bytes)
                    lanes[position % num_lanes].append(copy)
        return lanes

    def experts(self, slot: int) -> list[list[Copy]]:
        """For each expert, what it takes to fetch it alone into ``slot``."""
        copies: list[list[Copy]] = [[] for _ in range(self.specs[0].num_experts)]
        for tensor, layout in enumerate(self._layouts):
            for _, expert, start, stop in layout.fetch_ranges(RANK):
                copies[expert].append(self._copy(slot, tensor, start, stop - start))
        return copies

    def ranges(self, slot: int) -> list[AddressRange]:
        """The memory that the copies into ``slot`` lie in."""
        return [*self._sources, *(entry.memory for entry in self._slots[slot])]

    def slice_views(self, slot: int, slice_bytes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """``(destination, source)`` of every slice, as ``uint8`` tensors."""
        plan = build_fetch_plan(RANK, self._layouts, slice_bytes)
        return [
            (
                self._slots[slot][part.tensor].memory.bytes_tensor(part.start, part.num_bytes),
                self._sources[part.tensor].bytes_tensor(part.start, part.num_bytes),
            )
            for lane in plan.lanes
            for part in lane
        ]

    def _copy(self, slot: int, tensor: int, start: int, num_bytes: int) -> Copy:
        destination = self._slots[slot][tensor].memory
        return Copy(destination.address + start, self._sources[tensor].address + start, num_bytes)

    def _map_sources(self, layout: TensorLayout) -> AddressRange:
        memory = self._fabric.reserve(layout.mapped_bytes)
        pieces = []
        for start, stop in layout.pieces:
            pieces.append(self._fabric.allocate(stop - start))
            memory.map(start, pieces[-1])
        self._pieces.append(pieces)
        memory.enable_access(writable=True)
        return memory

    def _map_slot(self, layout: TensorLayout) -> _Slot:
        memory = self._fabric.reserve(layout.mapped_bytes)
        parts = []
        for start, stop in layout.slot_parts(RANK):
            parts.append(self._fabric.allocate(stop - start))
            memory.map(start, parts[-1])
        memory.enable_access(writable=True)
        return _Slot(memory, tuple(parts))


def _typed(spec: ExpertTensorSpec, memory: AddressRange) -> torch.Tensor:
    raw = memory.bytes_tensor(0, spec.num_experts * spec.expert_bytes)
    return raw.view(spec.dtype).view(spec.num_experts, *spec.expert_shape)
