"""The folder of a sweep: one folder per point with every file of its job, and the datasets beside them.

OUT/sweep.yaml, OUT/cluster.yaml    what it was made from
OUT/datasets/NAME.yaml              what a dataset is made from; NAME.jsonl is it (made by ``submit``)
OUT/points/NAME/                    job.slurm and what it reads; run/ and concurrency_N/ are its results
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import yaml
from cluster import ClusterFile
from dataset import Dataset, check_dataset, description_file, read_dataset
from prediction import Expectations
from sweep import Point, Sweep

from dwdp.perf.candidates import Workload, memory_of, num_slots_of
from dwdp.perf.gpu_placement import Servers, num_nodes
from dwdp.perf.job_check import check_job
from dwdp.perf.job_files import CLIENT, Job, write_job
from dwdp.perf.roofline import Group
from dwdp.perf.server_options import ServerSettings

SPARE_TOKENS = 64
"""Room in a sequence beside input and output: drafts of multi-token prediction."""
SEED = 0
"""Of the client's shuffle, the same for all points."""


def job_of_point(sweep: Sweep, point: Point, concurrencies: tuple[int, ...]) -> Job:
    """The point's servers and their options."""
    settings = ServerSettings(
        point.longest_input + point.osl + SPARE_TOKENS,
        point.moe_backend,
        point.kv_cache_dtype,
        point.transfer_backend,
        point.mtp_layers,
    )
    is_dwdp = point.system == "dwdp"
    dwdp_config = None
    if is_dwdp:
        dwdp_config = {
            "dwdp_size": point.group_size,
            "num_groups": point.num_groups,
            "contention_opt": point.contention_opt,
        }
        for key in ("num_experts_per_worker", "num_prefetch_experts"):
            if getattr(point, key) is not None:
                dwdp_config[key] = getattr(point, key)
    batch = point.generation_batch_size or -(-max(concurrencies) // point.generation_gpus)
    return Job(
        name=f"{sweep.name}-{point.name}",
        context=Servers(point.context_gpus, 1)
        if is_dwdp
        else Servers(point.num_groups, point.group_size),
        generation=Servers(point.generation_gpus // point.server_gpus, point.server_gpus),
        context_options=settings.context(
            point.context_batch_size,
            point.max_num_tokens,
            point.context_kv_share,
            1 if is_dwdp else point.group_size,
            dwdp_config,
        )
        | point.context_options,
        generation_options=settings.generation(
            batch, point.generation_kv_share, point.server_gpus, point.expert_slots
        )
        | point.generation_options,
        context_router=point.context_router,
        root="../..",
        client=True,
    )


def client_script(point: Point, dataset: Dataset, concurrencies: tuple[int, ...]) -> str:
    """The loads of a point, one after the other."""
    loads = " ".join(str(concurrency) for concurrency in concurrencies)
    # Every context rank opens a connection to every generation rank with its first requests.
    warm_up = 2 * point.context_gpus * point.server_gpus
    return f"""#!/bin/bash
# client.sh HOST PORT: puts the loads of this point on the servers, one after the other.
set -euo pipefail
here=$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)
benchmark_serving=(python3 -m tensorrt_llm.serve.scripts.benchmark_serving --backend openai \\
  --model "$MODEL" --trust-remote-code --host "$1" --port "$2" --ignore-eos)

"${{benchmark_serving[@]}}" --dataset-name random --random-ids --random-input-len 100 \\
  --random-output-len 10 --num-prompts {warm_up} --non-streaming > "$here/run/warm_up.log" 2>&1

for concurrency in {loads}; do
  out=$here/concurrency_$concurrency
  mkdir -p "$out"
  date '+%Y-%m-%d %H:%M:%S' > "$out/window.txt"
  "${{benchmark_serving[@]}}" --dataset-name trtllm_custom \\
    --dataset-path "$here/../../datasets/{dataset.name}.jsonl" --seed {SEED} --no-test-input \\
    --num-prompts $((concurrency * {point.rounds})) --max-concurrency "$concurrency" \\
    --percentile-metrics ttft,tpot,itl,e2el \\
    --save-result --result-dir "$out" --result-filename result.json > "$out/client.log" 2>&1
  date '+%Y-%m-%d %H:%M:%S' >> "$out/window.txt"
done
"""


def write_sweep(sweep: Sweep, cluster: ClusterFile, folder: Path) -> list[str]:
    """Write every file of a sweep to ``folder``; returns warnings.

    Raises:
        ValueError: a point cannot be run on the cluster; one line that names the key.
    """
    expectations = Expectations(sweep.model, sweep.hardware)
    folder.mkdir(parents=True, exist_ok=True)
    _write_yaml(sweep.model_dump(mode="json"), folder / "sweep.yaml")
    _write_yaml(cluster.model_dump(mode="json"), folder / "cluster.yaml")
    warnings = []
    datasets: dict[str, Dataset] = {}
    for point in sweep.expanded:
        try:
            concurrencies = expectations.concurrencies(point)
            _write_point(sweep, point, concurrencies, cluster, datasets, expectations, folder)
        except ValueError as error:
            raise ValueError(f"point {point.name}: {error}") from error
        warnings += [f"point {point.name}: {text}" for text in _doubts(point, expectations)]
    for dataset in datasets.values():
        _write_yaml(dataclasses.asdict(dataset), description_file(folder / "datasets", dataset))
    return warnings


def _write_point(
    sweep: Sweep,
    point: Point,
    concurrencies: tuple[int, ...],
    cluster: ClusterFile,
    datasets: dict[str, Dataset],
    expectations: Expectations,
    folder: Path,
) -> None:
    job = job_of_point(sweep, point, concurrencies)
    nodes = num_nodes(job.places(cluster.gpus_per_node))
    if nodes > cluster.num_nodes:
        raise ValueError(
            f"num_groups: needs {nodes} nodes, and the cluster has {cluster.num_nodes}"
        )
    requests = point.rounds * max(concurrencies)
    dataset = Dataset.of(point, requests, expectations.model.vocab_size)
    shared = datasets.setdefault(dataset.name, dataset)
    if shared.num_requests < requests:
        datasets[dataset.name] = dataset
    target = folder / "points" / point.name
    write_job(job, cluster.for_job(nodes), target)
    (target / CLIENT).write_text(client_script(point, dataset, concurrencies), encoding="utf-8")
    resolved = point.model_copy(update={"concurrency": concurrencies, "tps_per_user": ()})
    _write_yaml(resolved.model_dump(mode="json"), target / "point.yaml")


def _write_yaml(content: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def _doubts(point: Point, expectations: Expectations) -> list[str]:
    """What the performance model warns of: memory that a context rank is not expected to have."""
    model, hardware = expectations.model, expectations.hardware
    workload = Workload(point.isl, point.osl, max_num_tokens=point.max_num_tokens)
    slots = num_slots_of(model) if point.system == "dwdp" else 0
    group = Group(point.group_size, point.num_experts_per_worker)
    memory = memory_of(model, hardware, workload, group, slots)
    if memory.fits:
        return []
    return [
        f"group_size: a context rank is expected to need {memory.used / 1e9:.0f} GB, and "
        f"{hardware.name} has {memory.capacity / 1e9:.0f} GB"
    ]


def point_folders(folder: Path) -> list[Path]:
    """The points' folders, by name.

    Raises:
        ValueError: ``folder`` was not made by ``generate``.
    """
    found = sorted(path.parent for path in (folder / "points").glob("*/point.yaml"))
    if not found:
        raise ValueError(f"{folder}: has no points; make it with generate")
    return found


def check_sweep_folder(folder: Path) -> list[str]:
    """Everything wrong with the files in a sweep's folder, one line each."""
    problems = []
    for target in point_folders(folder):
        problems += [f"points/{target.name}/{text}" for text in check_job(target)]
        point = Point.model_validate(yaml.safe_load((target / "point.yaml").read_text("utf-8")))
        dataset = Dataset.of(point, point.rounds * max(point.concurrency), 100)
        description = description_file(folder / "datasets", dataset)
        if not description.is_file():
            problems.append(f"points/{target.name}/{CLIENT}: {description.name} is not there")
            continue
        described = read_dataset(description)
        if described.num_requests < dataset.num_requests:
            problems.append(
                f"datasets/{description.name}: {described.num_requests} requests, and "
                f"{target.name} needs {dataset.num_requests}"
            )
        longest = max(described.input_lengths())
        limit = yaml.safe_load((target / "context.yaml").read_text("utf-8"))["max_num_tokens"]
        if longest > limit:
            problems.append(
                f"datasets/{description.name}: an input of {longest} tokens, and context servers of "
                f"{target.name} take {limit}"
            )
    for description in sorted((folder / "datasets").glob("*.yaml")):
        prompts = description.with_suffix(".jsonl")
        problem = check_dataset(read_dataset(description), prompts) if prompts.is_file() else None
        if problem is not None:
            problems.append(problem)
    return problems


def remove_old_points(folder: Path) -> None:
    """Remove the points of an earlier ``generate``; results are never removed.

    Raises:
        ValueError: a point has results.
    """
    for path in sorted((folder / "points").glob("*")):
        if (path / "run").exists() or any(path.glob("concurrency_*")):
            raise ValueError(f"{path}: has results; name another folder, or move it away")
        shutil.rmtree(path)
