"""DwdpRuntime: the experts of one rank's model, from attach to detach. The only thing an engine talks to."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from dwdp.config import DwdpConfig
from dwdp.fabric import create_fabric
from dwdp.fabric.base import Fabric, FabricError
from dwdp.group import Group
from dwdp.memory_plan import (
    ExpertTensorSize,
    check_group_memory,
    group_memory_pools,
    plan_memory,
)
from dwdp.observability.spans import DEMAND_LANE, Span, fetch_lane
from dwdp.perf.demand import LayerFetch, crossover_tokens
from dwdp.perf.hardware import find_hardware
from dwdp.pipeline import Pipeline, PipelineStats, PreparedLayer, layer_slots
from dwdp.staging import Staging, num_slot_regions
from dwdp.weights import ExpertWeights, LayerSpec

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RuntimeStats:
    """What one rank holds and has moved.

    Attributes:
        fetch_mode: the mode in force: ``direct``, ``staged``, ``demand``, or ``auto``, which takes
            one of the last two at each step.
        resident_expert_bytes, staging_bytes: physical memory of this rank.
        num_slots: staging slots in use (0 in direct mode).
        num_fetches, num_demands, fetched_bytes, num_waits, exposed_wait_s: see
            :class:`PipelineStats`.
    """

    fetch_mode: str
    resident_expert_bytes: int
    staging_bytes: int
    num_slots: int
    num_fetches: int
    num_demands: int
    fetched_bytes: int
    num_waits: int
    exposed_wait_s: float


class DwdpRuntime:
    """Shares out a model's experts over a group and keeps remote ones at hand.

    Life of a runtime, on every rank alike::

        runtime = DwdpRuntime(group, config)
        weights = runtime.allocate(layers)          # then load this rank's experts into `weights`
        runtime.attach()                            # peers' memory mapped, first fetches under way
        tensors = runtime.tensors(layer)            # composite tensors, [E, *expert_shape]
        runtime.begin(layer, indices); ...; runtime.end(layer)   # around every read of them
        runtime.detach()

    Every rank makes one. On the host fabric making it waits for all of them, to learn what memory each can
    draw on; ``attach`` waits for all of them on any fabric; ``allocate`` does not. After ``attach`` no call
    waits for another rank. ``begin`` and ``end`` are for one thread.

    Args:
        group: the ranks; ``group.size`` must equal ``config.dwdp_size``.
        config: the same on every rank.
        fabric: where memory comes from; the host fabric if none is given.

    Raises:
        ValueError: the group's size differs from the configuration's, or the ranks do not share the
            one host that the host fabric needs.
        GroupError: a peer failed or did not answer (host fabric).
    """

    def __init__(self, group: Group, config: DwdpConfig, fabric: Fabric | None = None) -> None:
        if group.size != config.dwdp_size:
            raise ValueError(
                f"{group.size} ranks were started but dwdp_size is {config.dwdp_size}; "
                "start as many ranks as dwdp_size says"
            )
        self.group = group
        self.config = config
        self._fabric = fabric if fabric is not None else create_fabric("host")
        if self._fabric.name == "host" and not group.is_one_host:
            raise ValueError("the host fabric shares memory, so all ranks must run on one host")
        self.fetch_mode = self._resolve_fetch_mode()
        # Here and not in allocate(), which may run where only one rank at a time can: in a lock of the
        # engine, if ranks are threads.
        self._memory_pools = group_memory_pools(group) if self._fabric.name == "host" else {}
        self._weights: ExpertWeights | None = None
        self._staging: Staging | None = None
        self._tensors: list[dict[str, torch.Tensor]] = []
        self._pipeline: Pipeline | None = None
        self._stats: RuntimeStats | None = None

    def allocate(
        self, layers: Sequence[LayerSpec], *, layer_by_layer: bool = False
    ) -> ExpertWeights:
        """Take memory for this rank's experts of ``layers`` (in the order of the forward).

        Every rank calls it. None waits for another: what they need together is compared with the memory
        that the constructor asked them for (host fabric).

        Args:
            layer_by_layer: take none yet; the caller calls ``allocate_layer`` of what is returned for
                every layer, before it loads that layer and before ``attach``.

        Returns:
            The memory to load into, through ``destination(layer, name, expert)``.

        Raises:
            ValueError: the experts cannot be placed, or take more descriptors than the process may have
                (host fabric). Nothing has been taken.
            NotEnoughMemoryError: resident experts and staging slots of the group need more memory than
                is available (host fabric). Nothing has been taken.
            FabricError: the memory is not there.
        """
        if self._weights is not None:
            raise RuntimeError("allocate() was called before; one runtime holds one model")
        weights = ExpertWeights(self.group, self._fabric, self.config, layers)
        if self._fabric.name == "host":
            self._check_memory(layers)
        if self._fabric.regions_are_descriptors:
            self._check_descriptors(weights)
        self._weights = weights
        if not layer_by_layer:
            try:
                weights.allocate()
            except BaseException:
                self.detach()
                raise
        return weights

    def attach(self) -> None:
        """Map the peers' experts and start fetching. Every rank calls it once, after loading.

        Raises:
            GroupError: a peer failed, or loads another model.
            FabricError: memory or descriptors cannot be had.
        """
        if self._weights is None or self._tensors:
            raise RuntimeError("attach() comes once, after allocate()")
        try:
            self._weights.exchange()
            self._weights.fill_edges()
            if self.fetch_mode == "direct":
                self._tensors = self._weights.compose_direct()
            else:
                self._pipeline = self._stage()
            if self._fabric.regions_are_descriptors:
                self._close_regions()
            self.group.barrier("attached")
        except BaseException:
            self.detach()
            raise
        if self._pipeline is not None and self.fetch_mode != "demand":
            self._pipeline.start()

    def tensors(self, layer: int) -> dict[str, torch.Tensor]:
        """The composite tensors of one layer by name: ``[E, *expert_shape]``, read-only.

        In staged mode their remote experts are only there between ``begin`` and ``end``.
        """
        return self._tensors[layer]

    def begin(self, layer: int, indices: torch.Tensor | None = None) -> None:
        """Return when ``layer``'s composite tensors may be read, or will be when compute comes to it.

        Args:
            indices: the router's choice of this step, ``[tokens, top_k]``, int32 or int64, on the
                compute device. Steps that fetch on demand need it; without it, all remote experts
                are fetched.

        A layer that is computed in parts begins once in each part, without indices, and ends once.
        """
        if self._stats is not None:
            raise RuntimeError("begin() after detach(): the experts' memory has been given back")
        if self._pipeline is not None:
            self._pipeline.begin(layer, indices)

    def end(self, layer: int) -> None:
        """The reads of ``layer`` are submitted; its slot may be refilled after them."""
        if self._pipeline is not None:
            self._pipeline.end(layer)

    @property
    def is_staged(self) -> bool:
        """Whether remote experts are copied into slots: ``begin`` and ``end`` have something to do."""
        return self._pipeline is not None

    @property
    def lanes(self) -> tuple[str, ...]:
        """The lanes that :meth:`drain_spans` tells of: none in direct mode, or with the CUDA fabric."""
        if not self._fabric.times_copies:
            return ()
        num_lanes = self._num_lanes if self.fetch_mode in ("staged", "auto") else 0
        demand = (DEMAND_LANE,) if self.fetch_mode in ("demand", "auto") else ()
        return (*map(fetch_lane, range(num_lanes)), *demand)

    def drain_spans(self) -> list[Span]:
        """When lanes fetched and compute stood still, since the last call; nothing after ``detach``.

        The spans of one lane are in order and do not overlap. Only the last thousand or so of each are
        kept. With the CUDA fabric there are none. May be called by any thread.
        """
        pipeline = self._pipeline
        return pipeline.drain_spans() if pipeline is not None else []

    def stats(self) -> RuntimeStats:
        """Counters so far; after ``detach``, those at its time."""
        if self._stats is not None:
            return self._stats
        return self._stats_with(self._pipeline.stats if self._pipeline else PipelineStats())

    def _stats_with(self, pipeline: PipelineStats) -> RuntimeStats:
        weights = self._weights
        return RuntimeStats(
            fetch_mode=self.fetch_mode,
            resident_expert_bytes=weights.resident_bytes if weights is not None else 0,
            staging_bytes=self._staging.num_bytes if self._staging is not None else 0,
            num_slots=self._pipeline.num_slots if self._pipeline is not None else 0,
            num_fetches=pipeline.num_fetches,
            num_demands=pipeline.num_demands,
            fetched_bytes=pipeline.fetched_bytes,
            num_waits=pipeline.num_waits,
            exposed_wait_s=pipeline.exposed_wait_s,
        )

    def detach(self) -> None:
        """Stop fetching and give all memory back. Idempotent; peers are not affected.

        Composite tensors that are still referenced keep their mapping until they are dropped.
        """
        if self._stats is None:
            try:
                self._stats = self.stats()
            except (
                FabricError
            ):  # A failed device cannot be asked; memory is given back all the same.
                self._stats = self._stats_with(PipelineStats())
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None
        self._tensors = []
        if self._staging is not None:
            self._staging.close()
            self._staging = None
        if self._weights is not None:
            self._weights.close()
            self._weights = None
        self._fabric.close()

    def __enter__(self) -> DwdpRuntime:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _resolve_fetch_mode(self) -> str:
        if self.group.size == 1:
            return "direct"
        if self.config.fetch_mode != "auto":
            return self.config.fetch_mode
        # On one host a peer's memory is as near as one's own: a copy would only cost.
        return "direct" if self._fabric.name == "host" else "auto"

    def _check_memory(self, layers: Sequence[LayerSpec]) -> None:
        sizes = [
            [ExpertTensorSize(tensor.num_experts, tensor.expert_bytes) for tensor in layer.tensors]
            for layer in layers
        ]
        plan = plan_memory(
            sizes,
            self.config,
            dense_bytes=0,
            staged=self.fetch_mode != "direct",
            granularity=self._fabric.granularity,
        )
        check_group_memory(self._memory_pools, plan)

    def _check_descriptors(self, weights: ExpertWeights) -> None:
        """Refuse what would run out of descriptors halfway through ``attach``, where most are open.

        Every region that this rank allocates is published by a second descriptor.
        """
        slots = self._slots(weights)
        regions = {
            "resident experts": 2 * weights.num_regions,
            "experts of peers": weights.num_imported_regions,
            "staging slots": num_slot_regions(weights, slots) if slots else 0,
            # A connection of every peer, one to a peer, and the server that they ask.
            "connections": self.group.size + 2,
        }
        num_open = len(os.listdir("/proc/self/fd"))
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = num_open + sum(regions.values())
        if limit != resource.RLIM_INFINITY and needed > limit:
            parts = ", ".join(f"{count} for {name}" for name, count in regions.items() if count)
            raise ValueError(
                f"rank {self.group.rank} needs {needed} open files ({num_open} are open; {parts}), and may "
                f"have {limit}: raise the hard limit with `ulimit -n {needed}` or more before starting it"
            )

    def _close_regions(self) -> None:
        """Nothing is mapped any more: ranges keep their mappings, and the server what was published."""
        assert self._weights is not None
        self._weights.close_regions()
        if self._staging is not None:
            self._staging.close_regions()

    def _slots(self, weights: ExpertWeights) -> tuple[int, ...]:
        """The slot of every layer; none where experts are read in place."""
        if self.fetch_mode == "direct":
            return ()
        return layer_slots(len(weights.layers), self.config)

    def _stage(self) -> Pipeline:
        assert self._weights is not None
        slots = self._slots(self._weights)
        if max(slots, default=0) >= self.config.num_slots:
            logger.info(
                "%d MoE layers are an odd number: a third slot keeps the last layer and the first apart",
                len(slots),
            )
        self._staging = Staging(self._fabric, self._weights, slots)
        self._tensors = self._staging.compose()
        num_lanes = self._num_lanes
        slice_bytes = self.config.slice_bytes if self.config.contention_opt else None
        engine = self._fabric.copy_engine(num_lanes, self.config.lane_depth)
        prepared = [
            PreparedLayer(
                engine.prepare(layer.lanes, layer.ranges, index),
                layer.num_bytes,
                None
                if self.fetch_mode == "staged"
                else engine.prepare_demand(layer.experts, layer.ranges, index),
            )
            for index, layer in enumerate(self._staging.layers(num_lanes, slice_bytes))
        ]
        return Pipeline(self._fabric, engine, prepared, slots, self._demand_max_tokens())

    @property
    def _num_lanes(self) -> int:
        if not self.config.contention_opt:
            return 1
        return min(self.config.num_lanes or self.group.size, self.group.size - 1)

    def _demand_max_tokens(self) -> float:
        """Steps of at most this many tokens fetch on demand."""
        if self.fetch_mode != "auto":
            return inf if self.fetch_mode == "demand" else 0
        if self.config.demand_max_tokens is not None:
            return self.config.demand_max_tokens
        assert self._weights is not None
        return min(map(self._expected_crossover, range(len(self._weights.layers))), default=0)

    def _expected_crossover(self, layer: int) -> int:
        """Up to how many tokens the performance model expects a fetch on demand to expose less time."""
        assert self._weights is not None
        spec = self._weights.layers[layer]
        if spec.top_k is None or spec.hidden_size is None:
            return 0
        num_resident = len(self._weights.placement(layer).resident_experts(self.group.rank))
        hardware = find_hardware(self._fabric.device_name)
        speeds = {}
        if hardware is not None:
            speeds = {
                "link_gbs": hardware.link.gbs * hardware.achieved.link,
                "memory_gbs": hardware.memory_gbs * hardware.achieved.memory,
                "compute_tflops": hardware.peak_flops("bf16")
                * hardware.achieved.grouped_gemm
                / 1e12,
            }
        return crossover_tokens(
            LayerFetch(
                expert_bytes=sum(tensor.expert_bytes for tensor in spec.tensors),
                num_experts=spec.num_experts,
                num_remote_experts=spec.num_experts - num_resident,
                top_k=spec.top_k,
                hidden_size=spec.hidden_size,
                num_ranks=self.group.size,
                bits_per_weight=8.0 * max(tensor.dtype.itemsize for tensor in spec.tensors),
                **speeds,
            )
        )
