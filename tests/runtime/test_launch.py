"""Ranks are read from torchrun's, mpirun's and srun's environments, and bad ones are named."""

from __future__ import annotations

import pytest

from dwdp.launch import LaunchError, LaunchInfo, discover_launch, find_local_rank, parse_address

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-host-1234@1",
}
SRUN = {
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
}


def test_no_launcher() -> None:
    assert discover_launch({}) is None


def test_torchrun() -> None:
    assert discover_launch(TORCHRUN) == LaunchInfo("torchrun", 3, 4, "127.0.0.1", 29500, True)


def test_mpirun_ranks_derive_one_address() -> None:
    first = discover_launch(OPEN_MPI)
    second = discover_launch({**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "0"})
    other_job = discover_launch({**OPEN_MPI, "PMIX_NAMESPACE": "prterun-host-99@1"})
    assert first is not None and second is not None and other_job is not None
    assert (first.launcher, first.rank, first.size) == ("mpirun", 1, 2)
    assert (first.host, first.port) == (second.host, second.port)
    assert first.port != other_job.port
    assert not first.store_is_served


def test_srun() -> None:
    launch = discover_launch(SRUN)
    assert launch is not None
    assert (launch.launcher, launch.rank, launch.size, launch.host) == ("srun", 0, 4, "127.0.0.1")


def test_torchrun_with_a_rendezvous_of_the_users_own() -> None:
    launch = discover_launch({**TORCHRUN, "DWDP_RENDEZVOUS": "127.0.0.1:4000"})
    assert launch is not None
    assert (launch.port, launch.store_is_served) == (4000, False)


def test_torchrun_counts_its_attempts() -> None:
    launch = discover_launch({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2"})
    assert launch is not None and launch.attempt == 2


def test_groups_at_one_store_are_kept_apart_by_the_attempt() -> None:
    own = {"DWDP_RANK": "0", "DWDP_WORLD_SIZE": "2", "DWDP_RENDEZVOUS": "node0:4000"}
    launch = discover_launch({**own, "DWDP_ATTEMPT": "3"})
    assert launch is not None and launch.attempt == 3


def test_local_ranks() -> None:
    assert find_local_rank("torchrun", {**TORCHRUN, "LOCAL_RANK": "1"}) == 1
    assert find_local_rank("mpirun", {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK": "2"}) == 2
    assert find_local_rank("srun", {**SRUN, "SLURM_LOCALID": "3"}) == 3
    assert find_local_rank("srun", SRUN) is None
    assert find_local_rank("dwdp", {**SRUN, "SLURM_LOCALID": "3"}) is None


def test_a_batch_script_is_not_a_rank() -> None:
    batch = {key: value for key, value in SRUN.items() if key != "SLURM_STEP_ID"}
    assert discover_launch(batch) is None


def test_a_shell_in_an_allocation_is_not_a_rank() -> None:
    """salloc starts it as a step of one task and leaves the allocation's number of tasks."""
    assert discover_launch({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_a_step_may_have_fewer_tasks_than_its_allocation() -> None:
    launch = discover_launch({**SRUN, "SLURM_STEP_NUM_TASKS": "2"})
    assert launch is not None and launch.size == 2


def test_srun_with_pmi2_is_srun() -> None:
    environ = {**SRUN, "PMI_RANK": "0", "PMI_SIZE": "4", "SLURM_LOCALID": "0"}
    launch = discover_launch(environ)
    assert launch is not None and launch.launcher == "srun"
    hydra = discover_launch({**environ, "MPI_LOCALRANKID": "0"})
    assert hydra is not None and hydra.launcher == "mpirun"


def test_mpirun_on_one_node_of_a_larger_allocation() -> None:
    environ = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "SLURM_NNODES": "2"}
    launch = discover_launch(environ)
    assert launch is not None and launch.host == "127.0.0.1"


def test_a_store_of_this_machine_has_a_name_and_a_token() -> None:
    own = {
        "DWDP_RANK": "0",
        "DWDP_WORLD_SIZE": "2",
        "DWDP_RENDEZVOUS": "unix:dwdp-store-7",
        "DWDP_STORE_TOKEN": "secret",
    }
    launch = discover_launch(own)
    assert launch is not None and launch.store_is_served
    assert (launch.socket, launch.token) == ("dwdp-store-7", "secret")
    assert launch.rendezvous == "unix:dwdp-store-7" and "secret" not in repr(launch)


def test_own_launcher_wins_over_an_allocation_around_it() -> None:
    own = {
        "DWDP_RANK": "2",
        "DWDP_WORLD_SIZE": "3",
        "DWDP_RENDEZVOUS": "127.0.0.1:4000",
        "DWDP_STORE_IS_SERVED": "1",
    }
    assert discover_launch({**SRUN, **own}) == LaunchInfo("dwdp", 2, 3, "127.0.0.1", 4000, True)


def test_an_explicit_rendezvous_wins_over_a_derived_one() -> None:
    launch = discover_launch({**OPEN_MPI, "DWDP_RENDEZVOUS": "node7:1234"})
    assert launch is not None and (launch.host, launch.port) == ("node7", 1234)


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x' .* is not a number"),
        ({"RANK": "0"}, "set no WORLD_SIZE"),
        ({**TORCHRUN, "RANK": "4"}, "rank 4 of 4"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "no MASTER_ADDR"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, "set DWDP_RENDEZVOUS"),
        ({**SRUN, "SLURM_STEP_NUM_NODES": "2"}, "runs on 2 nodes; set DWDP_RENDEZVOUS"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "set DWDP_RENDEZVOUS"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "runs on several nodes; set DWDP_REND"),
        ({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "x"}, "RESTART_COUNT='x' .* is not a number"),
        ({**OPEN_MPI, "DWDP_RENDEZVOUS": "nowhere"}, "DWDP_RENDEZVOUS='nowhere' is not host:port"),
    ],
)
def test_bad_environments_are_named(environ: dict[str, str], text: str) -> None:
    with pytest.raises(LaunchError, match=text):
        discover_launch(environ)


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "host:0", "host:70000", "host:1x"])
def test_bad_addresses(text: str) -> None:
    with pytest.raises(LaunchError, match="is not host:port"):
        parse_address(text, "it")
