"""Which rank a process is: from torchrun, mpirun, srun or variables of the user's own; and its one GPU."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dwdp.config import DwdpConfig
from dwdp.engines.tensorrt_llm import launch
from dwdp.engines.tensorrt_llm.launch import RankPlace, prepare_process, rank_of_process
from dwdp.group import Group
from dwdp.launch import LaunchError, discover_launch, without_launcher

ROOT = Path(__file__).parents[2]
SERVE = ["trtllm-serve", "MODEL", "--parallel", "dwdp"]
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "job",
    "OMPI_MCA_ess_base_jobid": "7",
    "OMPI_MCA_btl": "tcp,self",
}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "9",
    "SLURM_STEP_NUM_NODES": "1",
    "PMIX_RANK": "3",
}


@pytest.fixture(autouse=True)
def not_prepared_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not imported TensorRT-LLM, and MPI with it, whatever ran here before."""
    monkeypatch.setattr(launch, "_prepared", None)
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)


def prepared(environ: dict[str, str], argv: list[str] | None = None) -> dict[str, str]:
    environ = {"PATH": "/bin", **environ}
    prepare_process(SERVE if argv is None else argv, environ)
    return environ


@pytest.mark.parametrize("environ", [TORCHRUN, MPIRUN, SRUN])
def test_a_rank_forgets_its_launcher_and_takes_one_gpu(environ: dict[str, str]) -> None:
    left = prepared(environ)
    assert discover_launch(left) is None
    local = environ.get("LOCAL_RANK") or environ.get("SLURM_LOCALID") or "1"
    assert left.pop("CUDA_VISIBLE_DEVICES") == local
    assert left.pop("DWDP_PREPARED") == "1"
    left.pop("OMPI_MCA_btl", None)  # which transports MPI may use is the user's to say
    assert left == {"PATH": "/bin"}


def test_settings_of_the_user_are_no_traces_of_a_launcher() -> None:
    kept = {
        "OMPI_MCA_btl": "self",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "UCX_TLS": "tcp",
        "HF_HOME": "/h",
    }
    assert without_launcher({**kept, **MPIRUN, **SRUN, **TORCHRUN, "OMPI_MCA_btl": "self"}) == kept


@pytest.mark.parametrize(
    ("visible", "left"),
    [("4", "4"), ("4,5,6,7", "5"), ("GPU-a,GPU-b", "GPU-b")],
)
def test_visible_gpus_are_shared_out_unless_there_is_one(visible: str, left: str) -> None:
    assert prepared({**MPIRUN, "CUDA_VISIBLE_DEVICES": visible})["CUDA_VISIBLE_DEVICES"] == left


@pytest.mark.parametrize(
    "argv",
    [
        [*SERVE[:2], "--parallel=dwdp"],
        ["trtllm-serve", "serve", *SERVE[1:]],
        ["trtllm-serve", "MODEL", "--config", "{yaml}"],
        ["trtllm-serve", "MODEL", "--extra_llm_api_options={yaml}"],
    ],
)
def test_asking_for_dwdp_is_seen(argv: list[str], tmp_path: Path) -> None:
    yaml = tmp_path / "options.yaml"
    yaml.write_text('max_batch_size: 8\nparallel: "dwdp"  # here\n')
    left = prepared(MPIRUN, [argument.replace("{yaml}", str(yaml)) for argument in argv])
    assert "DWDP_PREPARED" in left


def test_a_variable_asks_for_programs() -> None:
    assert "DWDP_PREPARED" in prepared({**MPIRUN, "DWDP_PARALLEL": "dwdp"}, ["program.py"])
    assert "DWDP_PREPARED" in prepared({**SRUN, "DWDP_RANK": "0"}, ["program.py"])


@pytest.mark.parametrize(
    "argv",
    [
        ["trtllm-serve", "MODEL"],
        ["trtllm-serve", "MODEL", "--config", "{yaml}"],
        ["trtllm-serve", "MODEL", "--config", "missing.yaml"],
        ["trtllm-serve", "disaggregated_mpi_worker", "-c", "file"],
        ["program.py"],
    ],
)
def test_nothing_changes_for_whoever_does_not_ask(argv: list[str], tmp_path: Path) -> None:
    yaml = tmp_path / "options.yaml"
    yaml.write_text("nested:\n  parallel: dwdp\n")
    argv = [argument.replace("{yaml}", str(yaml)) for argument in argv]
    assert prepared(MPIRUN, argv) == {"PATH": "/bin", **MPIRUN}


