"""What a plan needs to be run with TensorRT-LLM: server configurations and a Slurm script."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from dwdp.perf.planner import Plan

DISAGGREGATED = "disaggregated.yaml"
SLURM = "dwdp.slurm"
_PORT = 8000


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


def disaggregated_config(plan: Plan) -> dict[str, Any]:
    """The configuration of ``trtllm-serve disaggregated`` and of its workers."""
    assert plan.best is not None
    workload = plan.workload
    num_prefill = plan.num_prefill_gpus
    num_generation = max(1, workload.num_gpus - num_prefill)
    # Expert parallelism wants a size that divides the experts: a power of two, several times if it fits.
    generation_size = min(32, 1 << (num_generation.bit_length() - 1))
    num_instances = num_generation // generation_size
    batch = 1
    if plan.dwdp_match is not None:
        share_s = plan.dwdp_match.generation_gpu_s * plan.dwdp_match.tps_per_user
        batch = max(1, round(workload.osl / share_s))
    ports = iter(range(_PORT + 1, _PORT + 1 + num_prefill + num_instances))
    context: dict[str, Any] = {
        "num_instances": num_prefill,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "enable_attention_dp": False,
        "disable_overlap_scheduler": True,
        "cuda_graph_config": None,
        "max_num_tokens": workload.max_num_tokens,
        "max_batch_size": max(1, workload.batch.num_sequences),
        "max_seq_len": workload.isl + workload.osl,
        "cache_transceiver_config": {"backend": "DEFAULT"},
        "urls": [f"localhost:{next(ports)}" for _ in range(num_prefill)],
    }
    if plan.best.group.size > 1:
        context |= {"parallel": "dwdp", "dwdp_config": dwdp_options(plan)}
    return {
        "hostname": "localhost",
        "port": _PORT,
        "context_servers": context,
        "generation_servers": {
            "num_instances": num_instances,
            "tensor_parallel_size": generation_size,
            "moe_expert_parallel_size": generation_size,
            "pipeline_parallel_size": 1,
            "enable_attention_dp": True,
            "max_batch_size": batch,
            "max_seq_len": workload.isl + workload.osl,
            "cache_transceiver_config": {"backend": "DEFAULT"},
            "urls": [f"localhost:{next(ports)}" for _ in range(num_instances)],
        },
    }


def num_tasks(config: dict[str, Any]) -> int:
    """GPUs that the servers of a :func:`disaggregated_config` take together."""
    return sum(
        config[kind]["num_instances"] * config[kind]["tensor_parallel_size"]
        for kind in ("context_servers", "generation_servers")
    )


def slurm_script(plan: Plan, gpus_per_node: int) -> str:
    """A batch script that starts all workers and the front end, one task per GPU."""
    gpus = num_tasks(disaggregated_config(plan))
    nodes = -(-gpus // gpus_per_node)
    name = shlex.quote(f"dwdp-{plan.model.name}")
    return f"""#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks={gpus}
#SBATCH --ntasks-per-node={min(gpus, gpus_per_node)}
#SBATCH --gpus-per-node={min(gpus, gpus_per_node)}
#SBATCH --exclusive
# Partition, account and time limit are the cluster's: give them to sbatch.
set -euo pipefail

: "${{MODEL:?set MODEL to the checkpoint}}"
here=${{DWDP_PLAN_DIR:-$SLURM_SUBMIT_DIR}}
config=$here/{DISAGGREGATED}
export TRTLLM_LOG_DIR=${{TRTLLM_LOG_DIR:-$here}}

# The workers' addresses are only known now: the file lists localhost for each.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
python3 - "$config" "$here/running.yaml" "$MODEL" "${{hosts[@]}}" <<'PYTHON'
import sys, yaml
source, target, model, *hosts = sys.argv[1:]
config = yaml.safe_load(open(source))
config["model"], config["hostname"] = model, hosts[0]
task = 0
for kind in ("context_servers", "generation_servers"):
    servers = config[kind]
    urls = []
    for url in servers["urls"]:
        urls.append(f"{{hosts[task // {gpus_per_node}]}}:{{url.rpartition(':')[2]}}")
        task += servers["tensor_parallel_size"]
    servers["urls"] = urls
yaml.safe_dump(config, open(target, "w"))
PYTHON

srun --mpi=pmix --ntasks={gpus} trtllm-serve disaggregated_mpi_worker -c "$here/running.yaml" \\
  > "$TRTLLM_LOG_DIR/workers.log" 2>&1 &
workers=$!
trap 'kill "$workers" 2> /dev/null || true' EXIT
trtllm-serve disaggregated -c "$here/running.yaml" 2>&1 | tee "$TRTLLM_LOG_DIR/server.log"
"""


def write_launch_files(plan: Plan, folder: Path, gpus_per_node: int) -> list[Path]:
    """Write both files to ``folder`` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    config, script = folder / DISAGGREGATED, folder / SLURM
    text = yaml.safe_dump(disaggregated_config(plan), sort_keys=False)
    config.write_text(text, encoding="utf-8")
    script.write_text(slurm_script(plan, gpus_per_node), encoding="utf-8")
    return [config, script]
