"""Time of an iteration from first principles: what compute, prefetch and collectives take.

An operator takes the larger of its arithmetic and its memory traffic (Williams, Waterman and Patterson,
*Roofline*, CACM 52(4), 2009)::

    T_op = max(flops / (share * peak[datatype]), bytes / (share * memory bandwidth))

and operators of a layer follow each other. For a layer with experts, on a rank of a group of N:

* ``T_compute``: all operators, with every expert at hand.
* ``T_prefetch = R b / (share * link)``: R remote experts of b bytes; R = E - E/N without redundancy.
* ``T_DWDP = max(T_compute, T_prefetch)``: the fetch of one layer hides behind the compute of another.
* ``T_DEP = T_compute' + T_comm``: the grouped GEMM reads only the experts that the rank holds, for
  as many token copies as before (those of all ranks, shared out), and every token copy whose expert is
  elsewhere crosses the link twice, out in the dispatch format and back in 16 bits::

      T_comm = t k (N - 1) / N * (dispatch bytes + combine bytes) * H / (share * link)

  With ``Collective.deduplicated``, a token goes once to each rank that holds at least one of its experts:
  ``(N - 1) (1 - (1 - 1/N)^k)`` copies instead of ``k (N - 1) / N`` for evenly routed tokens.

Dense layers have no fetch and no exchange. Nothing here knows of imbalance, contention or interference:
that is ``dwdp/perf/simulator.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from dwdp.perf.demand import LayerFetch, expected_activated_experts
from dwdp.perf.hardware import Datatype, Hardware
from dwdp.perf.model import ACTIVATION_BYTES, BITS_PER_WEIGHT, COMPUTE_DATATYPE, Layer, Model
from dwdp.perf.operators import (
    Batch,
    Category,
    Operator,
    dense_operators,
    grouped_gemm,
    layer_operators,
)


@dataclass(frozen=True)
class Group:
    """Ranks that share the experts.

    Attributes:
        size: ranks.
        num_experts_per_worker: experts a rank stores per layer; None: an even share.
    """

    size: int
    num_experts_per_worker: int | None = None

    def remote_experts(self, num_experts: int) -> float:
        """Remote experts of a layer, averaged over the ranks."""
        stored = self.num_experts_per_worker
        return num_experts - (num_experts / self.size if stored is None else stored)


@dataclass(frozen=True)
class Collective:
    """The all-to-all exchange of expert parallelism.

    Attributes:
        dispatch: format in which tokens travel to the experts.
        combine: format in which results travel back.
        deduplicated: a token goes once per rank rather than once per expert.
    """

    dispatch: Datatype = "fp4"
    combine: Datatype = "bf16"
    deduplicated: bool = True

    def bytes_per_token(self, hidden_size: int, top_k: int, num_ranks: int) -> float:
        """Bytes that one token sends and receives back over the link, per layer."""
        if self.deduplicated:
            copies = (num_ranks - 1) * (1 - (1 - 1 / num_ranks) ** top_k)
        else:
            copies = top_k * (num_ranks - 1) / num_ranks
        return (
            copies
            * hidden_size
            * (ACTIVATION_BYTES[self.dispatch] + ACTIVATION_BYTES[self.combine])
        )


ONE_COPY_PER_RANK = Collective()
"""What a good all-to-all sends: each token once per rank, 4-bit out and 16-bit back."""


@dataclass(frozen=True)
class OperatorTime:
    """An operator and how long it takes.

    Attributes:
        compute_s: time of its arithmetic.
        memory_s: time of its memory traffic.
    """

    operator: Operator
    compute_s: float
    memory_s: float

    @property
    def seconds(self) -> float:
        """The larger of the two."""
        return max(self.compute_s, self.memory_s)

    @property
    def bound(self) -> Literal["compute", "memory"]:
        """Which of the two it is."""
        return "compute" if self.compute_s >= self.memory_s else "memory"


def operator_time(hardware: Hardware, operator: Operator) -> OperatorTime:
    """Time of one operator; ``other`` operators run at memory speed."""
    achieved = hardware.achieved
    shares: dict[Category, float] = {
        "attention": achieved.attention,
        "dense_gemm": achieved.dense_gemm,
        "grouped_gemm": achieved.grouped_gemm,
        "other": 1.0,
    }
    rate = hardware.peak_flops(operator.datatype) * shares[operator.category]
    memory = hardware.memory_gbs * 1e9 * achieved.memory
    return OperatorTime(operator, operator.flops / rate, operator.num_bytes / memory)


@dataclass(frozen=True)
class LayerTime:
    """One layer on one rank.

    Attributes:
        operators: what it computes under DWDP, in order.
        other_s: time of norms, routing and the like.
        prefetch_s: time of its fetch, 0 for a dense layer.
        dep_experts_s: the grouped GEMM under expert parallelism.
        exchange_s: dispatch and combine under expert parallelism.
    """

    operators: tuple[OperatorTime, ...]
    other_s: float
    prefetch_s: float
    dep_experts_s: float
    exchange_s: float

    def category_s(self, category: Category) -> float:
        """Time of all operators of a category."""
        if category == "other":
            return self.other_s
        return sum(op.seconds for op in self.operators if op.operator.category == category)

    @cached_property
    def compute_s(self) -> float:
        """T_compute."""
        return sum(op.seconds for op in self.operators) + self.other_s

    @property
    def dwdp_s(self) -> float:
        """T_DWDP."""
        return max(self.compute_s, self.prefetch_s)

    @property
    def dep_s(self) -> float:
        """T_DEP."""
        grouped = self.category_s("grouped_gemm")
        return self.compute_s - grouped + self.dep_experts_s + self.exchange_s


@dataclass(frozen=True)
class IterationTime:
    """A whole forward on one rank: every distinct layer and how often it occurs.

    Ratios are ratios of sums over all layers, dense ones included.
    """

    layers: tuple[tuple[LayerTime, int], ...]

    def _sum(self, quantity: Callable[[LayerTime], float]) -> float:
        return sum(count * quantity(layer) for layer, count in self.layers)

    @cached_property
    def compute_s(self) -> float:
        """Compute of all layers."""
        return self._sum(lambda layer: layer.compute_s)

    @cached_property
    def prefetch_s(self) -> float:
        """Fetches of all layers, one after the other."""
        return self._sum(lambda layer: layer.prefetch_s)

    @cached_property
    def dwdp_s(self) -> float:
        """DWDP, each fetch hidden behind one layer's compute."""
        return self._sum(lambda layer: layer.dwdp_s)

    @cached_property
    def dep_s(self) -> float:
        """Expert parallelism, perfectly balanced."""
        return self._sum(lambda layer: layer.dep_s)

    @cached_property
    def exchange_s(self) -> float:
        """All dispatches and combines."""
        return self._sum(lambda layer: layer.exchange_s)

    def category_s(self, category: Category) -> float:
        """Time of one category over all layers."""
        return self._sum(lambda layer: layer.category_s(category))

    @property
    def compute_to_prefetch(self) -> float:
        """T_compute / T_prefetch; infinite where nothing is fetched."""
        return self.compute_s / self.prefetch_s if self.prefetch_s else float("inf")

    @property
    def dep_to_dwdp(self) -> float:
        """T_DEP / T_DWDP: above 1 where DWDP is faster."""
        return self.dep_s / self.dwdp_s


