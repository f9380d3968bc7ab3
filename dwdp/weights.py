"""Composite tensors of one model: resident memory, peers' memory, staging slots, and how they are joined.

Set-up goes through the steps of :class:`ExpertWeights` in order: ``allocate`` (resident memory, into
which the engine loads), ``exchange`` (peers map each other's resident memory), ``fill_edges`` (bytes
of neighbours on pages a rank shares with them), then ``compose_direct`` or ``compose_staged``.

Shape legend: ``E`` = experts of a layer; an expert tensor is ``[E, *expert_shape]``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from dwdp.config import DwdpConfig
from dwdp.fabric.base import AddressRange, Copy, Fabric, Region
from dwdp.fetch_plan import FetchPlan, Slice, build_fetch_plan
from dwdp.group import Group, GroupError
from dwdp.layout import TensorLayout, build_layout
from dwdp.placement import Placement, build_placement

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ExpertTensorSpec:
    """One expert tensor: ``[num_experts, *expert_shape]`` of ``dtype``."""

    name: str
    num_experts: int
    expert_shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def expert_bytes(self) -> int:
        return math.prod(self.expert_shape) * self.dtype.itemsize


@dataclass(frozen=True)
class LayerSpec:
    """The expert tensors of one MoE layer; all of them have the same number of experts."""

    name: str
    tensors: tuple[ExpertTensorSpec, ...]

    def __post_init__(self) -> None:
        counts = {tensor.num_experts for tensor in self.tensors}
        if len(counts) != 1:
            raise ValueError(
                f"expert tensors of {self.name} hold {sorted(counts)} experts; one count is needed"
            )

    @property
    def num_experts(self) -> int:
        return self.tensors[0].num_experts


@dataclass(frozen=True)
class StagedLayer:
    """One layer's fetch: what to copy from where to where, by lane, and the memory it is in."""

    lanes: tuple[tuple[Copy, ...], ...]
    ranges: tuple[AddressRange, ...]
    num_bytes: int


@dataclass
class _Tensor:
    """What this rank holds and maps of one expert tensor."""

    spec: ExpertTensorSpec
    layout: TensorLayout
    resident: dict[int, Region] = field(default_factory=dict)
    home: AddressRange | None = None
    imported: dict[int, dict[int, Region]] = field(default_factory=dict)
    views: dict[int, AddressRange] = field(default_factory=dict)


@dataclass
class _SlotBuffer:
    """Staging memory for one expert tensor at a time: the parts a rank does not store itself."""

    parts: tuple[Region, ...]
    memory: AddressRange


