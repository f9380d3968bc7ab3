"""A plan as a job: the servers whose files ``dwdp/perf/job_files.py`` writes, and their options."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from dwdp.perf.gpu_placement import Servers
from dwdp.perf.job_files import Job
from dwdp.perf.planner import Plan, generation_of
from dwdp.perf.server_options import ServerSettings

KV_SHARE = 0.75
"""Of the memory that the weights leave free; the rest is for activations and workspaces."""
_GENERATION_SIZES = (32, 16, 8, 4, 2, 1)


def dwdp_options(plan: Plan) -> dict[str, Any]:
    """``dwdp_config`` of the plan, with TensorRT-LLM's keys.

    ``num_prefetch_experts`` is the smallest distance between neighbouring ranks that covers all experts:
    ``E <= (N - 1) P + L``.
    """
    assert plan.best is not None
    size, num_experts = plan.best.group.size, plan.model.moe.num_experts
    stored = plan.best.group.num_experts_per_worker or -(-num_experts // size)
    distance = -(-(num_experts - stored) // (size - 1)) if size > 1 else stored
    return {
        "dwdp_size": size,
        "num_groups": plan.num_prefill_gpus // size,
        "num_experts_per_worker": stored,
        "num_prefetch_experts": max(1, distance),
    }


def job_of_plan(plan: Plan) -> Job:
    """The plan's servers: replicas in prefill, ranks of DWDP groups if the plan has any, and generation.

    Raises:
        ValueError: the GPUs do not make a deployment with prefill and generation apart.
    """
    if plan.best is None or plan.dwdp_match is None:
        raise ValueError(
            "The plan has no deployment: generation is not that fast, or nothing fits."
        )
    workload = plan.workload
    generation, batch = _generation_servers(plan)
    options = None
    if plan.best.group.size > 1:
        options = dwdp_options(plan) | {
            "demand_max_tokens": plan.demand_up_to_tokens,
            "num_slots": plan.num_slots,
            "slice_bytes": plan.policy.slice_bytes,
        }
    settings = ServerSettings(max_seq_len=workload.isl + workload.osl)
    return Job(
        name=re.sub(r"[^\w.-]+", "-", f"dwdp-{plan.model.name}"),
        context=Servers(plan.num_prefill_gpus, 1),
        generation=generation,
        context_options=settings.context(
            max(1, workload.batch.num_sequences),
            workload.max_num_tokens,
            KV_SHARE,
            dwdp_config=options,
        ),
        generation_options=settings.generation(batch, KV_SHARE, generation.gpus_per_server),
    )


def _generation_servers(plan: Plan) -> tuple[Servers, int]:
    """Servers on the GPUs that prefill leaves, and sequences per GPU: the most at the users' speed.

    Expert parallelism wants a size that divides the experts.
    """
    workload = plan.workload
    num_gpus = workload.num_gpus - plan.num_prefill_gpus
    generation = generation_of(plan.model, plan.hardware, workload)
    best, batch = Servers(0, 1), 0
    for size in _GENERATION_SIZES:
        if size > num_gpus or plan.model.moe.num_experts % size:
            continue
        servers = Servers(num_gpus // size, size)
        sequences = replace(generation, num_gpus=size).sequences_at(workload.tps_per_user)
        if servers.num_gpus * sequences > best.num_gpus * batch:
            best, batch = servers, sequences
    if not batch:
        raise ValueError(
            f"{workload.num_gpus} GPUs are too few for {plan.num_prefill_gpus} in prefill and, beside "
            f"them, generation at {workload.tps_per_user:g} tokens/s per user."
        )
    return best, batch
