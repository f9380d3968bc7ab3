"""DwdpRuntime: the experts of one rank's model, from attach to detach. The only thing an engine talks to."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dwdp.config import DwdpConfig
from dwdp.fabric import create_fabric
from dwdp.fabric.base import Fabric
from dwdp.group import Group
from dwdp.pipeline import Pipeline, PipelineStats, PreparedLayer, assign_slots
from dwdp.weights import ExpertWeights, LayerSpec

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RuntimeStats:
    """What one rank holds and has moved.

    Attributes:
        fetch_mode: the mode in force, ``staged`` or ``direct``.
        resident_expert_bytes, staging_bytes: physical memory of this rank.
        num_slots: staging slots in use (0 in direct mode).
        num_fetches, fetched_bytes, num_waits, exposed_wait_s: see :class:`PipelineStats`.
    """

    fetch_mode: str
    resident_expert_bytes: int
    staging_bytes: int
    num_slots: int
    num_fetches: int
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
        runtime.begin(layer); ...; runtime.end(layer)   # around every read of them
        runtime.detach()

    After ``attach`` no call waits for another rank. ``begin`` and ``end`` are for one thread.

    Args:
        group: the ranks; ``group.size`` must equal ``config.dwdp_size``.
        config: the same on every rank.
        fabric: where memory comes from; the host fabric if none is given.

    Raises:
        ValueError: the group's size differs from the configuration's, or the ranks do not share the
            one host that the host fabric needs.
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
        self._weights: ExpertWeights | None = None
        self._tensors: list[dict[str, torch.Tensor]] = []
        self._pipeline: Pipeline | None = None
        self._stats: RuntimeStats | None = None

    def allocate(self, layers: Sequence[LayerSpec]) -> ExpertWeights:
        """Take memory for this rank's experts of ``layers`` (in the order of the forward).

        Returns:
            The memory to load into, through ``destination(layer, name, expert)``.

        Raises:
            ValueError: the experts cannot be placed.
            FabricError: the memory is not there.
        """
        if self._weights is not None:
            raise RuntimeError("allocate() was called before; one runtime holds one model")
        weights = ExpertWeights(self.group, self._fabric, self.config, layers)
        self._weights = weights
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
            self.group.barrier("attached")
        except BaseException:
            self.detach()
            raise
        if self._pipeline is not None:
            self._pipeline.start()

    def tensors(self, layer: int) -> dict[str, torch.Tensor]:
        """The composite tensors of one layer by name: ``[E, *expert_shape]``, read-only.

        In staged mode their remote experts are only there between ``begin`` and ``end``.
        """
        return self._tensors[layer]

    def begin(self, layer: int) -> None:
        """Return when ``layer``'s composite tensors may be read."""
        if self._pipeline is not None:
            self._pipeline.begin(layer)

    def end(self, layer: int) -> None:
        """The reads of ``layer`` are submitted; its slot may be refilled after them."""
        if self._pipeline is not None:
            self._pipeline.end(layer)

    @property
    def is_staged(self) -> bool:
        """Whether ``begin`` and ``end`` have anything to do."""
        return self._pipeline is not None

    def stats(self) -> RuntimeStats:
        """Counters so far; after ``detach``, those at its time."""
        if self._stats is not None:
            return self._stats
        weights = self._weights
        pipeline = self._pipeline.stats if self._pipeline is not None else PipelineStats()
        return RuntimeStats(
            fetch_mode=self.fetch_mode,
            resident_expert_bytes=weights.resident_bytes if weights is not None else 0,
            staging_bytes=weights.staging_bytes if weights is not None else 0,
            num_slots=self._pipeline.num_slots if self._pipeline is not None else 0,
            num_fetches=pipeline.num_fetches,
            fetched_bytes=pipeline.fetched_bytes,
            num_waits=pipeline.num_waits,
            exposed_wait_s=pipeline.exposed_wait_s,
        )

    def detach(self) -> None:
        """Stop fetching and give all memory back. Idempotent; peers are not affected.

        Composite tensors that are still referenced keep their mapping until they are dropped.
        """
        if self._stats is None:
            self._stats = self.stats()
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None
        self._tensors = []
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
        return "direct" if self._fabric.name == "host" else "staged"

    def _stage(self) -> Pipeline:
        assert self._weights is not None
        slots = assign_slots(len(self._weights.layers), self.config.num_slots)
        if max(slots, default=0) >= self.config.num_slots:
            logger.info(
                "%d MoE layers are an odd number: a third slot keeps the last layer and the first apart",
                len(slots),
            )
        self._tensors = self._weights.compose_staged(slots)
        num_lanes = min(self.config.num_lanes or self.group.size, self.group.size - 1)
        engine = self._fabric.copy_engine(num_lanes, self.config.lane_depth)
        layers = [
            PreparedLayer(engine.prepare(layer.lanes, layer.ranges), layer.num_bytes)
            for layer in self._weights.staged_layers(slots, num_lanes)
        ]
        return Pipeline(self._fabric, engine, layers, slots)
