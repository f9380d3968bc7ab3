"""A plan as text and as data: memory as a bar, a layer as lanes, the Pareto front as a table."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from dwdp.perf.launch_files import dwdp_options
from dwdp.perf.planner import Plan, generation_of
from dwdp.perf.roofline import layer_time
from dwdp.perf.serving import PrefillRate, rate_match

SPEEDS = (10, 20, 30, 40, 50, 60, 80, 100, 120, 150, 180, 220)
_FILLS = "█▓▒░▞·"


class ParetoPoint(NamedTuple):
    """What a strategy reaches at a speed per user; None where generation is not that fast."""

    tps_per_user: float
    dwdp_tps_per_gpu: float | None
    dep_tps_per_gpu: float | None


def pareto_front(plan: Plan) -> list[ParetoPoint]:
    """Output TPS/GPU over TPS/user, matched prefill and generation."""
    assert plan.dwdp is not None and plan.dep is not None
    generation = generation_of(plan.model, plan.hardware, plan.workload)

    def tps_per_gpu(prefill: PrefillRate, tps: float) -> float | None:
        match = rate_match(
            prefill.tokens_per_s, generation, plan.workload.lengths.mean, plan.workload.osl, tps
        )
        return None if match is None else match.tps_per_gpu

    points = [
        ParetoPoint(tps, tps_per_gpu(plan.dwdp, tps), tps_per_gpu(plan.dep, tps)) for tps in SPEEDS
    ]
    return [point for point in points if point.dwdp_tps_per_gpu is not None]


def memory_bar(parts: dict[str, float], width: int = 60) -> tuple[str, list[str]]:
    """A stacked bar of ``width`` characters, and one legend entry per part."""
    total = sum(parts.values())
    bar, legend, position = "", [], 0.0
    for index, (name, num_bytes) in enumerate(parts.items()):
        fill = " " if name == "free" else _FILLS[index % len(_FILLS)]
        position += num_bytes
        bar += fill * (round(width * position / total) - len(bar))
        legend.append(f"{fill} {name} {num_bytes / 1e9:.1f} GB")
    return f"[{bar}]", legend


def layer_lanes(plan: Plan, width: int = 60) -> list[str]:
    """One layer as lanes: what computes when, and the fetch for the next one beside it."""
    assert plan.best is not None
    layer = next(layer for layer in plan.model.layers if layer.moe)
    time = layer_time(plan.model, layer, plan.hardware, plan.workload.batch, plan.best.group)
    slowdown = plan.hardware.achieved.copy_slowdown
    parts = [
        ("attention", time.category_s("attention")),
        ("dense", time.category_s("dense_gemm")),
        ("other", time.other_s),
        ("experts", time.category_s("grouped_gemm")),
    ]
    beside = min(time.prefetch_s, slowdown * time.compute_s)
    compute_s = time.compute_s + beside * (1 - 1 / slowdown)
    end_s = max(compute_s, time.prefetch_s)
    stretched = compute_s / time.compute_s
    lane, position = "", 0.0
    for name, seconds in parts:
        position += seconds * stretched
        cells = round(width * position / end_s) - len(lane)
        lane += f"{name[: max(0, cells - 1)]:-<{cells - 1}}|" if cells > 0 else ""
    waiting = "wait" if time.prefetch_s > compute_s else ""
    fetch = round(width * time.prefetch_s / end_s)
    return [
        f"compute |{lane}{waiting:<{max(0, width - len(lane))}} {1e3 * compute_s:.2f} ms",
        f"fetch   |{'=' * fetch:<{width}} {1e3 * time.prefetch_s:.2f} ms",
    ]


def as_json(plan: Plan) -> dict[str, Any]:
    """Plain data, stable keys. Infinite ratios are null."""

    def plain(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value

    best = plan.best
    data: dict[str, Any] = {
        "schema": "dwdp-plan-1",
        "model": plan.model.name,
        "hardware": plan.hardware.name,
        "workload": dataclasses.asdict(plan.workload),
        "verdict": plan.verdict,
        "reasons": list(plan.reasons),
        "prefill_gain": plan.prefill_gain,
        "gain": plan.gain,
    }
    if best is None:
        return data
    data |= {
        "dwdp_config": dwdp_options(plan) if best.group.size > 1 else None,
        "num_slots": plan.num_slots,
        "slice_bytes": plan.policy.slice_bytes,
        "demand_up_to_tokens": plan.demand_up_to_tokens,
        "prefill_tokens_to_hide": plan.prefill_tokens_to_hide,
        "num_prefill_gpus": plan.num_prefill_gpus,
        "num_generation_gpus": plan.workload.num_gpus - plan.num_prefill_gpus,
        "expert_parallel_group_size": plan.dep_group_size,
        "memory_bytes": best.memory.parts(),
        "candidates": [
            {
                "group_size": candidate.group.size,
                "num_experts_per_worker": candidate.group.num_experts_per_worker,
                "from_host": candidate.from_host,
                "memory_bytes": candidate.memory.used,
                "tokens_per_s_per_gpu": candidate.tokens_per_s,
                "compute_to_prefetch": plain(candidate.window_ratio),
                "exposed_s": candidate.exposed_s,
            }
            for candidate in plan.candidates
        ],
        "pareto": [point._asdict() for point in pareto_front(plan)],
        "assumed_hardware_figures": list(plan.hardware.assumed),
        "notes": list(plan.model.notes),
    }
    return data