def test_children_of_a_prepared_process_keep_their_mpi() -> None:
    child = {**MPIRUN, "DWDP_PREPARED": "1", "DWDP_RANK": "0"}
    assert prepared(dict(child)) == {"PATH": "/bin", **child}


def test_workers_of_disaggregated_mpi_keep_their_mpi() -> None:
    argv = ["trtllm-serve", "disaggregated_mpi_worker", "-c", "file"]
    environ = {**MPIRUN, "DWDP_PARALLEL": "dwdp"}
    assert prepared(dict(environ), argv) == {"PATH": "/bin", **environ}


def test_one_group() -> None:
    left = prepared(MPIRUN)
    place = rank_of_process(DwdpConfig(dwdp_size=2), environ=left)
    assert place is not None
    assert (place.rank, place.size, place.group, place.is_served) == (1, 2, 0, False)
    joined = discover_launch(place.variables())
    assert joined is not None
    assert (joined.rank, joined.size, f"{joined.host}:{joined.port}") == (1, 2, place.rendezvous)


def test_groups_side_by_side_meet_apart_in_one_store() -> None:
    places = []
    for rank in range(8):
        left = prepared({**TORCHRUN, "RANK": str(rank)})
        place = rank_of_process(DwdpConfig(dwdp_size=4, num_groups=2), environ=left)
        assert place is not None
        places.append(place)
        launch._prepared = None
    assert [(place.group, place.rank) for place in places] == [
        (group, rank) for group in range(2) for rank in range(4)
    ]
    assert {place.rendezvous for place in places} == {"10.0.0.1:29500"}
    assert {place.attempt for place in places[:4]} == {4}  # the second restart of group 0
    assert {place.attempt for place in places[4:]} == {5}
    assert all(place.is_served for place in places)  # by torchrun's agent


@pytest.mark.timeout(120)
def test_groups_side_by_side_find_their_own_peers() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        rendezvous = f"127.0.0.1:{probe.getsockname()[1]}"
    config = DwdpConfig(dwdp_size=2, num_groups=2)
    joined = []  # the first rank of all serves the store, as long as it is there

    def join(number: int) -> list[bytes]:
        place = rank_of_process(config, rank=number, rendezvous=rendezvous, environ={})
        assert place is not None
        joining = discover_launch(place.variables())
        assert joining is not None
        group = Group.join(joining, timeout_s=60.0)
        joined.append(group)
        with group.setting_up():
            return group.exchange("number", str(number).encode())

    with ThreadPoolExecutor(4) as pool:
        met = list(pool.map(join, range(4)))
    assert met == [[b"0", b"1"], [b"0", b"1"], [b"2", b"3"], [b"2", b"3"]]


def test_the_first_group_serves_the_store_of_all() -> None:
    config = DwdpConfig(dwdp_size=2, num_groups=2)
    for rank in range(4):
        left = prepared({**SRUN, "SLURM_PROCID": str(rank)})
        place = rank_of_process(config, environ=left)
        assert place is not None and place.is_served == (rank >= 2)
        launch._prepared = None


def test_a_server_started_by_itself() -> None:
    config = DwdpConfig(dwdp_size=2, num_groups=2)
    environ = {"DWDP_RANK": "3", "DWDP_RENDEZVOUS": "node0:4000"}
    place = rank_of_process(config, environ=environ)
    assert place == RankPlace(1, 2, "node0:4000", group=1, num_groups=2, is_served=True, attempt=1)
    assert rank_of_process(config, rank=3, rendezvous="node0:4000", environ={}) == place
    assert rank_of_process(config, rank=3, rendezvous="other:1", environ=environ) == place
    with pytest.raises(LaunchError, match=r"rank 3 does not know .* DWDP_RENDEZVOUS=host:port"):
        rank_of_process(config, rank=3, environ={})


def test_servers_of_one_disaggregated_file_are_ranks_in_its_order() -> None:
    environ = {"TLLM_DISAGG_INSTANCE_IDX": "1", "DWDP_RENDEZVOUS": "node0:4000"}
    place = rank_of_process(DwdpConfig(dwdp_size=2), environ=environ)
    assert place is not None and (place.rank, place.size) == (1, 2)
    environ["TLLM_DISAGG_INSTANCE_IDX"] = "2"
    with pytest.raises(ValueError, match=r"server 2 .* num_instances 2.* context_servers alone"):
        rank_of_process(DwdpConfig(dwdp_size=2), environ=environ)


