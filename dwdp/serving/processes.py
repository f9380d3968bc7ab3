"""The processes of a group that this command starts itself: started, watched, and ended with it."""

from __future__ import annotations

import signal
import subprocess
import time
from types import TracebackType

from dwdp.config import DwdpConfig
from dwdp.local_store import LocalStoreServer
from dwdp.rendezvous import prefixed, report_failure, serve_store
from dwdp.serving.dispatcher import SetupFailed
from dwdp.serving.environment import rank_command, rank_environment
from dwdp.serving.rank import RankJob
from dwdp.serving.rank_exit import EXIT_PEER_FAILED

HOST = "127.0.0.1"
_FINISH_S = 10.0
_FAILURE_S = 2.0
_TERMINATE_S = 2.0
_EXIT_S = 1.0
_POLL_S = 0.02


class RankProcesses:
    """``config.dwdp_size`` processes of this machine that form one group.

    A context manager: on leaving it no process is left. The kernel ends the ranks if this process
    ends without leaving it, so they are to be started from a thread that stays: the main one.

    Args:
        config: of the group.
        port: of a TCPStore on the loopback interface, where any user's processes may connect. 0: the ranks
            meet at a socket that only this group's processes are let into.

    Raises:
        GroupError: the port is taken.
    """

    def __init__(self, config: DwdpConfig, *, port: int = 0) -> None:
        self._config = config
        self._local_store = None if port else LocalStoreServer()
        self._store = self._local_store or serve_store(HOST, port, config.dwdp_size)
        self._port = port
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ended: set[int] = set()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids, in rank order."""
        return tuple(process.pid for process in self._processes)

    def start(
        self,
        model_dir: str,
        *,
        dtype: str,
        device: str,
        num_threads: int,
        dispatcher: str,
        token: str,
    ) -> None:
        """Start every rank.

        Args:
            model_dir, dtype, device: what to load, and where to.
            num_threads: compute threads of each rank.
            dispatcher, token: where each connects, and what it proves itself with.
        """
        rendezvous, store_token = f"{HOST}:{self._port}", ""
        if self._local_store is not None:
            rendezvous, store_token = self._local_store.address, self._local_store.token
        job = RankJob(
            dispatcher=dispatcher,
            token=token,
            model_dir=model_dir,
            dtype=dtype,
            device=device,
            num_threads=num_threads,
            config=self._config.model_dump(),
        )
        for rank in range(self._config.dwdp_size):
            process = subprocess.Popen(
                rank_command("dwdp.serving.rank"),
                env=rank_environment(
                    rank,
                    self._config.dwdp_size,
                    rendezvous=rendezvous,
                    store_token=store_token,
                    incarnation=0,
                    num_threads=num_threads,
                ),
                stdin=subprocess.PIPE,
                stdout=2,  # standard output is the command's own
            )
            self._processes.append(process)
            assert process.stdin is not None
            try:
                process.stdin.write(job.to_json().encode() + b"\n")
                process.stdin.close()
            except BrokenPipeError:  # it has ended already; check() says so
                pass

    def check(self) -> None:
        """For the time of set-up: no rank may have ended.

        Raises:
            SetupFailed: one has. The others are told why.
        """
        for rank, process in enumerate(self._processes):
            code = process.poll()
            if code is None or code == EXIT_PEER_FAILED:
                continue
            # One that ended by itself has sent its reason, which may not have been read yet.
            if code < 0 or rank in self._ended:
                message = f"{_end_of(code)} during set-up"
                report_failure(prefixed(self._store), rank, message)
                raise SetupFailed(f"rank {rank} {message}")
            self._ended.add(rank)
        if all(process.returncode == EXIT_PEER_FAILED for process in self._processes):
            raise SetupFailed("every rank ended during set-up")

    def describe_loss(self, rank: int) -> str:
        """How ``rank``, whose connection has closed, came to its end."""
        try:
            return _end_of(self._processes[rank].wait(_EXIT_S))
        except subprocess.TimeoutExpired:
            return "closed its connection"

    def stop(self, grace_s: float = 0.0) -> None:
        """End every process: wait for ``grace_s`` seconds, then ask, then force. Idempotent."""
        self._wait(grace_s)
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        self._wait(_TERMINATE_S)
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        if self._local_store is not None:
            self._local_store.close()

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.stop(_FINISH_S)
        else:
            self.stop(_FAILURE_S if issubclass(kind, Exception) else 0.0)

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if all(process.poll() is not None for process in self._processes):
                return
            time.sleep(_POLL_S)


def _end_of(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed by {name}"
