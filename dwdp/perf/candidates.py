"""Ways to set a prefill group up: what each needs in memory, and how fast it is, in closed form.

The estimate of a layer with fetch F and compute C, where compute runs s times slower beside copies::

    T = F                       if F >= s C   (compute is hidden behind the fetch)
    T = C + F (1 - 1 / s)       otherwise     (the fetch is hidden, and costs its interference)

F is the larger of what a rank reads and what the busiest rank serves, at the link's achieved rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dwdp.config import MAX_RANKS
from dwdp.perf.hardware import Hardware
from dwdp.perf.model import Model
from dwdp.perf.operators import Batch, Sequences
from dwdp.perf.roofline import Group, IterationTime, iteration_time
from dwdp.perf.workload import Lengths

GROUP_SIZES = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 36, 48, 72)
RESERVE = 0.10
"""Share of the memory left free for the allocator, the CUDA context and workspaces."""
ACTIVATION_COPIES = 24
"""16-bit hidden-size vectors per token that are alive at once, about (assumed)."""


@dataclass(frozen=True)
class Workload:
    """What is to be served.

    Attributes:
        isl, osl: nominal input and output length.
        length_ratio: inputs are uniform in [ratio * isl, isl].
        load_cv: variation of the load between ranks.
        max_num_tokens: per prefill forward.
        num_gpus: in all.
        tps_per_user: tokens per second that each user shall get.
    """

    isl: int
    osl: int
    length_ratio: float = 0.8
    load_cv: float = 0.2
    max_num_tokens: int = 32768
    num_gpus: int = 72
    tps_per_user: float = 50.0

    def __post_init__(self) -> None:
        Lengths(self.isl, self.length_ratio)
        for name in ("osl", "max_num_tokens", "num_gpus"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: use at least 1.")
        if not 0 <= self.load_cv <= 1:
            raise ValueError(f"load_cv is {self.load_cv}: use 0 to 1.")
        if not 0 < self.tps_per_user < math.inf:
            raise ValueError(f"tps_per_user is {self.tps_per_user}: use a number above 0.")
        if self.max_num_tokens < self.isl:
            raise ValueError(
                f"max_num_tokens is {self.max_num_tokens}: use at least the input length ({self.isl})."
            )

    @property
    def lengths(self) -> Lengths:
        """Distribution of the inputs."""
        return Lengths(self.isl, self.length_ratio)

    @property
    def batch(self) -> Batch:
        """A full prefill forward."""
        mean = max(1, round(self.lengths.mean))
        return Batch((Sequences(mean, times=max(1, self.max_num_tokens // mean)),))


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. ``kv_cache`` is what prefill needs at least: two forwards' worth."""

    dense: float
    experts: float
    slots: float
    kv_cache: float
    activations: float
    reserve: float
    capacity: float

    @property
    def used(self) -> float:
        """Everything but what is free."""
        return (
            self.dense + self.experts + self.slots + self.kv_cache + self.activations + self.reserve
        )

    @property
    def fits(self) -> bool:
        """Whether it is not more than there is."""
        return self.used <= self.capacity

    def parts(self) -> dict[str, float]:
        """Name -> bytes, free memory last."""
        return {
            "dense weights": self.dense,
            "resident experts": self.experts,
            "slots": self.slots,
            "KV cache": self.kv_cache,
            "activations": self.activations,
            "reserve": self.reserve,
            "free": max(0.0, self.capacity - self.used),
        }


@dataclass(frozen=True)
class Candidate:
    """One way to set a prefill group up.

    Attributes:
        group: size and stored experts.
        from_host: whether part of each fetch comes from host memory (not implemented: for comparison).
        memory: of one rank.
        iteration_s: of a full forward, estimated.
        tokens_per_s: per GPU, estimated.
        compute_s, prefetch_s: of a full forward.
        exposed_s: estimated exposed wait per forward.
    """

    group: Group
    from_host: bool
    memory: Memory
    iteration_s: float
    tokens_per_s: float
    compute_s: float
    prefetch_s: float
    exposed_s: float

    @property
    def window_ratio(self) -> float:
        """T_compute / T_prefetch."""
        return self.compute_s / self.prefetch_s if self.prefetch_s else math.inf


def num_slots_of(model: Model) -> int:
    """Two, or three where an odd number of layers would make the last and the first share one."""
    return 2 + len(model.moe_layers) % 2 if len(model.moe_layers) > 1 else 2


def largest_group(model: Model, hardware: Hardware, workload: Workload) -> int:
    limit = min(hardware.link.domain_size, workload.num_gpus, model.moe.num_experts, MAX_RANKS)
    return max(size for size in GROUP_SIZES if size <= limit)


