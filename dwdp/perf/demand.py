"""When to fetch after routing (demand) rather than ahead of it (staged), from what a rank knows at attach.

Symbols: E experts per layer, k of them per token, R of the E remote, t tokens in a step, b bytes per expert.

**Activated experts.** With uniform routing a token's k experts are distinct and each expert is among
them with probability k/E. Tokens choose independently, so an expert stays idle with probability
``(1 - k/E)^t`` and the expected number of activated experts is ``E (1 - (1 - k/E)^t)``, of which the
share R/E is remote. This is the committee problem of occupancy theory (Johnson and Kotz, *Urn Models*,
1977, section 3.6); linearity of the expectation makes it exact. Uniform routing is an assumption: skewed
routing activates fewer experts, so the estimate of what demand moves is an upper bound.

**Exposed time.** A demand fetch starts when the router is done and stands in front of the grouped GEMM:
all of it is exposed. A staged fetch moves all R experts while the layer before computes: only
what is longer than that compute window is exposed. Per layer::

    demand(t) = setup + R (1 - (1 - k/E)^t) b / demand_bandwidth
    staged(t) = max(0, R b / link_bandwidth - window(t))

demand(t) never falls with t and staged(t) never rises, so they cross at most once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_TOKENS = 1 << 20
"""Where :func:`crossover_tokens` stops looking: no step has more tokens."""


def expected_activated_experts(num_experts: int, top_k: int, num_tokens: int) -> float:
    """Expected number of distinct experts that ``num_tokens`` tokens activate, under uniform routing.

    Raises:
        ValueError: ``num_experts`` < 1, ``top_k`` outside [1, num_experts] or ``num_tokens`` < 0.
    """
    if num_experts < 1:
        raise ValueError(f"num_experts is {num_experts}: use at least 1.")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}: use 1 to num_experts ({num_experts}).")
    if num_tokens < 0:
        raise ValueError(f"num_tokens is {num_tokens}: use at least 0.")
    if top_k == num_experts:
        return float(num_experts) if num_tokens else 0.0
    # expm1 and log1p keep the difference exact where k/E is tiny.
    return -num_experts * math.expm1(num_tokens * math.log1p(-top_k / num_experts))


@dataclass(frozen=True)
class LayerFetch:
    """One MoE layer as a rank knows it at attach, and the speeds that decide how to fetch it.

    Speeds default to an H100 SXM's datasheet figures; a caller that knows its device passes its own.
    The crossover depends on their ratios more than on their sizes: a uniform error moves both sides.

    Attributes:
        expert_bytes: all tensors of one expert of this layer.
        num_experts: experts of the layer.
        num_remote_experts: of those, how many this rank does not store.
        top_k: experts per token.
        hidden_size: model width; gives the size of the layer's dense part.
        num_ranks: ranks of the group; nothing is remote in a group of one.
        link_gbs: what a staged fetch reaches, GB/s.
        demand_gbs: what a demand fetch reaches, GB/s. None: the same.
        memory_gbs: what a kernel that reads weights reaches, GB/s.
        compute_tflops: what the layer's matrix products reach, TFLOP/s.
        bits_per_weight: of expert weights, scales included; turns bytes into weights.
        dense_weight_bytes: what the layer reads beside its experts (attention, shared experts). None:
            ``8 * hidden_size**2``, four square 16-bit matrices for attention.
        setup_s: from the router's last write to a demand fetch's first byte, and the hand-over to
            the grouped GEMM.
    """

    expert_bytes: int
    num_experts: int
    num_remote_experts: int
    top_k: int
    hidden_size: int
    num_ranks: int
    link_gbs: float = 450.0
    demand_gbs: float | None = None
    memory_gbs: float = 3350.0
    compute_tflops: float = 990.0
    bits_per_weight: float = 16.0
    dense_weight_bytes: float | None = None
    setup_s: float = 10e-6

    def __post_init__(self) -> None:
        expected_activated_experts(self.num_experts, self.top_k, 0)
        if not 0 <= self.num_remote_experts <= self.num_experts:
            raise ValueError(
                f"num_remote_experts is {self.num_remote_experts}: "
                f"use 0 to num_experts ({self.num_experts})."
            )
        for name in ("expert_bytes", "hidden_size", "num_ranks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: use at least 1.")
        for name in ("link_gbs", "demand_gbs", "memory_gbs", "compute_tflops", "bits_per_weight"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}: use more than 0.")
        if self.setup_s < 0:
            raise ValueError(f"setup_s is {self.setup_s}: use at least 0.")

    @property
    def staged_bytes(self) -> int:
        """Bytes that a staged fetch of the layer moves."""
        return self.num_remote_experts * self.expert_bytes if self.num_ranks > 1 else 0

    @property
    def prefetch_s(self) -> float:
        """Time of a staged fetch, T_prefetch."""
        return self.staged_bytes / (self.link_gbs * 1e9)

    def demand_bytes(self, num_tokens: int) -> float:
        """Expected bytes of a demand fetch for a step of ``num_tokens``."""
        activated = expected_activated_experts(self.num_experts, self.top_k, num_tokens)
        return self.staged_bytes * activated / self.num_experts

    def window_s(self, num_tokens: int) -> float:
        """Compute time of one layer, T_compute: the larger of its weight reads and its arithmetic.

        Attention's core, which depends on context lengths that nobody knows at attach, is left out.
        """
        dense_bytes = self.dense_weight_bytes
        if dense_bytes is None:
            dense_bytes = 8 * self.hidden_size**2
        activated = expected_activated_experts(self.num_experts, self.top_k, num_tokens)
        read_bytes = (dense_bytes if num_tokens else 0) + activated * self.expert_bytes
        weights_per_token = (
            self.top_k * self.expert_bytes * 8 / self.bits_per_weight + dense_bytes / 2
        )
        flops = 2.0 * num_tokens * weights_per_token
        return max(read_bytes / (self.memory_gbs * 1e9), flops / (self.compute_tflops * 1e12))

    def demand_exposed_s(self, num_tokens: int) -> float:
        """Time that compute stands still for a demand fetch; all of it is exposed."""
        if not self.staged_bytes or not num_tokens:
            return 0.0
        demand_gbs = self.link_gbs if self.demand_gbs is None else self.demand_gbs
        return self.setup_s + self.demand_bytes(num_tokens) / (demand_gbs * 1e9)

    def staged_exposed_s(self, num_tokens: int) -> float:
        """Time that compute stands still for a staged fetch: what the window does not hide."""
        return max(0.0, self.prefetch_s - self.window_s(num_tokens))


def crossover_tokens(layer: LayerFetch, max_tokens: int = MAX_TOKENS) -> int:
    """The largest number of tokens per step at which demand is expected to expose no more than staged.

    Steps of up to that many tokens are for demand, larger ones for staged. 0: staged always wins, or
    nothing is remote. ``max_tokens``: demand wins everywhere.

    >>> crossover_tokens(LayerFetch(24_772_608, 256, 192, 8, 7168, 4, link_gbs=900, memory_gbs=8000,
    ...                             compute_tflops=10000, bits_per_weight=4.5))
    61
    """
    if not layer.staged_bytes:
        return 0
    low, high = 0, max_tokens  # demand wins at `low`, or low is 0
    while low < high:
        middle = (low + high + 1) // 2
        if layer.demand_exposed_s(middle) <= layer.staged_exposed_s(middle):
            low = middle
        else:
            high = middle - 1
    return low
