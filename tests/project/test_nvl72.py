"""The NVL72 benchmark without a cluster: sweeps, generated jobs, prompts, results.

``nvl72/context_log.txt`` and ``nvl72/result.json`` have the form that TensorRT-LLM 1.3.0rc3 writes: the
iteration log of ``tensorrt_llm/_torch/pyexecutor/py_executor.py`` and the file of
``benchmark_serving --save-result`` (``tensorrt_llm/serve/scripts/benchmark_serving.py``). Their figures are
made up.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "nvl72"
RECORDED = Path(__file__).parent / "nvl72"
sys.path.append(str(FOLDER))

from cluster import ClusterFile, load_cluster  # noqa: E402
from dataset import Dataset, check_dataset, write_dataset  # noqa: E402
from measurements import Forward, read_forwards  # noqa: E402
from nvl72 import cli  # noqa: E402
from prediction import Expectations  # noqa: E402
from sweep import AXES, Point, Sweep, load_sweep  # noqa: E402

SWEEPS = sorted((FOLDER / "sweeps").glob("*.yaml"))
EXAMPLE = FOLDER / "cluster.example.yaml"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A cluster without containers."""
    path = tmp_path / "cluster.yaml"
    content = {"model_path": "/models/R1", "sbatch": ["--partition=p"], "numa_bind": False}
    path.write_text(yaml.safe_dump(content))
    return path


def sweep_file(folder: Path, **changes: Any) -> Path:
    """``smoke.yaml`` with other values at the top, or in ``defaults`` if it has no such key at the top."""
    content = yaml.safe_load((FOLDER / "sweeps" / "smoke.yaml").read_text())
    for key, value in changes.items():
        (content if key in Sweep.model_fields else content["defaults"])[key] = value
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


# Sweep and cluster files


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_generated_file_of_every_sweep_is_valid(path: Path) -> None:
    result = invoke("generate", path, "--cluster", EXAMPLE, "--dry-run")
    assert result.exit_code == 0, result.output
    assert re.search(r"^\d+ points, \d+ files: all valid$", result.output, re.MULTILINE)
    assert "warning" not in result.output
    assert load_sweep(path).name == path.stem


