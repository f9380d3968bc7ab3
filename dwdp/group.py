"""The ranks of a group find each other, exchange addresses, and fail together while they set up.

Set-up only: nothing here is used by a forward. Addresses go through torch's TCPStore. Every wait is
a poll that also looks for a peer's failure, so that a rank that fails, or dies without a word, ends
the others with its message within seconds.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from dwdp.launch import LaunchInfo, discover_launch

TOKEN_BYTES = 16
_POLL_S = 0.02
_LIVENESS_S = 0.5
_STORE_PREFIX = "dwdp"
_FAILURE = "failure"


class GroupError(RuntimeError):
    """The group could not be set up: no store, no answer in time, or ranks that do not fit together."""


class PeerFailure(GroupError):
    """Another rank failed while the group was set up; the text carries its message."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(f"rank {rank}: {message}")
        self.rank = rank
        self.message = message


@dataclass(frozen=True)
class ProcessIdentity:
    """Names one process for good: a pid alone can be given to another process later."""

    host: str
    pid: int
    start_ticks: int

    @classmethod
    def current(cls) -> ProcessIdentity:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            host = file.read().strip()
        pid = os.getpid()
        start_ticks = _start_ticks(pid)
        assert start_ticks is not None
        return cls(host, pid, start_ticks)

    def is_alive(self) -> bool:
        """Whether the process still runs. Only for a process of this host; a zombie is dead."""
        return _start_ticks(self.pid) == self.start_ticks


