"""The files in ``examples/tensorrt_llm``: shells read them, and servers would accept what they say."""

from __future__ import annotations

import os
import py_compile
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from dwdp.config import DwdpConfig
from dwdp.engines.tensorrt_llm import launch
from dwdp.engines.tensorrt_llm.arguments import Request, read_request
from dwdp.engines.tensorrt_llm.conflicts import refuse_conflicts
from dwdp.engines.tensorrt_llm.launch import RankPlace, rank_of_process

EXAMPLES = Path(__file__).parents[2] / "examples" / "tensorrt_llm"
PAPER = EXAMPLES / "deepseek_r1_8k1k"

# Stand-ins of Slurm's commands and of trtllm-serve: each task says where it runs, and what it would do.
_SRUN = """#!/bin/bash
nodes=1 tasks=1 mpi=none
for argument in "$@"; do
  case $argument in
    --nodelist=*) nodelist=${argument#*=} ;;
    --ntasks=*) tasks=${argument#*=} ;;
    --mpi=*) mpi=${argument#*=} ;;
    bash | trtllm-serve) break ;;
  esac
  shift
done
for ((task = 0; task < tasks; task++)); do
  SLURM_PROCID=$task SLURM_NTASKS=$tasks SLURM_STEP_NUM_TASKS=$tasks SLURM_STEP_ID=0 SLURM_LOCALID=$task \\
    NODE=$nodelist "$@"
done
"""
_TRTLLM_SERVE = """#!/bin/bash
rank="${DWDP_RANK:-}|${DWDP_WORLD_SIZE:-}|$DWDP_RENDEZVOUS"
echo "$NODE|$CUDA_VISIBLE_DEVICES|$rank|${SLURM_PROCID:-}|$*" >> "$SERVED"
"""
_COMMANDS = {
    "srun": _SRUN,
    "trtllm-serve": _TRTLLM_SERVE,
    "trtllm-llmapi-launch": '#!/bin/bash\nexec "$@"\n',
    "numactl": '#!/bin/bash\nshift 2\nexec "$@"\n',
    "scontrol": "#!/bin/bash\nprintf 'gb%02d\\n' 1 2 3 4 5 6\n",
    "hostname": '#!/bin/bash\necho "$NODE"\n',
    "curl": "#!/bin/bash\nsleep 2\nexit 0\n",
}


def load(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def requested(settings: dict[str, Any]) -> Request:
    refuse_conflicts(settings, {})
    request = read_request(settings)
    assert request is not None
    return request


def run_job(script: Path, folder: Path) -> list[list[str]]:
    """Run a batch script with stand-ins; what every task would serve, by fields."""
    commands = folder / "bin"
    commands.mkdir()
    for name, text in _COMMANDS.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    work = folder / "work"
    work.mkdir()
    for file in script.parent.iterdir():
        if file.is_file():
            (work / file.name).write_bytes(file.read_bytes())
    environ = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SERVED": str(folder / "served"),
        "MODEL": "/models/r1",
        "SLURM_JOB_NODELIST": "gb[01-06]",
        "SLURM_NTASKS": "8",
        "NODE": "gb01",
    }
    subprocess.run(["bash", script.name], cwd=work, env=environ, capture_output=True, check=False)
    return [line.split("|") for line in (folder / "served").read_text().splitlines()]


@pytest.fixture(autouse=True)
def plain_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_prepared", None)


def test_every_file_is_in_the_table() -> None:
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.iterdir():
        name = f"{path.name}/" if path.is_dir() else path.name
        assert name in ("README.md", "__pycache__/") or f"`{name}`" in table


def test_the_program_compiles(tmp_path: Path) -> None:
    py_compile.compile(str(EXAMPLES / "llm_api.py"), cfile=str(tmp_path / "c"), doraise=True)


def test_one_node() -> None:
    assert requested(load(EXAMPLES / "one_node.yaml")).config == DwdpConfig(dwdp_size=4)