def iteration_time(
    model: Model,
    hardware: Hardware,
    batch: Batch,
    group: Group,
    collective: Collective = ONE_COPY_PER_RANK,
) -> IterationTime:
    """Time of one forward of ``batch`` on each rank of ``group``."""
    return IterationTime(
        tuple(
            (layer_time(model, layer, hardware, batch, group, collective), count)
            for layer, count in model.layer_counts.items()
        )
    )


def layer_time(
    model: Model,
    layer: Layer,
    hardware: Hardware,
    batch: Batch,
    group: Group,
    collective: Collective = ONE_COPY_PER_RANK,
) -> LayerTime:
    """Time of one layer for ``batch`` on each rank of ``group``."""
    tokens, achieved = batch.num_tokens, hardware.achieved
    operators = tuple(
        operator_time(hardware, operator) for operator in layer_operators(model, layer, batch)
    )
    other_s = achieved.other_s_per_token_layer * tokens
    if layer.moe is None:
        return LayerTime(operators, other_s, 0.0, 0.0, 0.0)
    moe = layer.moe
    remote = group.remote_experts(moe.num_experts)
    prefetch_s = remote * model.expert_bytes(moe) / (hardware.link.gbs * 1e9 * achieved.link)
    # Tokens of all ranks meet a rank's own experts.
    activated = expected_activated_experts(moe.num_experts, moe.top_k, tokens * group.size)
    experts = grouped_gemm(model, moe, tokens * moe.top_k, activated / group.size)
    per_token = collective.bytes_per_token(model.hidden_size, moe.top_k, group.size)
    exchange_s = tokens * per_token / (hardware.link.gbs * 1e9 * achieved.collective)
    return LayerTime(
        operators, other_s, prefetch_s, operator_time(hardware, experts).seconds, exchange_s
    )