def find_candidates(
    model: Model, hardware: Hardware, workload: Workload, num_slots: int
) -> Iterator[Candidate]:
    """Everything that fits."""
    num_experts = model.moe.num_experts
    limit = largest_group(model, hardware, workload)
    time = iteration_time(model, hardware, workload.batch, Group(1))
    for size in (size for size in GROUP_SIZES if size <= limit):
        share = -(-num_experts // size)
        stored_options = {share, min(num_experts, round(1.5 * share)), min(num_experts, 2 * share)}
        most = _most_stored(model, hardware, workload, size, num_slots)
        for stored in sorted(stored_options | {most} if most >= share else stored_options):
            group = Group(size, None if stored == share else stored)
            memory = memory_of(model, hardware, workload, group, num_slots)
            if memory.fits:
                yield _estimate(model, hardware, workload, group, memory, time, from_host=False)
                if size > 1 and _host_holds_experts(model, hardware):
                    yield _estimate(model, hardware, workload, group, memory, time, from_host=True)


def _host_holds_experts(model: Model, hardware: Hardware) -> bool:
    # Two devices share a host where memory is given per device; both read the same copy.
    fast = hardware.host_gbs >= 0.25 * hardware.link.gbs
    return fast and 2 * hardware.host_memory_gb * 1e9 >= model.all_expert_bytes


def memory_of(
    model: Model, hardware: Hardware, workload: Workload, group: Group, num_slots: int
) -> Memory:
    """Memory of the fullest rank."""
    stored, remote = 0.0, 0.0
    for layer in model.moe_layers:
        assert layer.moe is not None
        count = group.num_experts_per_worker or -(-layer.moe.num_experts // group.size)
        expert_bytes = model.expert_bytes(layer.moe)
        stored += min(count, layer.moe.num_experts) * expert_bytes
        remote = max(remote, (layer.moe.num_experts - count) * expert_bytes)
    return Memory(
        dense=model.dense_bytes,
        experts=stored,
        slots=num_slots * max(0.0, remote),
        kv_cache=2 * workload.max_num_tokens * model.kv_bytes_per_token(),
        activations=workload.max_num_tokens * model.hidden_size * 2.0 * ACTIVATION_COPIES,
        reserve=RESERVE * hardware.memory_bytes,
        capacity=hardware.memory_bytes,
    )


def _most_stored(
    model: Model, hardware: Hardware, workload: Workload, size: int, num_slots: int
) -> int:
    """The most experts per layer that a rank has memory for; 0 if not even none."""
    low, high = 0, model.moe.num_experts
    while low < high:
        middle = (low + high + 1) // 2
        if memory_of(model, hardware, workload, Group(size, middle), num_slots).fits:
            low = middle
        else:
            high = middle - 1
    return low


def _estimate(
    model: Model,
    hardware: Hardware,
    workload: Workload,
    group: Group,
    memory: Memory,
    alone: IterationTime,
    from_host: bool,
) -> Candidate:
    fetch_s = _fetch_s(model, hardware, group, from_host)
    slowdown = hardware.achieved.copy_slowdown
    total_s, exposed_s, prefetch_s = 0.0, 0.0, 0.0
    for layer, count in alone.layers:
        has_experts = layer.category_s("grouped_gemm") > 0
        fetch = fetch_s if has_experts else 0.0
        compute = layer.compute_s
        beside = min(fetch, slowdown * compute)
        layer_s = max(fetch, compute + beside * (1 - 1 / slowdown))
        total_s += count * layer_s
        exposed_s += count * max(0.0, fetch - slowdown * compute)
        prefetch_s += count * fetch
    return Candidate(
        group,
        from_host,
        memory,
        total_s,
        workload.batch.num_tokens / total_s,
        alone.compute_s,
        prefetch_s,
        exposed_s,
    )


def _fetch_s(model: Model, hardware: Hardware, group: Group, from_host: bool) -> float:
    """Time of one layer's fetch on the rank for which it takes longest."""
    if group.size == 1:
        return 0.0
    moe, stored = model.moe, group.num_experts_per_worker
    if stored is None:
        share, rest = divmod(moe.num_experts, group.size)
        # Some ranks store (and serve to all others) one expert more where the count does not divide.
        experts = max(moe.num_experts - share, (share + bool(rest)) * (group.size - 1))
    else:
        experts = moe.num_experts - stored  # sources are balanced: all serve what they read
    num_bytes = experts * model.expert_bytes(moe)
    rate = hardware.link.gbs * 1e9 * hardware.achieved.link
    if from_host:
        rate += hardware.host_gbs * 1e9
    return num_bytes / rate
