"""Hypothesis strategies shared by the tests of placements, layouts and fetch plans."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import strategies as st

from dwdp.layout import TensorLayout, build_layout
from dwdp.placement import Placement, build_placement


class Rule(NamedTuple):
    """Arguments that :func:`build_placement` accepts."""

    num_experts: int
    num_ranks: int
    num_experts_per_worker: int | None = None
    num_prefetch_experts: int | None = None

    def build(self) -> Placement:
        return build_placement(
            self.num_experts,
            self.num_ranks,
            num_experts_per_worker=self.num_experts_per_worker,
            num_prefetch_experts=self.num_prefetch_experts,
        )


@st.composite
def rules(draw: st.DrawFn, max_experts: int = 40, max_ranks: int = 10) -> Rule:
    """Every kind of placement: an even split, wrapping redundancy, and a given stride."""
    num_ranks = draw(st.integers(1, max_ranks))
    num_experts = draw(st.integers(num_ranks, max(num_ranks, max_experts)))
    kind = draw(st.sampled_from(["even", "wrapped", "strided"]))
    if kind == "even":
        return Rule(num_experts, num_ranks)
    if kind == "wrapped":
        return Rule(
            num_experts, num_ranks, draw(st.integers(-(-num_experts // num_ranks), num_experts))
        )
    peers = num_ranks - 1
    largest = (num_experts - 1) // peers if peers else num_experts
    stride = draw(st.integers(1, largest))
    num_stored = draw(st.integers(max(stride, num_experts - peers * stride), num_experts))
    return Rule(num_experts, num_ranks, num_stored, stride)


@st.composite
def layouts(draw: st.DrawFn) -> TensorLayout:
    """Experts smaller and larger than a page, aligned to it or not."""
    placement = draw(rules(max_experts=24, max_ranks=7)).build()
    return build_layout(placement, draw(st.integers(1, 40)), draw(st.integers(1, 64)))
