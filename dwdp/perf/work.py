"""The work of one forward on one rank, as the simulators take it: segments of known length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from dwdp.perf.hardware import Hardware
from dwdp.perf.model import Layer, Model
from dwdp.perf.operators import Batch
from dwdp.perf.roofline import ONE_COPY_PER_RANK, Collective, Group, layer_time

Part = Literal["attention", "dense_gemm", "grouped_gemm", "other", "exchange", "wait"]
PARTS: tuple[Part, ...] = ("attention", "dense_gemm", "grouped_gemm", "other", "exchange", "wait")


class Segment(NamedTuple):
    """``seconds`` of work of one kind, at full speed."""

    part: Part
    seconds: float


@dataclass(frozen=True)
class LayerWork:
    """One layer on one rank.

    Attributes:
        window: what runs before the experts, in order; of a dense layer, everything.
        experts_s: the grouped GEMM with every expert at hand; None for a dense layer.
        dep_experts_s: the grouped GEMM of expert parallelism.
        exchange_s: dispatch and combine of expert parallelism together.
    """

    window: tuple[Segment, ...]
    experts_s: float | None
    dep_experts_s: float = 0.0
    exchange_s: float = 0.0

    def scaled(self, factor: float) -> LayerWork:
        """The same with everything ``factor`` times as long."""
        return LayerWork(
            tuple(Segment(part, seconds * factor) for part, seconds in self.window),
            None if self.experts_s is None else self.experts_s * factor,
            self.dep_experts_s * factor,
            self.exchange_s * factor,
        )


@dataclass(frozen=True)
class RankWork:
    """One forward on one rank.

    Attributes:
        layers: in order.
        overhead_s: host time at the start of the forward.
    """

    layers: tuple[LayerWork, ...]
    overhead_s: float = 0.0

    @property
    def compute_s(self) -> float:
        """All segments and experts, without waits or interference."""
        return self.overhead_s + sum(
            sum(segment.seconds for segment in layer.window) + (layer.experts_s or 0.0)
            for layer in self.layers
        )

    def scaled(self, factor: float) -> RankWork:
        """The same with every segment ``factor`` times as long (overhead and exchange included)."""
        distinct = {id(layer): layer for layer in self.layers}
        scaled = {key: layer.scaled(factor) for key, layer in distinct.items()}
        return RankWork(tuple(scaled[id(layer)] for layer in self.layers), self.overhead_s * factor)


def rank_work(
    model: Model,
    hardware: Hardware,
    batch: Batch,
    group: Group,
    collective: Collective = ONE_COPY_PER_RANK,
) -> RankWork:
    """The work of one forward of ``batch``, from the roofline at the hardware's achieved rates.

    Half of what is neither attention nor a product runs before attention (norm, rotary embedding,
    quantisation), half between attention and the experts (norm, routing, gather): where exactly is an
    assumption, and only matters for which of it a copy runs beside.
    """
    distinct = {
        layer: _layer_work(model, layer, hardware, batch, group, collective)
        for layer in model.layer_counts
    }
    layers = tuple(distinct[layer] for layer in model.layers)
    return RankWork(layers, hardware.achieved.step_overhead_s)


def _layer_work(
    model: Model,
    layer: Layer,
    hardware: Hardware,
    batch: Batch,
    group: Group,
    collective: Collective,
) -> LayerWork:
    time = layer_time(model, layer, hardware, batch, group, collective)
    window = [Segment("other", time.other_s / 2)]
    for operator in time.operators:
        category = operator.operator.category
        if operator.operator.name == "router":
            window.append(Segment("other", time.other_s / 2))
        if category != "grouped_gemm":
            window.append(Segment(category, operator.seconds))
    if layer.moe is None:
        window.append(Segment("other", time.other_s / 2))
        return LayerWork(_merged(window), None)
    return LayerWork(
        _merged(window), time.category_s("grouped_gemm"), time.dep_experts_s, time.exchange_s
    )


def _merged(segments: list[Segment]) -> tuple[Segment, ...]:
    merged: list[Segment] = []
    for segment in segments:
        if not segment.seconds:
            continue
        if merged and merged[-1].part == segment.part:
            merged[-1] = Segment(segment.part, merged[-1].seconds + segment.seconds)
        else:
            merged.append(segment)
    return tuple(merged)
