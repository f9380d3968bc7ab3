"""A plan put to a trace of requests: times to first token, speed per user, output per GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dwdp.perf.planner import Plan, generation_of
from dwdp.perf.roofline import Group
from dwdp.perf.serving import (
    Deployment,
    PrefillScenario,
    ServingResult,
    Strategy,
    prefill_curve,
    serve,
)
from dwdp.perf.workload import Request


@dataclass(frozen=True)
class TraceResult:
    """What a trace sees of one strategy in prefill.

    Attributes:
        strategy: ``dwdp`` or ``dep``.
        num_prefill_gpus, num_generation_gpus: of the deployment.
        result: see :class:`ServingResult`.
    """

    strategy: Strategy
    num_prefill_gpus: int
    num_generation_gpus: int
    result: ServingResult


def serve_trace(plan: Plan, requests: Sequence[Request]) -> list[TraceResult]:
    """Serve ``requests`` with the plan's GPUs, under DWDP and under expert parallelism in prefill.

    Expert parallelism gets as many prefill GPUs, rounded up to whole groups. Both share the
    generation GPUs that the plan leaves.

    Raises:
        ValueError: the plan has no deployment (its verdict says why).
    """
    if plan.best is None:
        raise ValueError(f"There is nothing to put to a trace: {plan.reasons[0]}")
    workload = plan.workload
    generation = replace(
        generation_of(plan.model, plan.hardware, workload),
        num_gpus=max(1, workload.num_gpus - plan.num_prefill_gpus),
    )
    scenario = PrefillScenario(
        workload.lengths, workload.max_num_tokens, workload.load_cv, 0.02, num_iterations=4
    )
    results = []
    sides: tuple[tuple[Strategy, Group], ...] = (
        ("dwdp", plan.best.group),
        ("dep", Group(plan.dep_group_size)),
    )
    for strategy, group in sides:
        num_prefill = -(-plan.num_prefill_gpus // group.size) * group.size
        seconds = prefill_curve(plan.model, plan.hardware, group, scenario, strategy, plan.policy)
        deployment = Deployment(
            strategy, num_prefill, group.size, seconds, workload.max_num_tokens, generation
        )
        result = serve(deployment, requests)
        results.append(TraceResult(strategy, num_prefill, generation.num_gpus, result))
    return results