def _start_ticks(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


class Group:
    """One rank's view of its group.

    Args:
        rank, size: this rank, and the number of ranks.
        store: a torch store shared by the ranks (TCPStore, or HashStore for a group of one).
        timeout_s: seconds any single wait for the peers may take.

    Raises:
        GroupError: the peers did not answer in time.
    """

    def __init__(self, rank: int, size: int, store: Any, *, timeout_s: float) -> None:
        self.rank = rank
        self.size = size
        self._store = store
        self._timeout_s = timeout_s
        self._num_exchanges: Counter[str] = Counter()
        self._peers: tuple[ProcessIdentity, ...] = ()
        identity = ProcessIdentity.current()
        self._host = identity.host
        identities = self.exchange("process", json.dumps(vars(identity)).encode())
        self._peers = tuple(ProcessIdentity(**json.loads(raw)) for raw in identities)
        token = secrets.token_bytes(TOKEN_BYTES) if rank == 0 else b""
        self.token = self.exchange("token", token)[0]

    @classmethod
    def single(cls) -> Group:
        """A group of one rank, without any store to connect to."""
        from torch.distributed import HashStore

        return cls(0, 1, HashStore(), timeout_s=10.0)

    @classmethod
    def from_launcher(cls, *, timeout_s: float = 600.0) -> Group:
        """The group of this process's launcher (torchrun, mpirun, srun); a group of one without.

        Raises:
            LaunchError, GroupError: as :func:`dwdp.launch.discover_launch` and :meth:`join`.
        """
        launch = discover_launch()
        return cls.single() if launch is None else cls.join(launch, timeout_s=timeout_s)

    @classmethod
    def join(cls, launch: LaunchInfo, *, timeout_s: float) -> Group:
        """Connect to the group that ``launch`` describes; rank 0 serves the store if nobody else does.

        Raises:
            GroupError: the store's port is taken, or the store or a peer did not answer in time.
        """
        from torch.distributed import DistError, PrefixStore, TCPStore

        try:
            if launch.rank == 0 and not launch.store_is_served:
                store = serve_store(launch.host, launch.port, launch.size)
            else:
                store = TCPStore(
                    launch.host,
                    launch.port,
                    is_master=False,
                    timeout=timedelta(seconds=timeout_s),
                )
        except (DistError, RuntimeError) as error:
            if isinstance(error, GroupError):
                raise
            raise GroupError(
                f"rank {launch.rank} could not reach the group's store at "
                f"{launch.host}:{launch.port} within {timeout_s:.0f} s"
            ) from error
        return cls(launch.rank, launch.size, PrefixStore(_STORE_PREFIX, store), timeout_s=timeout_s)

    @property
    def is_one_host(self) -> bool:
        return all(peer.host == self._host for peer in self._peers)

    def exchange(self, key: str, value: bytes) -> list[bytes]:
        """Publish ``value`` under ``key`` and return every rank's value, in rank order.

        A key can be used again: the n-th exchange of it meets the n-th of the peers.

        Raises:
            PeerFailure: a peer failed or died.
            GroupError: a peer did not answer in time.
        """
        numbered = f"{key}#{self._num_exchanges[key]}"
        self._num_exchanges[key] += 1
        keys = [f"{numbered}/{rank}" for rank in range(self.size)]
        with self._store_errors():
            self._store.set(keys[self.rank], value)
            self._wait(keys, key)
            return [self._store.get(key) for key in keys]

    def barrier(self, key: str) -> None:
        """Wait until every rank has come to ``key``. Set-up only."""
        self.exchange(key, b"1")

    def fail(self, message: str) -> None:
        """Tell the peers that this rank's set-up failed. The first rank to fail is the one quoted."""
        report_failure(self._store, self.rank, message)
        self._let_peers_read()

    @contextmanager
    def setting_up(self) -> Iterator[None]:
        """Whatever goes wrong inside ends every rank with this rank's message.

        A peer's failure also interrupts work that does not wait for peers, such as loading weights.

        Raises:
            PeerFailure: a peer failed or died.
        """
        try:
            with _interrupted_by(self._peer_failure):
                yield
        except PeerFailure:
            self._let_peers_read()
            raise
        except BaseException as error:
            self.fail(str(error) or type(error).__name__)
            raise

    def _wait(self, keys: list[str], what: str) -> None:
        deadline = time.monotonic() + self._timeout_s
        next_liveness = time.monotonic() + _LIVENESS_S
        while not self._store.check(keys):
            failure = self._recorded_failure()
            if failure is not None:
                raise failure
            now = time.monotonic()
            if now > next_liveness:
                self._report_deaths(keys)
                next_liveness = now + _LIVENESS_S
            if now > deadline:
                silent = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
                raise GroupError(
                    f"no answer from rank(s) {', '.join(map(str, silent))} within "
                    f"{self._timeout_s:.0f} s (waiting for {what!r}); are all {self.size} ranks started?"
                )
            time.sleep(_POLL_S)

    def _recorded_failure(self) -> PeerFailure | None:
        if not self._store.check([_FAILURE]):
            return None
        failure = json.loads(self._store.get(_FAILURE))
        return PeerFailure(failure["rank"], failure["message"])

    def _peer_failure(self) -> PeerFailure | None:
        """A failure that another rank has recorded; None also when the store cannot be asked."""
        try:
            failure = self._recorded_failure()
        except RuntimeError:
            return None
        return failure if failure is not None and failure.rank != self.rank else None

    def _report_deaths(self, keys: list[str]) -> None:
        """Speak for peers of this host that are dead without having published their key."""
        for rank, peer in enumerate(self._peers):
            if rank == self.rank or peer.host != self._host or peer.is_alive():
                continue
            # A rank that failed properly says so before it ends: its own words come first.
            if not self._store.check([_FAILURE]) and not self._store.check([keys[rank]]):
                report_failure(self._store, rank, f"process {peer.pid} died during set-up")

    def _let_peers_read(self, patience_s: float = 5.0) -> None:
        """Keep a store that lives in this process up until the peers have seen the failure."""
        try:
            self._store.set(f"seen/{self.rank}", b"1")
            keys = [f"seen/{rank}" for rank in range(self.size)]
            deadline = time.monotonic() + patience_s
            while not self._store.check(keys) and time.monotonic() < deadline:
                alive = [peer.is_alive() for peer in self._peers if peer.host == self._host]
                if self._peers and sum(alive) <= 1:
                    return
                time.sleep(_POLL_S)
        except RuntimeError:
            return

    @contextmanager
    def _store_errors(self) -> Iterator[None]:
        try:
            yield
        except GroupError:
            raise
        except RuntimeError as error:
            raise GroupError(
                "the group's store is gone: the process that served it (rank 0, or the launcher) "
                f"ended during set-up ({str(error).splitlines()[0]})"
            ) from error


class _Interrupted(BaseException):
    """Raised in a thread from outside. Not an Exception, so that no library swallows it."""


@contextmanager
def _interrupted_by(find: Callable[[], PeerFailure | None]) -> Iterator[None]:
    """Ask ``find`` every now and then, and raise what it finds in the midst of the body."""
    ended = threading.Event()
    found: list[PeerFailure] = []
    thread_id = ctypes.c_ulong(threading.get_ident())
    raise_in_thread = ctypes.pythonapi.PyThreadState_SetAsyncExc

    def watch() -> None:
        while not ended.wait(_LIVENESS_S):
            failure = find()
            if failure is not None and not ended.is_set():
                found.append(failure)
                raise_in_thread(thread_id, ctypes.py_object(_Interrupted))
                return

    watcher = threading.Thread(target=watch, name="dwdp-set-up", daemon=True)
    watcher.start()
    try:
        try:
            yield
        finally:
            ended.set()
            watcher.join()
            raise_in_thread(thread_id, None)  # Takes one back that has not been raised yet.
    except _Interrupted:
        raise found[0] from None


def report_failure(store: Any, rank: int, message: str) -> None:
    """Record in ``store`` that ``rank`` failed; a failure recorded earlier stays. Never raises."""
    try:
        store.compare_set(_FAILURE, "", json.dumps({"rank": rank, "message": message}))
    except RuntimeError:
        return


def serve_store(host: str, port: int, size: int) -> Any:
    """Serve a TCPStore for ``size`` ranks on ``host:port`` alone, not on every interface.

    ``port`` 0 takes a free one (``store.port`` tells which).

    Raises:
        GroupError: the address is in use or is not this machine's.
    """
    from torch.distributed import TCPStore

    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(address[0], socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address[4])
        listener.listen(128)
    except OSError as error:
        raise GroupError(
            f"cannot serve the group's store on {host}:{port}: {error.strerror or error}. "
            "Choose another port, or 0 for any free one."
        ) from error
    return TCPStore(
        host,
        listener.getsockname()[1],
        world_size=None,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def prefixed(store: Any) -> Any:
    """The part of ``store`` that a group uses, for a launcher that serves the store itself."""
    from torch.distributed import PrefixStore

    return PrefixStore(_STORE_PREFIX, store)
