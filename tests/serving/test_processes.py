"""Rank processes for real: they live and die with their parent, and not with each other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from checkpoints import make_checkpoint

from dwdp.config import DwdpConfig
from dwdp.serving.dispatcher import BadInput, Dispatcher, Outcome, SetupFailed
from dwdp.serving.environment import rank_environment
from dwdp.serving.messages import Completion, Request
from dwdp.serving.processes import RankProcesses
from dwdp.serving.schedule import MAX_IN_FLIGHT

NUM_RANKS = 3


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("model"))


@contextmanager
def started(
    model_dir: Path | str, config: DwdpConfig
) -> Iterator[tuple[RankProcesses, Dispatcher]]:
    with RankProcesses(config) as processes:
        size = config.dwdp_size
        with Dispatcher(size, describe_loss=processes.describe_loss) as dispatcher:
            processes.start(
                str(model_dir),
                dtype="auto",
                device="cpu",
                num_threads=1,
                dispatcher=dispatcher.name,
                token=dispatcher.token,
            )
            yield processes, dispatcher


def requests(count: int, num_tokens: int) -> list[Request]:
    return [
        Request(index, tuple(range(3, 9 + index)), num_tokens, 0.0, index) for index in range(count)
    ]


def tokens(outcome: Outcome) -> list[tuple[int, ...]]:
    return [completion.token_ids for _, completion in outcome.completions]


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_ranks_stop_and_die_and_the_others_go_on(model_dir: Path) -> None:
    config = DwdpConfig(dwdp_size=NUM_RANKS, fetch_mode="staged")
    asked = requests(14, 12)
    with started(model_dir, config) as (processes, dispatcher):
        dispatcher.wait_until_ready(processes.check)
        pids = processes.pids
        undisturbed = dispatcher.run(asked)
        assert {rank for rank, _ in undisturbed.completions} == set(range(NUM_RANKS))

        # A stopped rank withholds what it holds, and all others are finished meanwhile.
        finished: list[Completion] = []

        def stop_one(completion: Completion) -> None:
            finished.append(completion)
            if len(finished) == len(asked) - MAX_IN_FLIGHT:
                os.kill(pids[1], signal.SIGCONT)

        os.kill(pids[1], signal.SIGSTOP)
        stopped = dispatcher.run(asked, on_completion=stop_one)
        assert tokens(stopped) == tokens(undisturbed)
        assert stopped.lost == ()
        late = {completion.index for completion in finished[-MAX_IN_FLIGHT:]}
        assert late == {completion.index for rank, completion in stopped.completions if rank == 1}

        # A killed rank's prompts go to the others, which still read the experts it stored.
        finished.clear()

        def kill_one(completion: Completion) -> None:
            if not finished:
                os.kill(pids[2], signal.SIGKILL)
            finished.append(completion)

        killed = dispatcher.run(asked, on_completion=kill_one)
        assert tokens(killed) == tokens(undisturbed)
        assert [(loss.rank, loss.reason) for loss in killed.lost] == [(2, "was killed by SIGKILL")]
        assert killed.counters[0].num_prompts > undisturbed.counters[0].num_prompts
        dispatcher.finish()
    assert all(is_gone(pid) for pid in pids)


def test_a_rank_killed_during_set_up_ends_all_with_its_message(model_dir: Path) -> None:
    config = DwdpConfig(dwdp_size=2)
    with started(model_dir, config) as (processes, dispatcher):
        pids = processes.pids
        os.kill(pids[1], signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(SetupFailed, match=r"^rank 1 was killed by SIGKILL during set-up$"):
            dispatcher.wait_until_ready(processes.check)
    assert time.monotonic() - killed < 10
    assert all(is_gone(pid) for pid in pids)


def test_what_a_rank_finds_wrong_with_the_input_is_quoted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with started(tmp_path / "none", DwdpConfig(dwdp_size=1)) as (processes, dispatcher):
        with pytest.raises(BadInput, match=rf"^rank 0: {tmp_path}/none is not a directory"):
            dispatcher.wait_until_ready(processes.check)
    assert capfd.readouterr().err == ""


def test_the_environment_of_another_launcher_is_not_handed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (
        "RANK",
        "OMPI_COMM_WORLD_RANK",
        "SLURM_PROCID",
        "TORCHELASTIC_RUN_ID",
        "DWDP_RANK",
    ):
        monkeypatch.setenv(name, "77")
    monkeypatch.setenv("HF_HOME", "/hf")
    environment = rank_environment(1, 2, rendezvous="127.0.0.1:1", incarnation=0, num_threads=3)
    assert "77" not in environment.values()
    assert environment["HF_HOME"] == "/hf"
    assert environment["DWDP_RANK"] == "1"
    assert environment["OMP_NUM_THREADS"] == "3"


PARENT = """
import sys, time
from dwdp.config import DwdpConfig
from dwdp.serving.processes import RankProcesses
processes = RankProcesses(DwdpConfig(dwdp_size=2))
processes.start("nowhere", dtype="auto", device="cpu", num_threads=1, dispatcher="nobody", token="")
print(*processes.pids, flush=True)
time.sleep(60)
"""


def test_ranks_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    parent = psutil.Popen(
        [sys.executable, "-c", PARENT],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    try:
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        os.kill(pids[0], signal.SIGSTOP)  # early: it has not asked the kernel for anything yet
    finally:
        parent.kill()
        parent.wait()
    os.kill(pids[0], signal.SIGCONT)
    deadline = time.monotonic() + 10
    while not all(is_gone(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(is_gone(pid) for pid in pids)