def test_the_readme_names_every_sweep_and_every_key() -> None:
    text = (FOLDER / "README.md").read_text()
    assert set(re.findall(r"\| `sweeps/([\w-]+)\.yaml` \|", text)) == {p.stem for p in SWEEPS}
    documented = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (`.+?) \|", text, re.M))))
    assert set(Point.model_fields) <= documented


def test_the_readme_has_a_sweep_that_is_valid(tmp_path: Path, cluster: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((FOLDER / "README.md").read_text().split("```yaml\n")[1].split("```")[0])
    result = invoke("generate", path, "--cluster", cluster, "--dry-run")
    assert result.exit_code == 0 and "4 points" in result.output, result.output


def test_lists_make_a_point_for_every_combination() -> None:
    sweep = load_sweep(FOLDER / "sweeps" / "paper-roofline.yaml")
    assert {(point.system, point.isl) for point in sweep.expanded} == {
        (system, isl) for system in ("dep", "dwdp") for isl in (1024, 8192, 16384, 32768)
    }
    assert len({point.name for point in sweep.expanded}) == 8
    assert set(AXES) <= set(Point.model_fields)


def test_the_paper_sweep_is_the_published_set_up() -> None:
    sweep = load_sweep(FOLDER / "sweeps" / "paper-end-to-end.yaml")
    assert sweep.model == "deepseek-r1-nvfp4" and sweep.mode == "end_to_end"
    assert {(point.isl, point.osl, point.length_ratio) for point in sweep.expanded} == {
        (8192, 1024, 0.8)
    }
    dep = {
        (point.context_gpus, point.generation_gpus)
        for point in sweep.expanded
        if point.system == "dep"
    }
    assert {(20, 8), (16, 8), (28, 16), (16, 16), (8, 32)} <= dep


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tabel": "runs"}, "points.0.tabel: Extra inputs"),
        ({"mode": "prefill"}, "mode: Input should be"),
        ({"name": "a b"}, "name: String should match"),
        ({"points": []}, "points: Tuple should have at least 1 item"),
        ({"model": "no-such"}, "no-such"),
        ({"hardware": "v100"}, "v100"),
        ({"isl": 0}, "points.0.isl: Input should be greater than 0"),
        ({"isl": "8K"}, "points.0.isl: Input should be a valid integer"),
        ({"isl": 10_000}, "points.0.max_num_tokens: 8192, but inputs have up to 10000 tokens"),
        ({"length_ratio": 1.5}, "points.0.length_ratio: Input should be less than or equal to 1"),
        ({"length_cv": 0.2}, "points.0.length_cv: give length_ratio or length_cv, not both"),
        ({"concurrency": []}, "points.0.concurrency: give either"),
        ({"group_size": []}, "points.0.group_size: an empty list"),
        ({"points": [{"name": "../x", "system": "dep"}]}, "points.0.name: String should match"),
        ({"points": [{"sistem": "dep"}]}, "points.0.sistem: Extra inputs"),
        ({"tps_per_user": [20]}, "points.0.concurrency: give either"),
        ({"tps_per_user": [1e6], "concurrency": []}, "tps_per_user: 1e+06 tokens/s are not expect"),
        ({"mode": "context_only"}, "points.0.osl: a context_only sweep generates one token"),
        ({"group_size": 3}, "points.0.group_size: 256 experts do not divide over 3 ranks"),
        ({"points": [{"system": "dwdp"}], "group_size": 1}, "points.0.group_size: a DWDP group"),
        (
            {"points": [{"system": "dwdp", "num_experts_per_worker": 10}]},
            "points.0.num_experts_per_worker: ",
        ),
        ({"num_experts_per_worker": 96}, "num_experts_per_worker: is an option of system dwdp"),
        ({"generation_server_gpus": 3}, "generation_server_gpus: 8 GPUs do not make servers of 3"),
        ({"expert_slots": 250}, "points.0.expert_slots: 250 expert slots do not share out"),
        ({"generation_gpus": 6}, "points.0.generation_server_gpus: 256 expert slots do not"),
        ({"num_groups": 18}, "point dep: num_groups: needs 20 nodes, and the cluster has 18"),
        ({"points": [{"system": "dep"}, {"system": "dep"}]}, "points.0.name: 2 points are called"),
        ({"generation_options": {"max_beams": 2}}, "generation.yaml: max_beams: not an option"),
        ({"moe_backend": "FAST"}, "context.yaml: moe_config.backend: 'FAST' is not one of"),
        ({"context_router": {"kind": "a"}}, "context_servers.router.kind: not an option"),
    ],
)
def test_a_bad_sweep_file_is_one_line_that_names_the_key(
    changes: dict[str, Any], expected: str, tmp_path: Path, cluster: Path
) -> None:
    path = sweep_file(tmp_path, **changes)
    result = invoke("generate", path, "--cluster", cluster, "--dry-run")
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert lines and all(line.startswith("nvl72: error: ") for line in lines)
    assert expected in lines[0], lines


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_path": None}, "model_path: "),
        ({"model_path": "models/R1"}, "model_path: 'models/R1' is not an absolute path"),
        ({"partition": "p"}, "partition: Extra inputs"),
        ({"sbatch": ["partition=p"]}, "sbatch: 'partition=p' is not an argument of sbatch"),
        ({"container_mounts": ["/a"]}, "container_mounts: '/a' is not host-path:container-path"),
        ({"environment": {"A-B": "1"}}, "environment: 'A-B' is not the name of a variable"),
        ({"gpus_per_node": 3}, "context server of 4 GPUs does not fill nodes of 3"),
    ],
)
def test_a_bad_cluster_file_too(
    changes: dict[str, Any], expected: str, tmp_path: Path, cluster: Path
) -> None:
    cluster.write_text(yaml.safe_dump(yaml.safe_load(cluster.read_text()) | changes))
    result = invoke("generate", sweep_file(tmp_path), "--cluster", cluster, "--dry-run")
    assert result.exit_code == 2
    assert result.stderr.startswith("nvl72: error: ") and result.stderr.count("\n") == 1
    assert expected in result.stderr


def test_files_that_are_not_there_or_not_yaml(tmp_path: Path, cluster: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    for sweep, expected in ((broken, "not a YAML file"), (tmp_path / "x.yaml", "no such file")):
        result = invoke("generate", sweep, "--cluster", cluster, "--dry-run")
        assert result.exit_code == 2 and expected in result.stderr
    assert invoke("generate", sweep_file(tmp_path), "--cluster", cluster).exit_code == 2


def test_the_example_names_its_own_placeholders() -> None:
    example = load_cluster(EXAMPLE)
    assert set(example.placeholders()) >= {"model_path", "sbatch", "container_image"}
    assert set(yaml.safe_load(EXAMPLE.read_text())) == set(ClusterFile.model_fields)


# Prompts


def test_both_systems_get_the_same_prompts(tmp_path: Path, cluster: Path) -> None:
    out = tmp_path / "out"
    assert (
        invoke("generate", sweep_file(tmp_path), "--cluster", cluster, "--out", out).exit_code == 0
    )
    clients = [(out / "points" / name / "client.sh").read_text() for name in ("dep", "dwdp")]
    used = {re.search(r"datasets/([\w.-]+)\.jsonl", text).group(1) for text in clients}  # type: ignore[union-attr]
    assert used == {path.stem for path in (out / "datasets").glob("*.yaml")}
    assert len(used) == 1


def dataset(**changes: Any) -> Dataset:
    values: dict[str, Any] = {
        "isl": 400,
        "length_ratio": 0.5,
        "length_cv": None,
        "longest_input": 400,
        "osl": 8,
        "seed": 3,
        "num_requests": 300,
        "first_token": 50,
        "last_token": 900,
    }
    return Dataset(**(values | changes))


def test_lengths_follow_the_ratio_or_the_cv() -> None:
    lengths = list(dataset().input_lengths())
    assert min(lengths) >= 200 and max(lengths) <= 400
    assert fmean(lengths) == pytest.approx(300, rel=0.03)
    varied = list(dataset(length_cv=0.2, longest_input=640, num_requests=2000).input_lengths())
    assert max(varied) <= 640 and pstdev(varied) / fmean(varied) == pytest.approx(0.2, rel=0.1)


def test_prompts_are_the_same_for_a_seed_and_a_longer_file_begins_alike() -> None:
    few = list(dataset(num_requests=5).lines("benchmark_serving"))
    assert few == list(dataset().lines("benchmark_serving"))[:5]
    assert few != list(dataset(seed=4, num_requests=5).lines("benchmark_serving"))
    same = list(dataset(num_requests=5).lines("trtllm-bench"))
    for one, other in zip(few, same, strict=True):
        request, bench = json.loads(one)["input"], json.loads(other)
        prompt = request["messages"][1]["content"]
        assert prompt == bench["input_ids"] and len(prompt) == request["num_tokens"]
        assert request["max_tokens"] == bench["output_tokens"] == 8
        assert all(50 <= token <= 900 for token in prompt)
    assert [json.loads(line)["task_id"] for line in same] == list(range(5))


def test_the_dataset_command_writes_both_formats(tmp_path: Path, cluster: Path) -> None:
    out = tmp_path / "out"
    assert (
        invoke("generate", sweep_file(tmp_path), "--cluster", cluster, "--out", out).exit_code == 0
    )
    description = next((out / "datasets").glob("*.yaml"))
    for kind in ("benchmark_serving", "trtllm-bench"):
        path = tmp_path / f"{kind}.jsonl"
        assert invoke("dataset", description, "--format", kind, "--out", path).exit_code == 0
        assert len(path.read_text().splitlines()) == 32
    path = description.with_suffix(".jsonl")
    shutil.copy(tmp_path / "benchmark_serving.jsonl", path)
    assert invoke("submit", out, "--dry-run").exit_code == 0
    path.write_text(path.read_text().partition("\n")[0] + "\n")
    result = invoke("submit", out, "--dry-run")
    assert result.exit_code == 2 and "1 prompts, not 32" in result.stderr


def test_prompts_of_other_lengths_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    write_dataset(dataset(seed=9), path)
    problem = check_dataset(dataset(), path)
    assert problem is not None and "prompt 0 has" in problem
    assert check_dataset(dataset(seed=9), path) is None


# Jobs: the generated scripts run, with stand-ins for Slurm's and TensorRT-LLM's programs.

STAND_INS = {
    "scontrol": 'printf "host%d\\n" 0 1 2',
    "srun": """
        tasks=1
        while [ "${1#--}" != "$1" ]; do
          case $1 in --ntasks=*) tasks=${1#*=} ;; --nodelist=*) export STEP_NODES=${1#*=} ;; esac
          case $1 in --mpi=*) export STEP_MPI=${1#*=} ;; esac
          shift
        done
        export SLURM_STEP_NUM_TASKS=$tasks SLURM_PROCID=0 PMIX_RANK=0
        exec "$@" """,
    "trtllm-llmapi-launch": 'export LAUNCHER=llmapi; exec "$@"',
    "trtllm-serve": """
        if [ "$1" = disaggregated ]; then cp "$3" "$CALLS/front_end.yaml"; exec sleep 60; fi
        port=$(sed 's/.*--port \\([0-9]*\\).*/\\1/' <<< "$*")
        { echo "args: $*"; env; } > "$CALLS/server_$port.partial"
        mv "$CALLS/server_$port.partial" "$CALLS/server_$port"
        exec sleep 60""",
    "curl": """
        [ -e "$CALLS/front_end.yaml" ] && [ "$(ls "$CALLS" | grep -c '^server_[0-9]*$')" = "$SERVERS" ]""",
    "sleep": '[ "$1" = 5 ] && exec /bin/sleep 0.1; exec /bin/sleep "$1"',
    "python3": """
        [ "$1 $2" = "-m tensorrt_llm.serve.scripts.benchmark_serving" ] || exit 9
        echo "$*" >> "$CALLS/client"
        case "$*" in *--result-dir*) ;; *) exit 0 ;; esac
        folder=$(sed 's/.*--result-dir \\([^ ]*\\).*/\\1/' <<< "$*")
        cp "$RESULT" "$folder/result.json" """,
}


@pytest.fixture
def run_job(tmp_path: Path) -> Callable[[Path, int], Path]:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)

    def run(folder: Path, servers: int) -> Path:
        calls = folder / "calls"
        calls.mkdir()
        environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "SLURM_JOB_NODELIST": "host[0-2]",
            "SLURM_JOB_ID": "1",
            "CALLS": str(calls),
            "SERVERS": str(servers),
            "RESULT": str(RECORDED / "result.json"),
        }
        done = subprocess.run(
            ["bash", "job.slurm"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return calls

    return run


def server(calls: Path, port: int) -> tuple[str, dict[str, str]]:
    arguments, *variables = (calls / f"server_{port}").read_text().splitlines()
    return arguments, dict(line.split("=", 1) for line in variables if "=" in line)


def test_a_generated_job_starts_its_servers_and_measures(
    tmp_path: Path, cluster: Path, run_job: Callable[[Path, int], Path]
) -> None:
    out = tmp_path / "out"
    assert (
        invoke("generate", sweep_file(tmp_path), "--cluster", cluster, "--out", out).exit_code == 0
    )
    calls = run_job(out / "points" / "dwdp", 5)
    for rank in range(4):
        arguments, variables = server(calls, 8001 + rank)
        assert "--parallel dwdp --dwdp_size 4" in arguments and "/models/R1" in arguments
        assert arguments.endswith(
            f"--config {out}/points/dwdp/context.yaml --parallel dwdp --dwdp_size 4"
        )
        assert variables["DWDP_RANK"] == str(rank) == variables["CUDA_VISIBLE_DEVICES"]
        assert variables["DWDP_WORLD_SIZE"] == "4"
        assert variables["DWDP_RENDEZVOUS"] == "host0:29500"
        assert variables["STEP_NODES"] == "host0" and variables["STEP_MPI"] == "none"
        assert not any(name.startswith(("SLURM_", "PMIX_")) for name in variables)
    arguments, variables = server(calls, 8005)
    assert "generation.yaml" in arguments and "--parallel" not in arguments
    assert variables["STEP_NODES"] == "host1,host2" and variables["STEP_MPI"] == "pmix"
    assert variables["LAUNCHER"] == "llmapi" and variables["SLURM_STEP_NUM_TASKS"] == "8"
    assert "DWDP_RANK" not in variables
    front_end = yaml.safe_load((calls / "front_end.yaml").read_text())
    assert front_end["hostname"] == "host0"
    assert front_end["context_servers"]["urls"] == [f"host0:{8001 + rank}" for rank in range(4)]
    assert front_end["generation_servers"]["urls"] == ["host1:8005"]
    warm_up, load = (calls / "client").read_text().splitlines()
    assert "--num-prompts 64 " in warm_up and "--max-concurrency 16 " in load
    assert "--num-prompts 32 " in load and "trtllm_custom" in load

    calls = run_job(out / "points" / "dep", 2)
    arguments, variables = server(calls, 8001)
    assert variables["LAUNCHER"] == "llmapi" and variables["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
    assert "--parallel" not in arguments and "DWDP_RANK" not in variables

    result = invoke("collect", out)
    assert result.exit_code == 0 and "2 of 2 runs are measured" in result.output
    with_results = invoke("generate", sweep_file(tmp_path), "--cluster", cluster, "--out", out)
    assert with_results.exit_code == 2 and "has results" in with_results.stderr


def test_a_server_that_ends_early_ends_the_job(
    tmp_path: Path, cluster: Path, run_job: Callable[[Path, int], Path]
) -> None:
    out = tmp_path / "out"
    assert (
        invoke("generate", sweep_file(tmp_path), "--cluster", cluster, "--out", out).exit_code == 0
    )
    (tmp_path / "programs" / "trtllm-llmapi-launch").write_text("#!/bin/bash\nexit 3\n")
    with pytest.raises(AssertionError, match="a server ended while the others were starting"):
        run_job(out / "points" / "dep", 2)


# Submission


def test_submit_asks_slurm_once_per_point(
    tmp_path: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert (
        invoke("generate", sweep_file(tmp_path), "--cluster", cluster, "--out", out).exit_code == 0
    )
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/calls\necho 77\n')
    (programs / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    shown = invoke("submit", out, "--dry-run")
    assert shown.output.count("sbatch --parsable") == 2 and not (tmp_path / "calls").exists()
    assert invoke("submit", out, "--only", "nothing").exit_code == 2
    first = invoke("submit", out, "--only", "dep")
    assert first.exit_code == 0 and "dep: job 77" in first.output
    assert invoke("submit", out).exit_code == 0
    assert invoke("submit", out).exit_code == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [
        f"--chdir={out}/points/{name} " in call
        for name, call in zip(("dep", "dwdp"), calls, strict=True)
    ]
    assert len(next((out / "datasets").glob("*.jsonl")).read_text().splitlines()) == 32
    (programs / "sbatch").write_text("#!/bin/bash\necho no such partition >&2\nexit 1\n")
    refused = invoke("submit", out, "--again")
    assert refused.exit_code == 2 and "no such partition" in refused.stderr


def test_placeholders_are_not_submitted(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert (
        invoke("generate", sweep_file(tmp_path), "--cluster", EXAMPLE, "--out", out).exit_code == 0
    )
    result = invoke("submit", out)
    assert result.exit_code == 2 and "model_path" in result.stderr


def test_a_changed_file_is_found_before_submission(tmp_path: Path, cluster: Path) -> None:
    out = tmp_path / "out"
    assert (
        invoke("generate", sweep_file(tmp_path), "--cluster", cluster, "--out", out).exit_code == 0
    )
    path = out / "points" / "dwdp" / "context.yaml"
    path.write_text(path.read_text().replace("max_batch_size", "max_batchsize"))
    result = invoke("submit", out)
    assert result.exit_code == 2
    assert "points/dwdp/context.yaml: max_batchsize: not an option" in result.stderr
    assert invoke("submit", tmp_path).exit_code == 2


# Results


def test_forwards_are_paired_with_the_time_in_the_next_line() -> None:
    lines = (RECORDED / "context_log.txt").read_text().splitlines()
    forwards = list(read_forwards(lines))
    assert forwards == [
        Forward("2026-11-21 07:58:01", 100, 301.25048828125),
        Forward("2026-11-21 07:58:02", 100, 41.0),
        Forward("2026-11-21 08:00:01", 29492, 1200.5),
        Forward("2026-11-21 08:00:02", 30110, 1219.5),
        Forward("2026-11-21 08:00:03", 29001, 1180.0),
        Forward("2026-11-21 08:00:08", 29400, 1210.0),
        Forward("2026-11-21 08:05:00", 15000, 690.0),
    ]


def generated(folder: Path, cluster: Path, name: str, points: list[Any] | None = None) -> Path:
    """The folder of a sweep, with other ``points`` (predictions take a while)."""
    out = folder / "out"
    content = yaml.safe_load((FOLDER / "sweeps" / f"{name}.yaml").read_text())
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content | ({} if points is None else {"points": points})))
    assert invoke("generate", path, "--cluster", cluster, "--out", out).exit_code == 0
    return out


def put_result(point: Path, concurrency: int, **changes: Any) -> None:
    """A finished run of ``point``: the recorded files, with other figures."""
    run = point / f"concurrency_{concurrency}"
    run.mkdir(parents=True, exist_ok=True)
    rounds = yaml.safe_load((point / "point.yaml").read_text())["rounds"]
    result = json.loads((RECORDED / "result.json").read_text())
    result |= {"num_prompts": rounds * concurrency, "completed": rounds * concurrency} | changes
    (run / "result.json").write_text(json.dumps(result))


def put_log(point: Path, concurrency: int, scale: float = 1.0) -> None:
    """The context servers' log of that run, with times ``scale`` as long."""
    (point / "run").mkdir(exist_ok=True)
    text = (RECORDED / "context_log.txt").read_text()
    scaled = re.sub(r"(step_time = )([\d.]+)ms", lambda m: f"{m[1]}{scale * float(m[2])}ms", text)
    (point / "run" / "context_0.log").write_text(scaled)
    window = "2026-11-21 08:00:00\n2026-11-21 08:00:30\n"
    (point / f"concurrency_{concurrency}" / "window.txt").write_text(window)


def row(page: str, name: str, table: int = 0) -> list[str]:
    """Cells of the ``table``-th row that begins with ``name``."""
    lines = [line for line in page.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in lines[table].strip("|").split("|")]


def test_iterations_are_those_within_the_load(tmp_path: Path, cluster: Path) -> None:
    out = generated(tmp_path, cluster, "paper-iteration")
    for name, scale in (("dep", 1.2), ("dwdp", 1.0)):
        put_result(out / "points" / name, 256)
        put_log(out / "points" / name, 256, scale)
    result = invoke("collect", out)
    assert result.exit_code == 0, result.output
    runs = {r["point"]["name"]: r for r in json.loads((out / "results.json").read_text())["runs"]}
    iterations = runs["dwdp"]["measured"]["iterations"]
    assert iterations["count"] == 4
    assert iterations["mean_ms"] == pytest.approx(fmean([1200.5, 1219.5, 1180.0, 1210.0]))
    page = (out / "results.md").read_text()
    cells = row(page, "iteration")
    assert cells[1] == "1,320" and cells[3] == "1,443" and cells[6] == "1,202"
    assert row(page, "attention")[3] == "not measured"
    assert row(page, "iterations per second")[-1] == "1.2"
    assert row(page, "dep")[3:5] == [row(page, "dep")[3], "461"]


def test_what_was_not_measured_says_so(tmp_path: Path, cluster: Path) -> None:
    out = generated(tmp_path, cluster, "paper-contention")
    put_result(out / "points" / "dwdp-contention_opt-on", 256)
    assert invoke("collect", out).exit_code == 0
    page = (out / "results.md").read_text()
    assert "1 of 3 runs are measured" in page
    gain = row(page, "contention_opt on / off")
    assert gain[1] == "1.08" and float(gain[2]) > 1 and gain[3] == "not measured"
    put_result(out / "points" / "dwdp-contention_opt-off", 256, total_input_tokens=29491 / 1.1)
    assert invoke("collect", out).exit_code == 0
    assert row((out / "results.md").read_text(), "contention_opt on / off")[3] == "1.1"


def test_end_to_end_compares_the_best_points_within_a_range(tmp_path: Path, cluster: Path) -> None:
    published = load_sweep(FOLDER / "sweeps" / "paper-end-to-end.yaml").points[:1]
    out = generated(tmp_path, cluster, "paper-end-to-end", list(published))
    points = out / "points"
    for name, output_throughput, tpot_ms in (
        ("tps20-40-dep-groups5", 2800.0, 40.0),  # 25 TPS/user, 28 GPUs: 100 TPS/GPU
        ("tps20-40-dep-groups4", 2160.0, 40.0),  # 24 GPUs: 90
        ("tps20-40-dwdp-groups5", 2800.0, 25.0),  # 40 TPS/user
        ("tps20-40-dwdp-groups4", 2640.0, 38.0),  # 24 GPUs: 110
    ):
        put_result(points / name, 2048, output_throughput=output_throughput, mean_tpot_ms=tpot_ms)
    assert invoke("collect", out).exit_code == 0
    page = (out / "results.md").read_text()
    cells = row(page, "20-30")
    assert cells[1] == "1.1" and float(cells[2]) > 1.05 and cells[4:] == ["1.1", "100", "110"]
    assert row(page, "40-50")[4:] == ["not measured", "not measured", "100"]
    assert row(page, "60-70")[4:] == ["not measured"] * 3


def test_a_run_with_failed_requests_is_shown_and_not_compared(
    tmp_path: Path, cluster: Path
) -> None:
    out = generated(tmp_path, cluster, "paper-contention")
    for name in ("on", "off"):
        completed = 4096 if name == "on" else 4000
        put_result(out / "points" / f"dwdp-contention_opt-{name}", 256, completed=completed)
    assert invoke("collect", out).exit_code == 0
    page = (out / "results.md").read_text()
    assert "96 of 4096 requests failed" in page
    assert row(page, "contention_opt on / off")[3] == "not measured"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not JSON"),
        ("[]", "duration: None is not a number"),
        ('{"duration": 1.0, "num_prompts": 32}', "mean_tpot_ms: None is not a number"),
        ('{"duration": 0, "num_prompts": 32}', "duration: 0.0 is not more than 0"),
        ('{"duration": 1.0, "num_prompts": 8}', "num_prompts: 8, and the point sends 32"),
    ],
)
def test_a_broken_result_is_named(text: str, expected: str, tmp_path: Path, cluster: Path) -> None:
    out = generated(tmp_path, cluster, "smoke")
    path = out / "points" / "dep" / "concurrency_16" / "result.json"
    path.parent.mkdir()
    path.write_text(text)
    result = invoke("collect", out)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert str(path) in result.stderr and expected in result.stderr


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("paper-roofline", [{"system": ["dep", "dwdp"], "isl": 8192}]),
        ("length-variation", [{"system": ["dep", "dwdp"], "length_cv": 0.2}]),
        ("group-size", [{"system": "dep", "group_size": 4}, {"system": "dwdp", "group_size": 3}]),
    ],
)
def test_every_layout_has_the_model_beside_what_is_not_measured(
    name: str, points: list[Any], tmp_path: Path, cluster: Path
) -> None:
    out = generated(tmp_path, cluster, name, points)
    assert invoke("collect", out).exit_code == 0
    page = (out / "results.md").read_text()
    tables = [line for line in page.splitlines() if line.startswith("| ")]
    widths = {line.count("|") for line in tables}
    assert len(widths) == 2 and "not measured" in page and " - |" in page


# Predictions


def test_a_load_by_speed_is_one_at_which_that_speed_is_expected() -> None:
    sweep = load_sweep(FOLDER / "sweeps" / "tps-targets.yaml")
    expectations = Expectations(sweep.model, sweep.hardware)
    for point in sweep.expanded:
        if point.num_groups != 4 or point.system != "dep":
            continue
        loads = expectations.concurrencies(point)
        for speed, load in zip(point.tps_per_user, loads, strict=True):
            assert expectations.of(point, load).tps_per_user == pytest.approx(speed, rel=0.1)


def test_too_little_prefill_limits_the_rate_and_delays_first_tokens() -> None:
    sweep = load_sweep(FOLDER / "sweeps" / "tps-targets.yaml")
    expectations = Expectations(sweep.model, sweep.hardware)
    points = {
        point.num_groups: expectations.of(point, 1824)
        for point in sweep.expanded
        if point.system == "dep" and point.num_groups in (1, 5)
    }
    narrow, wide = points[1], points[5]
    prefill = narrow.context_tokens_per_s_per_gpu * 4 / (0.9 * 8192) * 1024 / 20
    assert narrow.tps_per_gpu == pytest.approx(prefill, rel=0.01)
    assert narrow.mean_ttft_ms is not None and wide.mean_ttft_ms is not None
    assert narrow.mean_ttft_ms > 20 * wide.mean_ttft_ms
    assert narrow.tps_per_user is not None and narrow.tps_per_user > 2 * (wide.tps_per_user or 0)