def test_context_servers_of_one_file() -> None:
    config = load(EXAMPLES / "disaggregated_mpi.yaml")
    context = config["context_servers"]
    request = requested(context)
    assert len(context["urls"]) == context["num_instances"] == request.config.dwdp_size
    places = [
        rank_of_process(
            request.config,
            rendezvous=request.rendezvous,
            environ={"TLLM_DISAGG_INSTANCE_IDX": str(index)},
        )
        for index in range(context["num_instances"])
    ]
    assert places == [RankPlace(rank, 2, "localhost:29500") for rank in range(2)]
    assert "parallel" not in config["generation_servers"]


def test_the_papers_set_up_fits_together() -> None:
    context = requested(load(PAPER / "context.yaml")).config
    front_end = load(PAPER / "disaggregated.yaml")
    urls = front_end["context_servers"]["urls"]
    assert len(urls) == context.num_groups * context.dwdp_size
    assert context.num_experts_per_worker == 256 // context.dwdp_size  # DeepSeek-R1's experts
    generation = load(PAPER / "generation.yaml")
    assert front_end["generation_servers"]["num_instances"] == 1
    assert read_request(generation) is None
    both = load(PAPER / "context.yaml")
    for key in ("max_seq_len", "cache_transceiver_config", "speculative_config"):
        assert generation[key] == both[key]


@pytest.mark.timeout(120)
def test_the_papers_job_starts_every_rank_at_its_place(tmp_path: Path) -> None:
    served = run_job(PAPER / "job.slurm", tmp_path)
    config = requested(load(PAPER / "context.yaml")).config
    ranks: dict[tuple[int, int], tuple[str, str]] = {}
    for node, device, rank, size, rendezvous, procid, command in served:
        if "context.yaml" not in command:
            continue
        assert procid == ""  # no launcher is left for MPI to find
        assert command.startswith("/models/r1 ")
        assert command.endswith("--parallel dwdp --dwdp_size 4")
        environ = {"DWDP_RANK": rank, "DWDP_WORLD_SIZE": size, "DWDP_RENDEZVOUS": rendezvous}
        place = rank_of_process(config, environ=environ)
        assert place is not None and place.rendezvous == "gb01:29500"
        ranks[place.group, place.rank] = (node, device)
    assert ranks == {
        (group, rank): (f"gb{group + 1:02d}", str(rank)) for group in range(4) for rank in range(4)
    }
    generation = [line for line in served if "generation.yaml" in line[-1]]
    assert len(generation) == 8 and {line[2] for line in generation} == {""}
    assert [line for line in served if "disaggregated -c" in line[-1]]


def test_ranks_of_a_job_step(tmp_path: Path) -> None:
    text = (EXAMPLES / "ranks.slurm").read_text()
    assert "--ntasks-per-node=4" in text and "--nodes=2" in text
    ((node, _, _, _, rendezvous, _, command),) = run_job(EXAMPLES / "ranks.slurm", tmp_path)
    assert rendezvous == "gb01:29500"
    assert command == f"/models/r1 --parallel dwdp --dwdp_size 1 --host {node} --port 8000"


@pytest.mark.trtllm
@pytest.mark.parametrize("name", ["one_node.yaml", "deepseek_r1_8k1k/context.yaml"])
def test_tensorrt_llm_knows_every_option(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorrt_llm  # noqa: F401
    from tensorrt_llm.llmapi.llm_args import TorchLlmArgs, update_llm_args_with_extra_dict

    monkeypatch.setenv("DWDP_RANK", "0")
    monkeypatch.setenv("DWDP_RENDEZVOUS", "gb01:29500")
    base = {"model": "/models/r1", "skip_tokenizer_init": True, "gpus_per_node": 1}
    arguments = TorchLlmArgs(**update_llm_args_with_extra_dict(base, load(EXAMPLES / name)))
    assert arguments.parallel == "dwdp"
    assert arguments.env_overrides["DWDP_RANK"] == "0"
