"""Whether DWDP pays on given hardware for a given model and load, by how much, and how to set it up.

Every group size and number of stored experts that fits is estimated (``dwdp/perf/candidates.py``); the best
and expert parallelism beside it are then simulated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from dwdp.perf.candidates import (
    GROUP_SIZES,
    Candidate,
    Workload,
    find_candidates,
    largest_group,
    memory_of,
    num_slots_of,
)
from dwdp.perf.demand import MAX_TOKENS, crossover_tokens
from dwdp.perf.fetches import ALL_AT_ONCE, FetchPolicy
from dwdp.perf.hardware import Hardware
from dwdp.perf.model import Model
from dwdp.perf.operators import Batch, Sequences
from dwdp.perf.roofline import Group, iteration_time, layer_fetch, smallest
from dwdp.perf.serving import (
    Generation,
    PrefillRate,
    PrefillScenario,
    RateMatch,
    prefill_rate,
    rate_match,
)

WORTH_IT = 0.02
"""Smallest gain that is called one: the model is not better than that."""
SETUP_SHARE = 0.02
"""Share of a fetch that the set-up of its slices may take."""

Verdict = Literal["yes", "no difference", "no", "not needed", "does not fit"]


@dataclass(frozen=True)
class Plan:
    """The answer.

    Attributes:
        verdict: in a word.
        reasons: why, as sentences.
        best: the chosen candidate; None if nothing fits.
        candidates: all that fit, fastest first.
        dwdp, dep: prefill, simulated.
        dep_group_size: ranks of the expert-parallel group compared with.
        dwdp_match, dep_match: end to end at the users' speed; None if generation cannot be that fast.
        demand_up_to_tokens: steps of up to so many tokens are for demand fetches.
        policy: how to fetch.
        num_slots: staging slots.
        prefill_tokens_to_hide: tokens per forward from which fetches are hidden; None if never.
    """

    model: Model
    hardware: Hardware
    workload: Workload
    verdict: Verdict
    reasons: tuple[str, ...]
    best: Candidate | None
    candidates: tuple[Candidate, ...] = ()
    dwdp: PrefillRate | None = None
    dep: PrefillRate | None = None
    dep_group_size: int = 0
    dwdp_match: RateMatch | None = None
    dep_match: RateMatch | None = None
    demand_up_to_tokens: int = 0
    policy: FetchPolicy = ALL_AT_ONCE
    num_slots: int = 2
    prefill_tokens_to_hide: int | None = None

    @cached_property
    def prefill_gain(self) -> float | None:
        """Prefill tokens/s per GPU over expert parallelism."""
        if self.dwdp is None or self.dep is None:
            return None
        return self.dwdp.tokens_per_s / self.dep.tokens_per_s

    @cached_property
    def gain(self) -> float | None:
        """Output tokens/s per GPU, prefill and generation together, over expert parallelism in prefill."""
        if self.dwdp_match is None or self.dep_match is None:
            return None
        return self.dwdp_match.tps_per_gpu / self.dep_match.tps_per_gpu

    @property
    def num_prefill_gpus(self) -> int:
        """Of ``workload.num_gpus``, how many prefill: at least one group, as near to the match as can be.

        All whole groups where there is no match, none where nothing fits.
        """
        if self.best is None:
            return 0
        size = self.best.group.size
        if self.dwdp_match is None:
            return self.workload.num_gpus // size * size
        share = self.dwdp_match.prefill_share * self.workload.num_gpus
        return min(max(size, round(share / size) * size), max(size, self.workload.num_gpus - 1))


def plan(model: Model, hardware: Hardware, workload: Workload) -> Plan:
    """Answer for ``model`` on ``hardware`` under ``workload``."""
    num_slots = num_slots_of(model)
    candidates = sorted(
        find_candidates(model, hardware, workload, num_slots), key=lambda c: -c.tokens_per_s
    )
    usable = [candidate for candidate in candidates if not candidate.from_host]
    if not usable:
        need = memory_of(
            model, hardware, workload, Group(largest_group(model, hardware, workload)), num_slots
        )
        return Plan(
            model,
            hardware,
            workload,
            "does not fit",
            (
                f"A rank of the largest group needs {need.used / 1e9:.0f} GB and has "
                f"{need.capacity / 1e9:.0f} GB. Use more GPUs of one link domain, fewer tokens per "
                "forward, or a checkpoint with fewer bits per weight.",
            ),
            None,
        )
    # Of what is equally fast, the smallest group and then the fewest copies: easier to place and to lose.
    fastest = usable[0].tokens_per_s
    best = min(
        (c for c in usable if c.tokens_per_s >= 0.99 * fastest),
        key=lambda c: (c.group.size, c.memory.used),
    )
    policy = replace(ALL_AT_ONCE, slice_bytes=_slice_bytes(hardware, best.group.size))
    scenario = PrefillScenario(
        workload.lengths, workload.max_num_tokens, workload.load_cv, 0.02, num_iterations=12
    )
    dep_size = _dep_group_size(model, hardware, workload)
    dwdp = prefill_rate(model, hardware, best.group, scenario, "dwdp", policy, num_slots=num_slots)
    dep = prefill_rate(model, hardware, Group(dep_size), scenario, "dep")
    generation = generation_of(model, hardware, workload)
    matches = [
        rate_match(
            rate.tokens_per_s,
            generation,
            workload.lengths.mean,
            workload.osl,
            workload.tps_per_user,
        )
        for rate in (dwdp, dep)
    ]
    answer = Plan(
        model,
        hardware,
        workload,
        "no difference",
        (),
        best,
        tuple(candidates),
        dwdp,
        dep,
        dep_size,
        matches[0],
        matches[1],
        crossover_tokens(layer_fetch(model, hardware, best.group)) if best.group.size > 1 else 0,
        policy,
        num_slots,
        _tokens_to_hide(model, hardware, workload, best.group),
    )
    return replace(answer, verdict=_verdict(answer), reasons=tuple(_reasons(answer)))


def _slice_bytes(hardware: Hardware, group_size: int) -> int:
    """The smallest power of two, 1 to 64 MiB, at which set-ups take at most a fiftieth of a fetch.

    With N - 1 lanes in step, a round moves N - 1 slices and waits for one set-up.
    """
    rate = hardware.link.gbs * 1e9 * hardware.achieved.link
    lanes = max(1, group_size - 1)
    needed = hardware.link.copy_setup_s * rate / (SETUP_SHARE * lanes)
    return 1 << min(26, max(20, math.ceil(math.log2(max(1.0, needed)))))


def _dep_group_size(model: Model, hardware: Hardware, workload: Workload) -> int:
    """The smallest expert-parallel group that fits: the larger, the longer ranks wait for each other.

    Expert parallelism needs a size that divides the number of experts.
    """
    largest = largest_group(model, hardware, workload)
    for size in (size for size in GROUP_SIZES if 1 < size <= largest):
        if model.moe.num_experts % size:
            continue
        if replace(memory_of(model, hardware, workload, Group(size), 2), slots=0.0).fits:
            return size
    return largest


def generation_of(model: Model, hardware: Hardware, workload: Workload) -> Generation:
    """Generation GPUs: expert parallelism over as many as a domain has, up to 32."""
    limit = min(32, hardware.link.domain_size, workload.num_gpus)
    size = max(size for size in GROUP_SIZES if size <= limit)
    context = round(workload.lengths.mean) + workload.osl // 2
    return Generation(
        model,
        hardware,
        size,
        context,
        efficiency=hardware.achieved.generation,
    )


def _tokens_to_hide(
    model: Model, hardware: Hardware, workload: Workload, group: Group
) -> int | None:
    """Tokens per forward, in prompts of the mean length, from which T_compute >= T_prefetch."""
    if group.size == 1:
        return 0
    mean = max(1, round(workload.lengths.mean))

    def hides(count: int) -> bool:
        batch = Batch((Sequences(mean, times=count),))
        return iteration_time(model, hardware, batch, group).compute_to_prefetch >= 1

    count = smallest(range(1, max(1, MAX_TOKENS // mean) + 1), hides)
    return None if count is None else count * mean


def _verdict(answer: Plan) -> Verdict:
    assert answer.best is not None
    if answer.best.group.size == 1:
        return "not needed"
    gain = answer.gain if answer.gain is not None else answer.prefill_gain
    assert gain is not None
    if gain >= 1 + WORTH_IT:
        return "yes"
    return "no" if gain <= 1 - WORTH_IT else "no difference"


def _leaves_generation(answer: Plan) -> bool:
    """Whether the GPUs beside prefill have room for a sequence, and are fast enough for its user."""
    num_gpus = answer.workload.num_gpus - answer.num_prefill_gpus
    if not num_gpus:
        return False
    generation = generation_of(answer.model, answer.hardware, answer.workload)
    return replace(generation, num_gpus=num_gpus).sequences_at(answer.workload.tps_per_user) > 0


def _reasons(answer: Plan) -> Iterator[str]:
    best, dep, dwdp = answer.best, answer.dep, answer.dwdp
    assert best is not None and dep is not None and dwdp is not None
    if best.group.size == 1:
        yield (
            f"The whole model fits on one device ({best.memory.used / 1e9:.0f} of "
            f"{best.memory.capacity / 1e9:.0f} GB) and nothing faster was found: replicas need no fetch."
        )
        return
    if dwdp.wait_s > 0.02 * dwdp.iteration_s:
        yield (
            f"The fetch is not hidden: T_compute / T_prefetch is {best.window_ratio:.2f}, and a forward "
            f"waits {1e3 * dwdp.wait_s:.0f} of {1e3 * dwdp.iteration_s:.0f} ms."
        )
    else:
        yield f"The fetch is hidden: T_compute / T_prefetch is {best.window_ratio:.2f}."
    yield (
        f"Expert parallelism over {answer.dep_group_size} ranks waits {dep.wait_s / dep.iteration_s:.0%} "
        f"of a forward for other ranks (load CV {answer.workload.load_cv:.0%}), and exchanges tokens."
    )
    slowdown = answer.hardware.achieved.copy_slowdown
    if slowdown > 1:
        yield f"Compute is {slowdown:.2f} times slower beside copies, which the figures include."
    if answer.prefill_tokens_to_hide is None:
        yield "No number of prompts per forward that a rank could hold hides the fetch."
    elif answer.prefill_tokens_to_hide > answer.workload.max_num_tokens:
        yield f"Forwards of {answer.prefill_tokens_to_hide} tokens or more would hide the fetch."
    if answer.dwdp_match is None:
        yield (
            f"Generation cannot give {answer.workload.tps_per_user:g} tokens/s to a user here; the verdict "
            "is on prefill alone."
        )
    elif not _leaves_generation(answer):
        yield (
            f"{answer.workload.num_gpus} GPUs are too few: {answer.num_prefill_gpus} of them prefill, and "
            "the rest cannot generate. The gain in output TPS/GPU is that of a larger deployment."
        )
    else:
        yield (
            f"Prefill takes {answer.dwdp_match.prefill_share:.0%} of the GPU time at "
            f"{answer.workload.tps_per_user:g} TPS/user, so prefill's gain counts for that much."
        )
    if not answer.hardware.achieved.source:
        yield (
            f"Nobody has measured what {answer.hardware.name} achieves: these are datasheet peaks, "
            "without interference."
        )
