"""The files of one Slurm job that serves a model with TensorRT-LLM, prefill and generation apart.

| file | what it is |
| --- | --- |
| ``context.yaml``, ``generation.yaml`` | options of one server of that kind (``trtllm-serve --config``) |
| ``disaggregated.yaml`` | the front end (``trtllm-serve disaggregated -c``); ``NODE_i`` is the i-th host |
| ``start_worker.sh`` | what every task of every server runs |
| ``job.slurm`` | the batch script: starts the servers, waits for them, runs ``client.sh`` if there is one |

Every server is a job step of its own. One of several GPUs is started as TensorRT-LLM's examples do it
(``trtllm-llmapi-launch`` under PMIx). One of a single GPU starts its own worker process by MPI, and must
then not see the variables of Slurm and PMIx. Under DWDP it is a rank, which learns its number and its peers'
meeting point from ``DWDP_*`` variables (``dwdp/launch.py``).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from dwdp.perf.gpu_placement import (
    FRONT_END_PORT,
    RENDEZVOUS_PORT,
    Role,
    ServerPlace,
    Servers,
    num_nodes,
    place_servers,
)

CONTEXT, GENERATION = "context.yaml", "generation.yaml"
DISAGGREGATED, WORKER, JOB, CLIENT = (
    "disaggregated.yaml",
    "start_worker.sh",
    "job.slurm",
    "client.sh",
)


@dataclass(frozen=True)
class Cluster:
    """What a job needs to know of the cluster.

    Attributes:
        gpus_per_node: of every node.
        model: path of the checkpoint there; None: the variable ``MODEL`` at submission.
        sbatch: further arguments of sbatch, such as ``--partition=batch``.
        container_image: for pyxis; None: the nodes' own software.
        container_mounts: ``host:container`` pairs.
        environment: variables of all servers and of the client.
        setup_command: shell command that runs once per node, in the container.
        numa_bind: allocate host memory on the CPUs' own NUMA nodes (Grace: GPU memory is a NUMA node too).
        start_timeout_s: how long servers may take to load the model.
    """

    gpus_per_node: int = 4
    model: str | None = None
    sbatch: tuple[str, ...] = ()
    container_image: str | None = None
    container_mounts: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    setup_command: str | None = None
    numa_bind: bool = False
    start_timeout_s: int = 3600


@dataclass(frozen=True)
class Job:
    """Servers, and the options of each kind.

    Attributes:
        name: of the Slurm job.
        context, generation: how many servers of how many GPUs.
        context_options, generation_options: as in :class:`dwdp.perf.server_options.ServerSettings`.
        context_router: how the front end picks a context server; None: in turn.
        root: folder that containers must see, relative to the job's.
        client: whether ``client.sh`` is run once the servers are up; otherwise they serve until the job ends.
    """

    name: str
    context: Servers
    generation: Servers
    context_options: dict[str, Any]
    generation_options: dict[str, Any]
    context_router: dict[str, Any] | None = None
    root: str = "."
    client: bool = False

    def places(self, gpus_per_node: int) -> tuple[ServerPlace, ...]:
        """Where every server runs, context servers first."""
        kinds: tuple[tuple[Role, Servers], ...] = (
            ("context", self.context),
            ("generation", self.generation),
        )
        return place_servers(kinds, gpus_per_node)

    @property
    def dwdp_config(self) -> dict[str, Any] | None:
        """``dwdp_config`` of the context servers; None without DWDP."""
        return self.context_options.get("dwdp_config")


def write_job(job: Job, cluster: Cluster, folder: Path) -> list[Path]:
    """Write the job's files to ``folder`` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    places = job.places(cluster.gpus_per_node)
    texts = {
        CONTEXT: _yaml(job.context_options),
        GENERATION: _yaml(job.generation_options),
        DISAGGREGATED: _yaml(front_end_config(job, places)),
        WORKER: worker_script(job, cluster),
        JOB: job_script(job, cluster, places),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def _yaml(content: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(content, sort_keys=False)
    return text


def front_end_config(job: Job, places: tuple[ServerPlace, ...]) -> dict[str, Any]:
    """The configuration of ``trtllm-serve disaggregated``: where servers are, and how one is picked."""

    def servers(role: Role) -> dict[str, Any]:
        urls = [f"NODE_{place.nodes[0]}:{place.port}" for place in places if place.role == role]
        return {"num_instances": len(urls), "urls": urls}

    context = servers("context")
    if job.context_router is not None:
        context["router"] = job.context_router
    return {
        "hostname": "NODE_0",
        "port": FRONT_END_PORT,
        "context_servers": context,
        "generation_servers": servers("generation"),
    }


def worker_script(job: Job, cluster: Cluster) -> str:
    """What every task of every server runs."""
    exports = "".join(
        f"export {name}={shlex.quote(value)}\n" for name, value in cluster.environment.items()
    )
    numactl = "numactl -m 0,1 " if cluster.numa_bind else ""
    rank = ""
    if job.dwdp_config is not None:
        size = job.dwdp_config["dwdp_size"]
        rank = f"""
if [ "$role" = context ]; then  # a rank; DWDP_RENDEZVOUS is the job's
  export DWDP_RANK=$index DWDP_WORLD_SIZE={job.context.num_servers}
  command+=(--parallel dwdp --dwdp_size {size})
fi
"""
    return f"""#!/bin/bash
# start_worker.sh ROLE INDEX GPUS PORT: one task of one server.
set -euo pipefail
role=$1 index=$2 port=$4
export CUDA_VISIBLE_DEVICES=$3
{exports}here=$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)
command=({numactl}trtllm-serve "$MODEL" --host "$(hostname)" --port "$port" --config "$here/$role.yaml")

if [ "${{SLURM_STEP_NUM_TASKS:-1}}" -gt 1 ]; then
  exec trtllm-llmapi-launch "${{command[@]}}"
fi
{rank}
# A server of one GPU starts its worker by MPI: as a process of no launcher.
for name in $(compgen -e); do
  case $name in SLURM_* | PMI_* | PMIX_* | OMPI_* | MPI_*) unset "$name" ;; esac
done
exec "${{command[@]}}"
"""


def job_script(job: Job, cluster: Cluster, places: tuple[ServerPlace, ...]) -> str:
    """The batch script. It runs in the folder that holds the other files (``sbatch --chdir``)."""
    nodes = num_nodes(places)
    arguments = [
        f"--job-name={job.name}",
        f"--nodes={nodes}",
        f"--ntasks-per-node={cluster.gpus_per_node}",
        f"--gpus-per-node={cluster.gpus_per_node}",
        "--exclusive",
        *cluster.sbatch,
    ]
    directives = "\n".join(f"#SBATCH {argument}" for argument in arguments)
    starts = "\n".join(
        f"start_worker {place.role} {place.number} {_numbers(place.nodes)} {_numbers(place.gpus)} "
        f"{place.port}"
        for place in places
    )
    rendezvous = ""
    if job.dwdp_config is not None:
        rendezvous = f'export DWDP_RENDEZVOUS="${{hosts[0]}}:{RENDEZVOUS_PORT}"\n'
    return f"""#!/bin/bash
{directives}
# The cluster's own arguments (partition, account, time) may also be given to sbatch.
set -euo pipefail

{_model(cluster)}
here=$PWD
root=$(cd "$here/{job.root}" && pwd)
mkdir -p "$here/run"
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
{rendezvous}
# The nodes' names are only known now.
names=""
for i in "${{!hosts[@]}}"; do names+="s/\\bNODE_$i\\b/${{hosts[i]}}/g;"; done
sed "$names" "$here/{DISAGGREGATED}" > "$here/run/{DISAGGREGATED}"

{_container(cluster, nodes)}
workers=()
trap 'kill "${{workers[@]}}" 2> /dev/null || true' EXIT

start_worker() {{  # ROLE INDEX NODES GPUS PORT; lists are separated by commas
  local role=$1 index=$2 gpus=$4 port=$5 node names=()
  for node in ${{3//,/ }}; do names+=("${{hosts[node]}}"); done
  local commas=${{gpus//[!,]/}}
  local per_node=$((${{#commas}} + 1))
  local tasks=$((${{#names[@]}} * per_node))
  local mpi=pmix
  if [ "$tasks" -eq 1 ]; then mpi=none; fi
  srun --overlap --nodes="${{#names[@]}}" --nodelist="$(IFS=,; echo "${{names[*]}}")" \\
    --ntasks="$tasks" --ntasks-per-node="$per_node" --mpi="$mpi" "${{container[@]}}" \\
    bash "$here/{WORKER}" "$role" "$index" "$gpus" "$port" \\
    > "$here/run/${{role}}_$index.log" 2>&1 &
  workers+=($!)
}}

{starts}

one_task=(srun --overlap --nodes=1 --nodelist="${{hosts[0]}}" --ntasks=1 --mpi=pmix "${{container[@]}}")
"${{one_task[@]}}" trtllm-serve disaggregated -c "$here/run/{DISAGGREGATED}" \\
  -t {cluster.start_timeout_s} -r {cluster.start_timeout_s} > "$here/run/front_end.log" 2>&1 &
workers+=($!)

until curl --silent --fail --output /dev/null "http://${{hosts[0]}}:{FRONT_END_PORT}/health"; do
  for worker in "${{workers[@]}}"; do
    kill -0 "$worker" 2> /dev/null || {{
      echo "error: a server ended while the others were starting; see $here/run/*.log" >&2
      exit 1
    }}
  done
  if [ "$SECONDS" -gt {cluster.start_timeout_s} ]; then
    echo "error: the servers did not start in {cluster.start_timeout_s} s; see $here/run/*.log" >&2
    exit 1
  fi
  sleep 5
done
echo "serving at http://${{hosts[0]}}:{FRONT_END_PORT}"
{_work(job)}
"""


def _numbers(values: tuple[int, ...]) -> str:
    return ",".join(str(value) for value in values)


def _model(cluster: Cluster) -> str:
    if cluster.model is None:
        return ': "${MODEL:?set MODEL to the checkpoint}"\nexport MODEL'
    return f"export MODEL={shlex.quote(cluster.model)}"


def _container(cluster: Cluster, nodes: int) -> str:
    """The container's arguments of every step, and its start (and set-up) on every node."""
    lines = ["container=()"]
    if cluster.container_image is not None:
        mounts = ",".join(shlex.quote(mount) for mount in cluster.container_mounts)
        lines = [
            "container=(",
            f"  --container-image={shlex.quote(cluster.container_image)}",
            '  --container-name="dwdp-$SLURM_JOB_ID"',
            f'  --container-mounts={mounts}{"," if mounts else ""}"$root:$root"',
            "  --no-container-mount-home",
            ")",
        ]
    if cluster.setup_command is not None or cluster.container_image is not None:
        command = shlex.quote(cluster.setup_command or "true")
        lines.append(
            f'srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 "${{container[@]}}" '
            f'bash -c {command} \\\n  > "$here/run/setup.log" 2>&1'
        )
    return "\n".join(lines)


def _work(job: Job) -> str:
    if job.client:
        return f'"${{one_task[@]}}" bash "$here/{CLIENT}" "${{hosts[0]}}" {FRONT_END_PORT}'
    return 'wait -n "${workers[@]}" || true\necho "error: a server ended; see $here/run/*.log" >&2\nexit 1'