@pytest.mark.parametrize("environ", [{}, {**SRUN, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}])
def test_a_plain_process_owns_its_group(environ: dict[str, str]) -> None:
    left = prepared(environ)
    assert rank_of_process(DwdpConfig(dwdp_size=4), environ=left) is None
    assert "CUDA_VISIBLE_DEVICES" not in left


def test_another_number_of_ranks_is_refused() -> None:
    left = prepared(MPIRUN)
    with pytest.raises(ValueError, match=r"mpirun started 2 ranks, but .* is 1 x 4; start 4"):
        rank_of_process(DwdpConfig(dwdp_size=4), environ=left)


def test_a_launcher_seen_too_late_is_refused() -> None:
    with pytest.raises(LaunchError, match=r"DWDP_PARALLEL=dwdp .*mpirun -x DWDP_PARALLEL=dwdp"):
        rank_of_process(DwdpConfig(dwdp_size=2), environ=MPIRUN)


def test_what_is_wrong_with_the_launch_is_said_with_the_arguments() -> None:
    left = prepared({**MPIRUN, "CUDA_VISIBLE_DEVICES": "0,1", "OMPI_COMM_WORLD_LOCAL_RANK": "2"})
    with pytest.raises(
        LaunchError, match=r"CUDA_VISIBLE_DEVICES=0,1 has 2 GPUs, .* at least 3 ranks"
    ):
        rank_of_process(DwdpConfig(dwdp_size=2), environ=left)


def test_several_nodes_need_an_address() -> None:
    left = prepared({**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"})
    with pytest.raises(LaunchError, match="runs on several nodes; set DWDP_RENDEZVOUS"):
        rank_of_process(DwdpConfig(dwdp_size=2), environ=left)
    place = rank_of_process(DwdpConfig(dwdp_size=2), rendezvous="node0:4000", environ=left)
    assert place is not None and place.rendezvous == "node0:4000"


def test_ranks_of_one_node_listen_on_ports_that_follow_each_other() -> None:
    assert launch.server_port(8000) == 8000
    prepared(MPIRUN)
    assert launch.server_port(8000) == 8001
    assert launch.server_port(0) == 0


def test_ranks_numbered_by_the_user_listen_on_the_port_that_is_given() -> None:
    left = prepared({**MPIRUN, "DWDP_RANK": "1", "DWDP_RENDEZVOUS": "node0:4000"})
    assert left["CUDA_VISIBLE_DEVICES"] == "1"
    assert launch.server_port(8000) == 8000
    place = rank_of_process(DwdpConfig(dwdp_size=4), environ=left)
    assert place is not None and (place.rank, place.size) == (1, 4)


_SHOW_PLACE = """
import json, os, sys
sys.argv = ["trtllm-serve", "MODEL", "--parallel", "dwdp"]
from dwdp.engines.tensorrt_llm.launch import prepare_process, rank_of_process
prepare_process()
from dwdp.config import DwdpConfig
place = rank_of_process(DwdpConfig(dwdp_size=2))
line = {"place": place.variables(), "gpu": os.environ["CUDA_VISIBLE_DEVICES"],
        "left": [key for key in os.environ if key.startswith(("OMPI_COMM", "PMIX"))]}
sys.stdout.write(json.dumps(line) + "\\n")
"""


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun")
@pytest.mark.timeout(120)
def test_ranks_of_a_real_mpirun() -> None:
    done = subprocess.run(
        [
            "mpirun",
            "--allow-run-as-root",
            "--oversubscribe",
            "-n",
            "2",
            sys.executable,
            "-c",
            _SHOW_PLACE,
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ranks = sorted(map(json.loads, done.stdout.splitlines()), key=lambda rank: rank["gpu"])
    assert [rank["gpu"] for rank in ranks] == ["0", "1"]
    assert [rank["place"]["DWDP_RANK"] for rank in ranks] == ["0", "1"]
    assert len({rank["place"]["DWDP_RENDEZVOUS"] for rank in ranks}) == 1
    assert all(rank["left"] == [] for rank in ranks)


_WORKER = """
import os, sys, time
from dwdp.engines.tensorrt_llm.launch import end_with_server
end_with_server()
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.timeout(60)
def test_a_worker_ends_with_its_server() -> None:
    server = subprocess.Popen(["sleep", "600"])
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "DWDP_SERVER_PID": str(server.pid)}
    worker = subprocess.Popen(
        [sys.executable, "-c", _WORKER], env=environ, stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
    assert worker.poll() is None
    server.kill()
    server.wait()
    assert worker.wait() == 1
    assert subprocess.run([sys.executable, "-c", _WORKER], env=environ, check=False).returncode == 1