class ExpertWeights:
    """The expert tensors of one rank's model.

    Args:
        group: the ranks that share the experts.
        fabric: provides the memory.
        config: placement, slots and slices.
        layers: MoE layers in the order of the forward; the same on every rank.

    Raises:
        ValueError: the experts cannot be placed as the configuration asks.
    """

    def __init__(
        self, group: Group, fabric: Fabric, config: DwdpConfig, layers: Sequence[LayerSpec]
    ) -> None:
        self.layers = tuple(layers)
        self._group = group
        self._fabric = fabric
        self._config = config
        self._placements: dict[int, Placement] = {}
        self._layouts: dict[tuple[int, int], TensorLayout] = {}
        self._tensors = tuple(
            tuple(_Tensor(spec, self._layout(spec)) for spec in layer.tensors) for layer in layers
        )
        self._slots: list[dict[tuple[int, int, int], _SlotBuffer]] = []
        self._composites: list[AddressRange] = []

    def placement(self, layer: int) -> Placement:
        return self._placement(self.layers[layer].num_experts)

    @cached_property
    def resident_bytes(self) -> int:
        """Physical bytes of this rank's resident experts, page edges included."""
        return sum(
            tensor.layout.resident_bytes(self._group.rank)
            for layer in self._tensors
            for tensor in layer
        )

    @property
    def staging_bytes(self) -> int:
        """Physical bytes of the staging slots (0 until ``compose_staged``)."""
        return sum(
            part.num_bytes
            for slot in self._slots
            for buffer in slot.values()
            for part in buffer.parts
        )

    def allocate(self) -> None:
        """Take memory for the resident experts of every layer.

        Raises:
            FabricError: the memory is not there.
        """
        rank = self._group.rank
        for layer in self._tensors:
            for tensor in layer:
                layout = tensor.layout
                tensor.home = self._fabric.reserve(layout.mapped_bytes)
                for piece in layout.rank_pieces(rank):
                    start, stop = layout.pieces[piece]
                    tensor.resident[piece] = self._fabric.allocate(stop - start)
                    tensor.home.map(start, tensor.resident[piece], writable=True)

    def destination(self, layer: int, name: str, expert: int) -> torch.Tensor:
        """Where a resident expert of one tensor is loaded to: ``[*expert_shape]`` of its dtype.

        Only between ``allocate`` and ``fill_edges``; drop the view before ``fill_edges``.

        Raises:
            KeyError: the layer has no such tensor, or this rank does not store that expert.
        """
        tensor = next((t for t in self._tensors[layer] if t.spec.name == name), None)
        if tensor is None or not self.placement(layer).is_resident(self._group.rank, expert):
            raise KeyError(
                f"expert {expert} of {name!r} in layer {layer} is not stored on this rank"
            )
        assert tensor.home is not None, "destination() before allocate() or after fill_edges()"
        num_bytes = tensor.spec.expert_bytes
        raw = tensor.home.bytes_tensor(expert * num_bytes, num_bytes)
        return raw.view(tensor.spec.dtype).view(tensor.spec.expert_shape)

    def exchange(self) -> None:
        """Hand this rank's memory to the peers and take theirs.

        Raises:
            GroupError: the ranks load different models or use different options.
            FabricError: a peer's memory cannot be had.
        """
        group = self._group
        digests = group.exchange("model", self._digest())
        differing = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if differing:
            raise GroupError(
                f"rank(s) {', '.join(map(str, differing))} and rank 0 have different expert tensors or "
                "dwdp options; start every rank with the same model and options"
            )
        address = self._fabric.serve(group.token)
        for index, layer in enumerate(self._tensors):
            regions = [region for tensor in layer for region in tensor.resident.values()]
            self._fabric.publish(_published_name(index), regions)
        addresses = group.exchange("memory", address.encode())
        for peer in range(group.size):
            if peer != group.rank:
                self._import_from(peer, addresses[peer].decode())

    def fill_edges(self) -> None:
        """Copy the bytes of other ranks' experts that share a page with this rank's own.

        Done once: weights do not change. Ends with a barrier, after which every resident page of
        every rank is complete.
        """
        for layer in self._tensors:
            for tensor in layer:
                for edge in tensor.layout.edges(self._group.rank):
                    assert tensor.home is not None
                    source = self._view(tensor, edge.source)
                    num_bytes = edge.stop - edge.start
                    target = tensor.home.bytes_tensor(edge.start, num_bytes)
                    target.copy_(source.bytes_tensor(edge.start, num_bytes))
                if tensor.home is not None:
                    tensor.home.close()
                    tensor.home = None
        self._group.barrier("edges")

    def compose_direct(self) -> list[dict[str, torch.Tensor]]:
        """Per layer, composite tensors whose remote experts lie in the peers' own memory."""
        rank = self._group.rank
        composed = []
        for layer in self._tensors:
            tensors = {}
            for tensor in layer:
                memory = self._fabric.reserve(tensor.layout.mapped_bytes)
                for segment in tensor.layout.direct_segments(rank):
                    regions = (
                        tensor.resident if segment.rank == rank else tensor.imported[segment.rank]
                    )
                    memory.map(segment.start, regions[segment.piece], writable=False)
                tensors[tensor.spec.name] = self._typed(tensor, memory)
            composed.append(tensors)
        return composed

    def compose_staged(self, slots: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Per layer, composite tensors whose remote experts lie in the layer's slot.

        Args:
            slots: the slot of every layer.

        Raises:
            FabricError: no memory for the slots.
        """
        rank = self._group.rank
        self._slots = [{} for _ in range(max(slots, default=-1) + 1)]
        composed = []
        for layer, slot in zip(self._tensors, slots, strict=True):
            tensors = {}
            for tensor, key in zip(layer, _buffer_keys(layer), strict=True):
                layout = tensor.layout
                if key not in self._slots[slot]:
                    self._slots[slot][key] = self._slot_buffer(layout)
                memory = self._fabric.reserve(layout.mapped_bytes)
                for piece, region in tensor.resident.items():
                    memory.map(layout.pieces[piece].start, region, writable=False)
                for part, region in zip(
                    layout.slot_parts(rank), self._slots[slot][key].parts, strict=True
                ):
                    memory.map(part.start, region, writable=False)
                tensors[tensor.spec.name] = self._typed(tensor, memory)
            composed.append(tensors)
        return composed

    def staged_layers(self, slots: Sequence[int], num_lanes: int) -> list[StagedLayer]:
        """Per layer, the copies of one fetch into its slot. After ``compose_staged``.

        Sources share a lane when there are more sources than lanes; their slices then alternate.
        """
        plans: dict[tuple[tuple[int, int], ...], FetchPlan] = {}
        staged = []
        for layer, slot in zip(self._tensors, slots, strict=True):
            shape = tuple((t.spec.num_experts, t.spec.expert_bytes) for t in layer)
            if shape not in plans:
                plans[shape] = build_fetch_plan(
                    self._group.rank, [t.layout for t in layer], self._config.slice_bytes
                )
            buffers = [self._slots[slot][key].memory for key in _buffer_keys(layer)]
            lanes: list[list[Copy]] = [[] for _ in range(num_lanes)]
            for round_ in plans[shape].rounds():
                for position, piece in enumerate(round_):
                    if piece is not None:
                        lanes[position % num_lanes].append(self._copy(layer, buffers, piece))
            views = [view for tensor in layer for view in tensor.views.values()]
            staged.append(
                StagedLayer(tuple(map(tuple, lanes)), (*buffers, *views), plans[shape].num_bytes)
            )
        return staged

    def close(self) -> None:
        """Give up every range and region. Memory a tensor still views goes with the tensor."""
        for layer in self._tensors:
            for tensor in layer:
                for memory in (tensor.home, *tensor.views.values()):
                    if memory is not None:
                        memory.close()
                for regions in (tensor.resident, *tensor.imported.values()):
                    for region in regions.values():
                        region.close()
                tensor.home = None
                tensor.views.clear()
                tensor.resident.clear()
                tensor.imported.clear()
        for slot in self._slots:
            for buffer in slot.values():
                buffer.memory.close()
                for part in buffer.parts:
                    part.close()
        for memory in self._composites:
            memory.close()
        self._slots.clear()
        self._composites.clear()

    def _placement(self, num_experts: int) -> Placement:
        if num_experts not in self._placements:
            self._placements[num_experts] = build_placement(
                num_experts,
                self._group.size,
                num_experts_per_worker=self._config.num_experts_per_worker,
                num_prefetch_experts=self._config.num_prefetch_experts,
            )
        return self._placements[num_experts]

    def _layout(self, spec: ExpertTensorSpec) -> TensorLayout:
        key = (spec.num_experts, spec.expert_bytes)
        if key not in self._layouts:
            self._layouts[key] = build_layout(
                self._placement(spec.num_experts), spec.expert_bytes, self._fabric.granularity
            )
        return self._layouts[key]

    def _digest(self) -> bytes:
        described = repr((self._group.size, self.layers, self._config.model_dump()))
        return hashlib.sha256(described.encode()).digest()

    def _import_from(self, peer: int, address: str) -> None:
        for index, layer in enumerate(self._tensors):
            wanted = [
                (tensor, piece) for tensor in layer for piece in tensor.layout.rank_pieces(peer)
            ]
            sizes = []
            for tensor, piece in wanted:
                start, stop = tensor.layout.pieces[piece]
                sizes.append(stop - start)
            regions = self._fabric.fetch_regions(
                address,
                self._group.token,
                _published_name(index),
                sizes,
                self._config.setup_timeout_s,
            )
            for (tensor, piece), region in zip(wanted, regions, strict=True):
                tensor.imported.setdefault(peer, {})[piece] = region

    def _view(self, tensor: _Tensor, source: int) -> AddressRange:
        """A source's resident memory, at the offsets it has in the composite tensor."""
        if source not in tensor.views:
            view = self._fabric.reserve(tensor.layout.mapped_bytes)
            for piece, region in tensor.imported[source].items():
                view.map(tensor.layout.pieces[piece].start, region, writable=False)
            tensor.views[source] = view
        return tensor.views[source]

    def _copy(
        self, layer: Sequence[_Tensor], buffers: Sequence[AddressRange], piece: Slice
    ) -> Copy:
        source = self._view(layer[piece.tensor], piece.source)
        return Copy(
            buffers[piece.tensor].address + piece.start,
            source.address + piece.start,
            piece.num_bytes,
        )

    def _slot_buffer(self, layout: TensorLayout) -> _SlotBuffer:
        memory = self._fabric.reserve(layout.mapped_bytes)
        parts = []
        for part in layout.slot_parts(self._group.rank):
            parts.append(self._fabric.allocate(part.stop - part.start))
            memory.map(part.start, parts[-1], writable=True)
        return _SlotBuffer(tuple(parts), memory)

    def _typed(self, tensor: _Tensor, memory: AddressRange) -> torch.Tensor:
        self._composites.append(memory)
        spec = tensor.spec
        raw = memory.bytes_tensor(0, tensor.layout.total_bytes)
        return raw.view(spec.dtype).view(spec.num_experts, *spec.expert_shape)


def _published_name(layer: int) -> str:
    return f"layer/{layer}"


def _buffer_keys(layer: Sequence[_Tensor]) -> list[tuple[int, int, int]]:
    """Which buffer of a slot each tensor uses: layers share buffers, tensors of one layer never do."""
    keys: list[tuple[int, int, int]] = []
    for tensor in layer:
        shape = (tensor.spec.num_experts, tensor.spec.expert_bytes)
        keys.append((*shape, sum(key[:2] == shape for key in keys)))
    return keys
