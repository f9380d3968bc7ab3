"""Expert tensors of one model: resident memory, peers' memory, and composite tensors made of both.

Set-up goes through the steps of :class:`ExpertWeights` in order: ``allocate``, or ``allocate_layer`` for
each layer (resident memory, into which the engine loads), ``exchange`` (peers map each other's resident
memory), ``fill_edges`` (bytes of neighbours on pages a rank shares with them), then ``compose_direct``, or
the staging slots of :mod:`dwdp.staging`. Nothing needs the regions after that: ``close_regions``.

A tensor that fits a page (scales, biases) is held whole by every rank and never fetched. All of those
lie packed in one region: apart, each would take a page, 2 MiB on a GPU.

Shape legend: ``E`` = experts of a layer; an expert tensor is ``[E, *expert_shape]``.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from dwdp.config import DwdpConfig
from dwdp.fabric.base import AddressRange, Fabric, Region
from dwdp.group import Group
from dwdp.layout import TensorLayout, build_layout, is_packed, pack
from dwdp.placement import Placement, build_placement
from dwdp.rendezvous import GroupError

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
    """The expert tensors of one MoE layer; all of them have the same number of experts.

    Attributes:
        top_k, hidden_size: experts per token, and the model's width, where the engine knows them: they
            decide which steps fetch on demand in mode ``auto``.
    """

    name: str
    tensors: tuple[ExpertTensorSpec, ...]
    top_k: int | None = None
    hidden_size: int | None = None

    def __post_init__(self) -> None:
        counts = {tensor.num_experts for tensor in self.tensors}
        if len(counts) != 1:
            raise ValueError(
                f"expert tensors of {self.name} hold {sorted(counts)} experts; one count is needed"
            )

    @property
    def num_experts(self) -> int:
        return self.tensors[0].num_experts


@dataclass
class MappedTensor:
    """What this rank holds and maps of one expert tensor.

    Attributes:
        base: where the tensor starts in ``home``, ``views`` and its composite range: not 0 for a tensor
            that is packed together with others.
        resident: the rank's own regions by piece.
        home: addresses that the rank's own experts are loaded to, until the edges are filled.
        imported: every peer's regions by piece.
    """

    spec: ExpertTensorSpec
    layout: TensorLayout
    base: int = 0
    resident: dict[int, Region] = field(default_factory=dict)
    home: AddressRange | None = None
    imported: dict[int, dict[int, Region]] = field(default_factory=dict)

    def typed(self, memory: AddressRange) -> torch.Tensor:
        """The tensor in ``memory``: ``[num_experts, *expert_shape]``."""
        raw = memory.bytes_tensor(self.base, self.layout.total_bytes)
        return raw.view(self.spec.dtype).view(self.spec.num_experts, *self.spec.expert_shape)

    def close(self) -> None:
        if self.home is not None:
            self.home.close()
        self.home = None
        self.close_regions()

    def close_regions(self) -> None:
        """Drop the handles of all memory, which stays mapped."""
        for regions in (self.resident, *self.imported.values()):
            for region in regions.values():
                region.close()
        self.resident.clear()
        self.imported.clear()


class PeerMemory:
    """All that one peer stores, in one address range without holes: what is copied from it is read here.

    A range of its own for every tensor would cost one of about 900 routing entries of NVLink fabric memory
    each (see :class:`~dwdp.fabric.base.AddressRange`), more than a large model has.
    """

    def __init__(
        self, fabric: Fabric, pieces: Sequence[tuple[Sequence[MappedTensor], int, Region]]
    ) -> None:
        """Map ``pieces``: whose bytes a region has, where it starts in their composite ranges, and itself."""
        self.memory = fabric.reserve(sum(region.num_bytes for *_, region in pieces))
        self._starts: dict[int, list[tuple[int, int]]] = defaultdict(list)
        offset = 0
        for tensors, start, region in pieces:
            self.memory.map(offset, region)
            for tensor in tensors:
                self._starts[id(tensor)].append((start, offset))
            offset += region.num_bytes
        self.memory.enable_access(writable=False)

    def offset(self, tensor: MappedTensor, start: int) -> int:
        """Where byte ``start`` of ``tensor``'s composite range lies. What follows it there follows here."""
        piece_start, offset = max(pair for pair in self._starts[id(tensor)] if pair[0] <= start)
        return offset + start - piece_start


