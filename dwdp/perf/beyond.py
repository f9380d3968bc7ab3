"""What this package does differently from the paper's design, each difference by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

from dwdp.perf.calibration import NOISE_CV
from dwdp.perf.demand import LayerFetch
from dwdp.perf.fetches import ALL_AT_ONCE, SERIAL_FIXED, FetchPolicy
from dwdp.perf.hardware import Hardware
from dwdp.perf.model import Model
from dwdp.perf.operators import Batch
from dwdp.perf.roofline import Group, layer_fetch, layer_time
from dwdp.perf.serving import PrefillScenario, prefill_rate
from dwdp.perf.workload import Lengths, rank_loads

ISLS = (1024, 8192, 32768)
LOAD_CVS = (0.0, 0.2)
MAX_NUM_TOKENS = 8192
NUM_STORED = 96
DECODE_TOKENS = (1, 4, 16, 64, 256)
DEMAND_SEQUENCES = (4, 16, 64)


@dataclass(frozen=True)
class Idea:
    """One difference from the paper's design.

    Attributes:
        name: for people.
        policy: how it fetches.
        num_experts_per_worker: experts stored per rank; None: an even share.
        needs: what it takes.
    """

    name: str
    policy: FetchPolicy
    num_experts_per_worker: int | None = None
    needs: str = ""


@dataclass(frozen=True)
class Gain:
    """Tokens/s per GPU of an idea over the paper's design, in one situation."""

    idea: str
    isl: int
    load_cv: float
    gain: float


def ideas(hardware: Hardware) -> tuple[Idea, ...]:
    """Every idea; the last ones build on one lane per source, as they do in this package."""
    link_gbs = hardware.link.gbs * hardware.achieved.link
    host_share = hardware.host_gbs / (hardware.host_gbs + link_gbs)
    at_once = replace(ALL_AT_ONCE, wrap_around=False)
    return (
        Idea("one lane per source", at_once),
        Idea("wrap-around prefetch", replace(SERIAL_FIXED, wrap_around=True)),
        Idea("both", ALL_AT_ONCE),
        Idea(
            f"both, {NUM_STORED} experts per rank, balanced sources",
            ALL_AT_ONCE,
            NUM_STORED,
            "half as much memory again for experts",
        ),
        Idea(
            f"both, {host_share:.0%} of the fetch from host memory",
            replace(ALL_AT_ONCE, host_share=host_share),
            None,
            "a copy of the experts in the host's memory",
        ),
    )


def prefill_gains(model: Model, hardware: Hardware, ranks: int = 4) -> Iterator[Gain]:
    """Every idea in every situation, forwards of up to 8192 tokens (or one longer prompt)."""
    for isl in ISLS:
        for load_cv in LOAD_CVS:
            scenario = PrefillScenario(
                Lengths(isl), max(isl, MAX_NUM_TOKENS), load_cv, NOISE_CV, num_iterations=5
            )

            def rate(
                policy: FetchPolicy, stored: int | None, scenario: PrefillScenario = scenario
            ) -> float:
                group = Group(ranks, stored)
                return prefill_rate(model, hardware, group, scenario, "dwdp", policy).tokens_per_s

            baseline = rate(SERIAL_FIXED, None)
            for idea in ideas(hardware):
                yield Gain(
                    idea.name,
                    isl,
                    load_cv,
                    rate(idea.policy, idea.num_experts_per_worker) / baseline,
                )


@dataclass(frozen=True)
class DecodeLayer:
    """One layer of a generation step.

    Attributes:
        num_tokens: of the step on one rank.
        window_s: its compute.
        staged_s, demand_s: its time with all remote experts fetched ahead, and with the activated ones
            fetched after routing.
    """

    num_tokens: int
    window_s: float
    staged_s: float
    demand_s: float

    @property
    def gain(self) -> float:
        """How many times faster demand is."""
        return self.staged_s / self.demand_s


def decode_layers(model: Model, hardware: Hardware, ranks: int = 4) -> list[DecodeLayer]:
    """Staged against demand in generation, by tokens per step."""
    layer: LayerFetch = layer_fetch(model, hardware, Group(ranks))
    return [
        DecodeLayer(
            tokens,
            layer.window_s(tokens),
            layer.window_s(tokens) + layer.staged_exposed_s(tokens),
            layer.window_s(tokens) + layer.demand_exposed_s(tokens),
        )
        for tokens in DECODE_TOKENS
    ]


@dataclass(frozen=True)
class DemandGain:
    """Generation steps/s with demand fetches over those with staged ones, in one situation.

    Attributes:
        num_sequences: per rank, on average.
        context_tokens: of every sequence.
        load_cv: variation of the number of sequences between ranks and steps.
        gain: how many times as many steps.
    """

    num_sequences: int
    context_tokens: int
    load_cv: float
    gain: float


def demand_gains(model: Model, hardware: Hardware, ranks: int = 4) -> Iterator[DemandGain]:
    """Demand over staged in generation, in closed form.

    No rank waits for another one. A layer takes the longer of compute and fetch where all remote experts
    are fetched ahead, and one after the other where the activated ones are fetched after routing.
    """
    group = Group(ranks)
    fetch = layer_fetch(model, hardware, group)
    layer = next(layer for layer in model.layers if layer.moe == model.moe)
    for count in DEMAND_SEQUENCES:
        for isl in ISLS:
            for load_cv in LOAD_CVS:
                loads = chain.from_iterable(rank_loads(load_cv, ranks, num_iterations=50))
                staged_s, demand_s = 0.0, 0.0
                for size, times in Counter(max(1, round(count * load)) for load in loads).items():
                    batch = Batch.decode(size, isl)
                    compute_s = layer_time(model, layer, hardware, batch, group).compute_s
                    staged_s += times * max(compute_s, fetch.prefetch_s)
                    demand_s += times * (compute_s + fetch.demand_exposed_s(size))
                yield DemandGain(count, isl, load_cv, staged_s / demand_s)
