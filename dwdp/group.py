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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from dwdp.launch import LaunchInfo, discover_launch

TOKEN_BYTES = 16
_POLL_S = 0.02
_LIVENESS_S = 0.5
_FAREWELL_S = 5.0
_HANDSHAKE_S = 8.0
_STORE_PATIENCE_S = 60.0
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
    """Names one process for good: a pid alone can be given to another process later.

    Attributes:
        host: names this boot of this machine.
        pid_namespace: where ``pid`` means something; containers of one host have different ones.
        start_ticks: when the process started.
    """

    host: str
    pid_namespace: int
    pid: int
    start_ticks: int

    @classmethod
    def current(cls) -> ProcessIdentity:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            host = file.read().strip()
        pid = os.getpid()
        start_ticks = _start_ticks(pid)
        assert start_ticks is not None
        return cls(host, os.stat("/proc/self/ns/pid").st_ino, pid, start_ticks)

    def is_visible_to(self, other: ProcessIdentity) -> bool:
        """Whether ``other`` can tell if this process is alive."""
        return (self.host, self.pid_namespace) == (other.host, other.pid_namespace)

    def is_alive(self) -> bool:
        """Whether the process, which must be visible to this one, still runs. A zombie is dead."""
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

    Groups may follow each other on one store: the n-th of every rank meet.

    Args:
        rank, size: this rank, and the number of ranks.
        store: a torch store shared by the ranks (TCPStore, or HashStore for a group of one).
        timeout_s: seconds any single wait for the peers may take.
        serves_store: whether the store ends with this process.

    Raises:
        GroupError: the peers did not answer in time.
    """

    def __init__(
        self, rank: int, size: int, store: Any, *, timeout_s: float, serves_store: bool = False
    ) -> None:
        self.rank = rank
        self.size = size
        self._store = store
        self._timeout_s = timeout_s
        self._serves_store = serves_store
        self._num_exchanges: Counter[str] = Counter()
        self._num_set_ups = 0
        self._is_setting_up = False
        self._peers: tuple[ProcessIdentity, ...] = ()
        self._identity = ProcessIdentity.current()
        with self._store_errors():
            self._prefix = f"{store.add(f'groups/{rank}', 1)}/"
        identities = self.exchange("process", json.dumps(vars(self._identity)).encode())
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
        serves_store = launch.rank == 0 and not launch.store_is_served
        if serves_store:
            store = serve_store(launch.host, launch.port, launch.size)
        else:
            store = _connect_store(launch, min(timeout_s, _STORE_PATIENCE_S))
        return cls(
            launch.rank,
            launch.size,
            prefixed(store, launch.attempt),
            timeout_s=timeout_s,
            serves_store=serves_store,
        )

    @property
    def is_one_host(self) -> bool:
        return all(peer.host == self._identity.host for peer in self._peers)

    def exchange(self, key: str, value: bytes) -> list[bytes]:
        """Publish ``value`` under ``key`` and return every rank's value, in rank order.

        A key can be used again: the n-th exchange of it meets the n-th of the peers.

        Raises:
            PeerFailure: a peer failed or died.
            GroupError: a peer did not answer in time.
        """
        numbered = f"{self._prefix}{key}#{self._num_exchanges[key]}"
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

        A peer's failure or death also interrupts work that does not wait for peers, such as loading
        weights. A block within another one adds nothing. Every rank enters as many.

        Raises:
            PeerFailure: a peer failed or died.
        """
        if self._is_setting_up:
            yield
            return
        self._is_setting_up = True
        finished = f"{self._prefix}set-up#{self._num_set_ups}"
        self._num_set_ups += 1
        try:
            with _interrupted_by(lambda: self._peer_failure(finished)):
                yield
            with self._store_errors():
                self._store.set(f"{finished}/{self.rank}", b"1")
            if self._serves_store:
                self._await_quietly(finished)
        except PeerFailure:
            self._let_peers_read()
            raise
        except BaseException as error:
            self.fail(str(error) or type(error).__name__)
            raise
        finally:
            self._is_setting_up = False

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

    def _peer_failure(self, finished: str) -> PeerFailure | None:
        """Why another rank cannot end the set-up whose end ranks publish under ``finished``."""
        try:
            self._report_deaths([f"{finished}/{rank}" for rank in range(self.size)])
            failure = self._recorded_failure()
        except RuntimeError:  # The store is gone; the next exchange says so.
            return None
        return failure if failure is not None and failure.rank != self.rank else None

    def _report_deaths(self, keys: list[str]) -> None:
        """Speak for peers that are dead without having published their key."""
        for rank, peer in enumerate(self._peers):
            if not peer.is_visible_to(self._identity) or peer.is_alive():
                continue
            # A rank that failed properly says so before it ends: its own words come first.
            if not self._store.check([_FAILURE]) and not self._store.check([keys[rank]]):
                report_failure(self._store, rank, f"process {peer.pid} died during set-up")

    def _let_peers_read(self) -> None:
        """Keep a store that lives in this process up until the peers have seen the failure."""
        seen = f"{self._prefix}seen"
        try:
            self._store.set(f"{seen}/{self.rank}", b"1")
        except RuntimeError:
            return
        self._await_quietly(seen)

    def _await_quietly(self, key: str) -> None:
        """Wait a few seconds at most for every living peer to publish ``key``. Never raises."""
        deadline = time.monotonic() + _FAREWELL_S
        try:
            while time.monotonic() < deadline:
                missing = [r for r in range(self.size) if not self._store.check([f"{key}/{r}"])]
                if not any(self._may_be_alive(rank) for rank in missing):
                    return
                time.sleep(_POLL_S)
        except RuntimeError:
            return

    def _may_be_alive(self, rank: int) -> bool:
        if rank == self.rank:
            return False
        if not self._peers:
            return True
        peer = self._peers[rank]
        return not peer.is_visible_to(self._identity) or peer.is_alive()

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


def _connect_store(launch: LaunchInfo, patience_s: float) -> Any:
    """The group's store, which may be served a little later than this process starts.

    Whether anybody listens is asked first: a TCPStore waits much longer than its timeout for a port
    that is not open, or that another program listens on.
    """
    from torch.distributed import TCPStore

    where = f"{launch.host}:{launch.port}"
    deadline = time.monotonic() + patience_s
    while True:
        left_s = max(deadline - time.monotonic(), 0.1)
        try:
            with socket.create_connection((launch.host, launch.port), timeout=left_s):
                break
        except OSError as error:
            if time.monotonic() >= deadline:
                raise GroupError(
                    f"rank {launch.rank} could not reach the group's store at {where} within "
                    f"{patience_s:.0f} s: {error.strerror or error}. Did rank 0 start?"
                ) from error
            time.sleep(_POLL_S)
    connected: list[Any] = []

    def connect() -> None:
        timeout = timedelta(seconds=patience_s)
        with suppress(RuntimeError):
            connected.append(TCPStore(launch.host, launch.port, is_master=False, timeout=timeout))

    # In a thread, because the handshake has no time limit of its own.
    thread = threading.Thread(target=connect, name="dwdp-store", daemon=True)
    thread.start()
    thread.join(_HANDSHAKE_S)
    if not connected:
        raise GroupError(
            f"rank {launch.rank}: what listens on {where} does not answer as the group's store; "
            "is the port taken by another program?"
        )
    return connected[0]


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


def prefixed(store: Any, attempt: int = 0) -> Any:
    """The part of ``store`` that the ranks of one attempt use (a launcher may start them again)."""
    from torch.distributed import PrefixStore

    return PrefixStore(f"{_STORE_PREFIX}/{attempt}", store)