def smallest(values: Sequence[int], holds: Callable[[int], bool]) -> int | None:
    """The first of ``values`` (ascending) for which ``holds``, by bisection; None if for none.

    ``holds`` must not become false again once it is true.
    """
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        if holds(values[middle]):
            high = middle
        else:
            low = middle + 1
    return values[low] if low < len(values) else None


def hiding_length(
    model: Model, hardware: Hardware, group: Group, num_sequences: int = 1, longest: int = 1 << 20
) -> int | None:
    """The shortest prompt at which ``num_sequences`` of them hide the fetch (T_compute >= T_prefetch).

    None if longer than ``longest`` tokens.
    """
    return smallest(
        range(1, longest + 1),
        lambda length: (
            iteration_time(
                model, hardware, Batch.prefill([length] * num_sequences), group
            ).compute_to_prefetch
            >= 1
        ),
    )


def winning_length(
    model: Model,
    hardware: Hardware,
    group: Group,
    collective: Collective = ONE_COPY_PER_RANK,
    num_sequences: int = 1,
    longest: int = 1 << 20,
) -> int | None:
    """The shortest prompt at which DWDP beats balanced expert parallelism; None if never."""
    return smallest(
        range(1, longest + 1),
        lambda length: (
            iteration_time(
                model, hardware, Batch.prefill([length] * num_sequences), group, collective
            ).dep_to_dwdp
            >= 1
        ),
    )


def winning_batch(
    model: Model,
    hardware: Hardware,
    group: Group,
    length: int,
    collective: Collective = ONE_COPY_PER_RANK,
    largest: int = 1 << 12,
) -> int | None:
    """The smallest number of prompts of ``length`` tokens at which DWDP beats balanced DEP; None if never."""
    return smallest(
        range(1, largest + 1),
        lambda count: (
            iteration_time(
                model, hardware, Batch.prefill([length] * count), group, collective
            ).dep_to_dwdp
            >= 1
        ),
    )


def layer_fetch(model: Model, hardware: Hardware, group: Group) -> LayerFetch:
    """What :mod:`dwdp.perf.demand` needs, for the model's largest layer with experts."""
    moe, achieved = model.moe, hardware.achieved
    layer = next(layer for layer in model.layers if layer.moe == moe)
    one_token = dense_operators(model, layer, Batch.decode(1, 0))
    return LayerFetch(
        expert_bytes=model.expert_bytes(moe),
        num_experts=moe.num_experts,
        num_remote_experts=round(group.remote_experts(moe.num_experts)),
        top_k=moe.top_k,
        hidden_size=model.hidden_size,
        num_ranks=group.size,
        link_gbs=hardware.link.gbs * achieved.link,
        memory_gbs=hardware.memory_gbs * achieved.memory,
        compute_tflops=hardware.peak_flops(_routed_datatype(model)) / 1e12 * achieved.grouped_gemm,
        bits_per_weight=BITS_PER_WEIGHT[model.formats.routed],
        dense_weight_bytes=round(sum(operator.num_bytes for operator in one_token)),
    )


def _routed_datatype(model: Model) -> Datatype:
    return COMPUTE_DATATYPE[model.formats.routed]
