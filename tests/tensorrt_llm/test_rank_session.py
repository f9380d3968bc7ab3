"""The process that runs one rank's worker: its environment, its answer, its end."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dwdp.engines.tensorrt_llm.executor import start_together
from dwdp.engines.tensorrt_llm.rank_session import RankProcessError, RankSession
from dwdp.rendezvous import PeerFailure

TIMEOUT_S = 60
ROOT = Path(__file__).parents[2]


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, **variables}


def read_environment(name: str) -> tuple[str | None, int]:
    return os.environ.get(name), os.getpid()


def fail(error: BaseException) -> None:
    raise error


class UnpicklableError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def fail_unpicklably() -> None:
    raise UnpicklableError(1, 2)


def end_by_signal() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep() -> None:
    time.sleep(600)


def test_a_task_runs_in_a_process_with_its_own_environment() -> None:
    sessions = [RankSession(environment(DWDP_TEST_VALUE=str(number))) for number in range(2)]
    futures = [session.submit(read_environment, "DWDP_TEST_VALUE")[0] for session in sessions]
    values = [future.result(TIMEOUT_S) for future in futures]
    assert [value for value, _ in values] == ["0", "1"]
    assert len({os.getpid(), *(pid for _, pid in values)}) == 3
    for session in sessions:
        session.shutdown()
        session.shutdown_abort()  # Both may be called, in any order.


def test_what_a_task_raises_is_raised_here() -> None:
    session = RankSession(environment())
    with pytest.raises(ValueError, match="no such model"):
        session.submit_sync(fail, ValueError("no such model"))
    with pytest.raises(RuntimeError, match="one task"):
        session.submit(fail, ValueError())
    session.shutdown()


def test_a_peers_failure_travels_whole() -> None:
    session = RankSession(environment())
    with pytest.raises(PeerFailure, match="rank 3: no such model") as failed:
        session.submit_sync(fail, PeerFailure(3, "no such model", bad_input=True))
    assert (failed.value.rank, failed.value.bad_input) == (3, True)
    session.shutdown()


def test_an_error_that_does_not_travel_is_told_in_words() -> None:
    session = RankSession(environment())
    with pytest.raises(RankProcessError, match="UnpicklableError: 1 and 2"):
        session.submit_sync(fail_unpicklably)
    session.shutdown()


def test_a_process_that_is_killed_fails_its_task() -> None:
    session = RankSession(environment())
    with pytest.raises(RankProcessError, match=r"process \d+ was ended by SIGKILL"):
        session.submit_sync(end_by_signal)
    session.shutdown()


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM, None])
def test_ends_are_seen_where_processes_have_no_descriptors(
    error: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux before 5.3, a container that denies the call, a Python that was built without it."""

    def denied(pid: int) -> int:
        raise OSError(error, "denied")

    if error is None:
        monkeypatch.delattr(os, "pidfd_open")
    else:
        monkeypatch.setattr(os, "pidfd_open", denied)
    answering, dying = RankSession(environment()), RankSession(environment())
    (answer,) = answering.submit(read_environment, "HOME")
    (death,) = dying.submit(end_by_signal)
    assert answer.result(TIMEOUT_S)[1] != os.getpid()
    assert "was ended by SIGKILL" in str(death.exception(TIMEOUT_S))
    for session in (answering, dying):
        session.shutdown()


def test_a_process_that_does_not_end_is_killed() -> None:
    session = RankSession(environment())
    (future,) = session.submit(sleep)
    session.shutdown_abort(grace=0.1)
    assert isinstance(future.exception(TIMEOUT_S), RankProcessError)


UNGUARDED = """
import os
from types import SimpleNamespace
from dwdp.engines.tensorrt_llm import executor
from dwdp.engines.tensorrt_llm.rank_session import RankSession

class GenerationExecutor:
    create = staticmethod(lambda engine, llm_args: None)

executor.patch(SimpleNamespace(GenerationExecutor=GenerationExecutor))
llm_args = SimpleNamespace(parallel="dwdp", dwdp_config={}, env_overrides={})
GenerationExecutor.create("engine", llm_args=llm_args)
print(RankSession(os.environ).submit_sync(len, "abc"))
"""


def test_a_main_program_without_a_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(UNGUARDED)
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
    )
    assert done.returncode == 1
    assert "keep what it does under if __name__ == '__main__':" in done.stderr


class _Started:
    """What an executor would be, as far as starting goes."""

    def __init__(self) -> None:
        self.is_shut_down = False

    def shutdown(self) -> None:
        self.is_shut_down = True


def test_ranks_start_at_the_same_time() -> None:
    together = threading.Barrier(3)

    def start(number: int, session: Any) -> int:
        together.wait(TIMEOUT_S)
        return number

    sessions = [RankSession({}) for _ in range(3)]
    assert start_together(sessions, start) == [0, 1, 2]


def test_the_rank_that_failed_first_is_the_one_that_is_quoted() -> None:
    """Its peers fail because of it, and what started already is ended."""
    started = _Started()

    def start(number: int, session: Any) -> _Started:
        if number == 0:
            raise RuntimeError("worker returned error") from PeerFailure(1, "no such model")
        if number == 1:
            raise RuntimeError("worker returned error") from ValueError("no such model")
        return started

    with pytest.raises(RuntimeError, match="rank 1 could not start: no such model"):
        start_together([RankSession({}) for _ in range(3)], start)
    assert started.is_shut_down


def test_ranks_that_wait_for_one_that_died_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    from dwdp.engines.tensorrt_llm import executor

    monkeypatch.setattr(executor, "_FAREWELL_S", 0.2)

    def start(number: int, session: RankSession) -> None:
        (future,) = session.submit(end_by_signal if number else sleep)
        if future.exception(TIMEOUT_S) is not None:
            raise RuntimeError("Executor worker died during initialization")

    sessions = [RankSession(environment()) for _ in range(2)]
    with pytest.raises(RuntimeError, match=r"rank 1 could not start: process \d+ was ended by"):
        start_together(sessions, start)
    for session in sessions:
        session.shutdown()