@dataclass
class _Pack:
    """Tensors smaller than a page, which every rank holds whole: together in one region."""

    tensors: list[MappedTensor]
    num_bytes: int
    composite: AddressRange | None = None


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
        self.tensors = tuple(
            tuple(MappedTensor(spec, self._layout(spec)) for spec in layer.tensors)
            for layer in layers
        )
        self._pack = _pack([tensor for layer in self.tensors for tensor in layer], fabric)
        self._composites: list[AddressRange] = []
        self._peers: dict[int, PeerMemory] = {}

    def placement(self, layer: int) -> Placement:
        return self._placement(self.layers[layer].num_experts)

    @property
    def rank(self) -> int:
        return self._group.rank

    @cached_property
    def resident_bytes(self) -> int:
        """Physical bytes of this rank's resident experts, page edges included."""
        unpacked = sum(
            tensor.layout.resident_bytes(self.rank)
            for layer in self.tensors
            for tensor in layer
            if not is_packed(tensor.layout)
        )
        return unpacked + self._pack.num_bytes

    @property
    def num_regions(self) -> int:
        """Regions that this rank allocates and publishes for its resident experts."""
        return self._num_regions(self.rank)

    @property
    def num_imported_regions(self) -> int:
        """Regions that this rank gets from its peers."""
        peers = (peer for peer in range(self._group.size) if peer != self.rank)
        return sum(map(self._num_regions, peers))

    def allocate(self) -> None:
        """Take memory for the resident experts of every layer.

        Raises:
            FabricError: the memory is not there.
        """
        for layer in range(len(self.layers)):
            self.allocate_layer(layer)

    def allocate_layer(self, layer: int) -> None:
        """Take memory for the resident experts of one layer; with the first, for all small tensors.

        For an engine that has loaded the experts elsewhere: it moves one layer at a time, and so
        never needs room for a second copy of its share.

        Raises:
            FabricError: the memory is not there.
        """
        if self._pack.tensors and self._pack.tensors[0].home is None:
            region = self._fabric.allocate(self._pack.num_bytes)
            home = self._range_of(region, writable=True)
            for tensor in self._pack.tensors:
                tensor.resident[0], tensor.home = region, home
        for tensor in self.tensors[layer]:
            if is_packed(tensor.layout):
                continue
            assert tensor.home is None, "a layer is allocated once"
            layout = tensor.layout
            tensor.home = self._fabric.reserve(layout.mapped_bytes)
            for piece in layout.rank_pieces(self.rank):
                start, stop = layout.pieces[piece]
                tensor.resident[piece] = self._fabric.allocate(stop - start)
                tensor.home.map(start, tensor.resident[piece])
            tensor.home.enable_access(writable=True)

    def destination(self, layer: int, name: str, expert: int) -> torch.Tensor:
        """Where a resident expert of one tensor is loaded to: ``[*expert_shape]`` of its dtype.

        Only between ``allocate`` (or ``allocate_layer`` of that layer) and ``fill_edges``; drop the
        view before ``fill_edges``.

        Raises:
            KeyError: the layer has no such tensor, or this rank does not store that expert.
        """
        tensor = next((t for t in self.tensors[layer] if t.spec.name == name), None)
        if tensor is None or not self.placement(layer).is_resident(self.rank, expert):
            raise KeyError(
                f"expert {expert} of {name!r} in layer {layer} is not stored on this rank"
            )
        assert tensor.home is not None, "destination() before allocate() or after fill_edges()"
        num_bytes = tensor.spec.expert_bytes
        raw = tensor.home.bytes_tensor(tensor.base + expert * num_bytes, num_bytes)
        return raw.view(tensor.spec.dtype).view(tensor.spec.expert_shape)

    def exchange(self) -> None:
        """Hand this rank's memory to the peers and take theirs.

        Raises:
            GroupError: the ranks load different models or use different options.
            FabricError: a peer's memory cannot be had.
            RuntimeError: a layer was not allocated.
        """
        for layer, tensors in zip(self.layers, self.tensors, strict=True):
            if any(tensor.home is None for tensor in tensors):
                raise RuntimeError(f"exchange() before allocate_layer() of {layer.name}")
        group = self._group
        digests = group.exchange("model", self._digest())
        differing = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if differing:
            raise GroupError(
                f"rank(s) {', '.join(map(str, differing))} and rank 0 have different expert tensors or "
                "dwdp options; start every rank with the same model and options"
            )
        self._fabric.synchronize()
        self._fabric.serve(group.token)
        for name, wanted in self._published(self.rank):
            self._fabric.publish(name, [tensor.resident[piece] for tensor, piece in wanted])
        tickets = group.exchange("memory", self._fabric.ticket())
        for peer in range(group.size):
            if peer != group.rank:
                self._import_from(peer, tickets[peer])

    def fill_edges(self) -> None:
        """Copy the bytes of other ranks' experts that share a page with this rank's own.

        Done once: weights do not change. Ends with a barrier, after which every resident page of
        every rank is complete.
        """
        for layer in self.tensors:
            for tensor in layer:
                assert tensor.home is not None
                for edge in tensor.layout.edges(self.rank):
                    start, num_bytes = tensor.base + edge.start, edge.stop - edge.start
                    peer = self.peer_memory(edge.source)
                    source = peer.memory.bytes_tensor(peer.offset(tensor, start), num_bytes)
                    tensor.home.bytes_tensor(start, num_bytes).copy_(source)
        for layer in self.tensors:
            for tensor in layer:
                if tensor.home is not None:
                    tensor.home.close()
                    tensor.home = None
        self._fabric.synchronize()
        self._group.barrier("edges")

    def compose_direct(self) -> list[dict[str, torch.Tensor]]:
        """Per layer, composite tensors whose remote experts lie in the peers' own memory."""
        self._close_peers()  # Nothing is copied any more.
        return [
            {
                tensor.spec.name: self.compose(
                    tensor,
                    [
                        (segment.start, self._regions(tensor, segment.rank)[segment.piece])
                        for segment in tensor.layout.direct_segments(self.rank)
                    ],
                )
                for tensor in layer
            }
            for layer in self.tensors
        ]

    def compose(self, tensor: MappedTensor, segments: Sequence[tuple[int, Region]]) -> torch.Tensor:
        """A composite tensor of ``(offset, region)`` segments, ``[num_experts, *expert_shape]``, read-only.

        A packed tensor has no segments of its own: it is a view of the pack.
        """
        if is_packed(tensor.layout):
            if self._pack.composite is None:
                self._pack.composite = self._range_of(tensor.resident[0], writable=False)
                self._composites.append(self._pack.composite)
            return tensor.typed(self._pack.composite)
        memory = self._fabric.reserve(tensor.layout.mapped_bytes)
        self._composites.append(memory)
        for start, region in segments:
            memory.map(start, region)
        memory.enable_access(writable=False)
        return tensor.typed(memory)

    def peer_memory(self, source: int) -> PeerMemory:
        """All that ``source`` stores, to copy from."""
        if source not in self._peers:
            pieces: list[tuple[Sequence[MappedTensor], int, Region]] = [
                ([tensor], tensor.layout.pieces[piece].start, region)
                for layer in self.tensors
                for tensor in layer
                if not is_packed(tensor.layout)
                for piece, region in sorted(tensor.imported[source].items())
            ]
            packed = self._pack.tensors
            if packed:
                pieces.append((packed, 0, packed[0].imported[source][0]))
            self._peers[source] = PeerMemory(self._fabric, pieces)
        return self._peers[source]

    def close_regions(self) -> None:
        """Drop the handles of all memory, this rank's own and the peers': it stays mapped, and published.

        Nothing can be composed or viewed for the first time after that.
        """
        for layer in self.tensors:
            for tensor in layer:
                tensor.close_regions()

    def close(self) -> None:
        """Give up every range and region. Memory a tensor still views goes with the tensor."""
        for layer in self.tensors:
            for tensor in layer:
                tensor.close()
        self._close_peers()
        for memory in self._composites:
            memory.close()
        self._composites.clear()
        self._pack.composite = None

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

    def _published(self, rank: int) -> list[tuple[str, list[tuple[MappedTensor, int]]]]:
        """What ``rank`` publishes: by name, whose pieces."""
        published = [
            (
                f"layer/{index}",
                [
                    (tensor, piece)
                    for tensor in layer
                    if not is_packed(tensor.layout)
                    for piece in tensor.layout.rank_pieces(rank)
                ],
            )
            for index, layer in enumerate(self.tensors)
        ]
        return [*published, ("packed", [(tensor, 0) for tensor in self._pack.tensors[:1]])]

    def _num_regions(self, rank: int) -> int:
        return sum(len(pieces) for _, pieces in self._published(rank))

    def _import_from(self, peer: int, ticket: bytes) -> None:
        for name, wanted in self._published(peer):
            sizes = [self._region_bytes(tensor, piece) for tensor, piece in wanted]
            regions = self._fabric.fetch_regions(
                ticket, self._group.token, name, sizes, self._config.setup_timeout_s
            )
            for (tensor, piece), region in zip(wanted, regions, strict=True):
                tensor.imported.setdefault(peer, {})[piece] = region
        for tensor in self._pack.tensors:
            tensor.imported[peer] = self._pack.tensors[0].imported[peer]

    def _region_bytes(self, tensor: MappedTensor, piece: int) -> int:
        if is_packed(tensor.layout):
            return self._pack.num_bytes
        start, stop = tensor.layout.pieces[piece]
        return stop - start

    def _close_peers(self) -> None:
        for peer in self._peers.values():
            peer.memory.close()
        self._peers.clear()

    def _regions(self, tensor: MappedTensor, rank: int) -> dict[int, Region]:
        return tensor.resident if rank == self.rank else tensor.imported[rank]

    def _range_of(self, region: Region, *, writable: bool) -> AddressRange:
        memory = self._fabric.reserve(region.num_bytes)
        memory.map(0, region)
        memory.enable_access(writable)
        return memory


def _pack(tensors: Sequence[MappedTensor], fabric: Fabric) -> _Pack:
    """Give every tensor that is packed its place in the pack."""
    packed = [tensor for tensor in tensors if is_packed(tensor.layout)]
    offsets, num_bytes = pack([tensor.layout.total_bytes for tensor in packed], fabric.granularity)
    for tensor, offset in zip(packed, offsets, strict=True):
        tensor.base = offset
    return _Pack(packed, num_bytes)
