"""The ranks of a group find each other, exchange addresses, and fail together while they set up.

Set-up only: nothing here is used by a forward. Addresses go through the store of
:mod:`dwdp.rendezvous`. Every wait is a poll that also looks for a peer's failure, so that a rank that
fails, or dies without a word, ends the others with its message within seconds.

A rank that dies later is started again, as its next *incarnation*, and goes through the same exchanges
alone: what survivors published stays in the store, and what the dead one published is replaced. Every
value carries the incarnation that wrote it, so that nobody takes up what a dead process left. Survivors
do nothing. Ranks that rejoin at the same time wait for each other, and their failure ends nobody else:
only one that is not started again is not waited for, if whoever would start it says so.
"""

from __future__ import annotations

import ctypes
import json
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from dwdp.launch import LaunchInfo, discover_launch
from dwdp.process_identity import ProcessIdentity
from dwdp.rendezvous import (
    GroupError,
    PeerFailure,
    connect_store,
    prefixed,
    recorded_failure,
    recorded_loss,
    report_failure,
    serve_store,
)

TOKEN_BYTES = 16
_POLL_S = 0.02
_LIVENESS_S = 0.5
_FAREWELL_S = 5.0
_STORE_PATIENCE_S = 60.0
_FIRST_GROUP = "1/"
_SEEN = "seen"
_IDENTITY = "process"
_TOKEN = "token"


class Group:
    """One rank's view of its group.

    Groups may follow each other on one store: the n-th of every rank meet.

    Args:
        rank, size: this rank, and the number of ranks.
        store: a torch store shared by the ranks (TCPStore, or HashStore for a group of one).
        timeout_s: seconds any single wait for the peers may take.
        serves_store: whether the store ends with this process.
        incarnation: how often this rank was started before; above 0 it takes the place of one that died.

    Raises:
        GroupError: the peers did not answer in time.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        store: Any,
        *,
        timeout_s: float,
        serves_store: bool = False,
        incarnation: int = 0,
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
        self.incarnation = incarnation
        with self._store_errors():
            count = store.add(f"groups/{rank}", 0 if incarnation else 1)
            self._prefix = f"{max(count, 1)}/"
        try:
            identities = self.exchange(_IDENTITY, json.dumps(vars(self._identity)).encode())
            self._peers = tuple(ProcessIdentity(**json.loads(raw)) for raw in identities)
            self.token = self._read_token() if incarnation else self._agree_on_token()
        except PeerFailure:
            seen = self._say_seen()
            if serves_store:
                self._await_quietly(seen)
            raise

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
            PeerFailure: a peer failed, or could not join.
            GroupError: the store's port is taken, or the store or a peer did not answer in time.
        """
        return cls(
            launch.rank,
            launch.size,
            _open_store(launch, min(timeout_s, _STORE_PATIENCE_S)),
            timeout_s=timeout_s,
            serves_store=_serves_store(launch),
            incarnation=launch.incarnation,
        )

    @property
    def local_rank(self) -> int:
        """How many ranks of lower number run on this rank's host."""
        return sum(peer.host == self._identity.host for peer in self._peers[: self.rank])

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
            self._store.set(keys[self.rank], b"%d:%b" % (self.incarnation, value))
            if self.incarnation:
                self._wait_for_current(keys, key)
            else:
                self._wait(keys, key)
            return [_written(self._store.get(key))[1] for key in keys]

    def barrier(self, key: str) -> None:
        """Wait until every rank has come to ``key``. Set-up only."""
        self.exchange(key, b"1")

    def fail(self, message: str, *, bad_input: bool = False) -> None:
        """Tell the peers that this rank's set-up failed. The first rank to fail is the one quoted.

        ``bad_input``: because of what the user gave, not of the machine.
        """
        report_failure(self._store, self.rank, message, bad_input=bad_input)
        self._let_peers_read()

    @contextmanager
    def setting_up(self) -> Iterator[None]:
        """Whatever goes wrong inside ends every rank with this rank's message; a ValueError is bad input.

        A peer's failure or death also interrupts work that does not wait for peers, such as loading
        weights. A block within another one adds nothing, nor does one of a rank that rejoins. Every rank
        enters as many.

        Raises:
            PeerFailure: a peer failed or died.
        """
        if self._is_setting_up or self.incarnation:
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
            bad_input = isinstance(error, ValueError)
            self.fail(str(error) or type(error).__name__, bad_input=bad_input)
            raise
        finally:
            self._is_setting_up = False

    def _wait(self, keys: list[str], what: str) -> None:
        deadline = time.monotonic() + self._timeout_s
        next_liveness = time.monotonic() + _LIVENESS_S
        while not self._store.check(keys):
            failure = recorded_failure(self._store)
            if failure is not None:
                raise failure
            now = time.monotonic()
            if now > next_liveness:
                self._report_deaths(keys)
                next_liveness = now + _LIVENESS_S
            if now > deadline:
                silent = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
                raise self._no_answer(silent, what)
            time.sleep(_POLL_S)

    def _wait_for_current(self, keys: list[str], what: str) -> None:
        """Wait until every key was written by the incarnation of its rank that is alive.

        Raises:
            PeerFailure: one of those that are missing is not started again.
            GroupError: one did not come back, or did not answer, in time.
        """
        deadline = time.monotonic() + self._timeout_s
        while missing := [rank for rank, key in enumerate(keys) if not self._is_current(rank, key)]:
            for rank in missing:
                failure = recorded_loss(self._store, rank)
                if failure is not None:
                    raise failure
            if time.monotonic() > deadline:
                raise self._did_not_come_back(missing, what)
            time.sleep(_POLL_S)

    def _is_current(self, rank: int, key: str) -> bool:
        if not self._store.check([key]):
            return False
        incarnation = self._living_incarnation(rank)
        return incarnation is not None and _written(self._store.get(key))[0] == incarnation

    def _living_incarnation(self, rank: int) -> int | None:
        """Of the process that took ``rank``'s place last; None if it is dead, or there was none."""
        identity_key = f"{self._prefix}{_IDENTITY}#0/{rank}"
        if not self._store.check([identity_key]):
            return None
        incarnation, described = _written(self._store.get(identity_key))
        peer = ProcessIdentity(**json.loads(described))
        is_alive = not peer.is_visible_to(self._identity) or peer.is_alive()
        return incarnation if is_alive else None

    def _did_not_come_back(self, ranks: list[int], what: str) -> GroupError:
        dead = [rank for rank in ranks if self._living_incarnation(rank) is None]
        if not dead:
            return self._no_answer(ranks, what)
        names = ", ".join(map(str, dead))
        return GroupError(
            f"rank {self.rank} cannot rejoin: rank(s) {names} died as well and did not come back within "
            f"{self._timeout_s:.0f} s; start them too, or the whole group anew"
        )

    def _no_answer(self, ranks: list[int], what: str) -> GroupError:
        return GroupError(
            f"no answer from rank(s) {', '.join(map(str, ranks))} within {self._timeout_s:.0f} s "
            f"(waiting for {what!r}); are all {self.size} ranks started?"
        )

    def _agree_on_token(self) -> bytes:
        token = secrets.token_bytes(TOKEN_BYTES) if self.rank == 0 else b""
        return self.exchange(_TOKEN, token)[0]

    def _read_token(self) -> bytes:
        """The group's token, which outlives the rank that chose it."""
        with self._store_errors():
            key = f"{self._prefix}{_TOKEN}#0/0"
            if not self._store.check([key]):
                raise GroupError(
                    f"rank {self.rank} cannot rejoin (DWDP_INCARNATION is {self.incarnation}): its group "
                    "was never set up"
                )
            return _written(self._store.get(key))[1]

    def _peer_failure(self, finished: str) -> PeerFailure | None:
        """Why another rank cannot end the set-up whose end ranks publish under ``finished``."""
        try:
            self._report_deaths([f"{finished}/{rank}" for rank in range(self.size)])
            failure = recorded_failure(self._store)
        except RuntimeError:  # The store is gone; the next exchange says so.
            return None
        return failure if failure is not None and failure.rank != self.rank else None

    def _report_deaths(self, keys: list[str]) -> None:
        """Speak for peers that are dead without having published their key."""
        for rank, peer in enumerate(self._peers):
            if not peer.is_visible_to(self._identity) or peer.is_alive():
                continue
            # A rank that failed properly says so before it ends: its own words come first.
            if not self._store.check([keys[rank]]):
                report_failure(self._store, rank, f"process {peer.pid} died during set-up")

    def _let_peers_read(self) -> None:
        """Keep a store that lives in this process up until the peers have seen the failure."""
        self._await_quietly(self._say_seen())

    def _say_seen(self) -> str:
        """Publish that this rank knows of the failure; returns the key. Never raises."""
        key = f"{self._prefix}{_SEEN}"
        with suppress(RuntimeError):
            self._store.set(f"{key}/{self.rank}", b"1")
        return key

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


def _written(raw: bytes) -> tuple[int, bytes]:
    """The incarnation that wrote a value, and the value."""
    incarnation, _, value = raw.partition(b":")
    return int(incarnation), value


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


def fail_before_joining(launch: LaunchInfo, message: str, *, bad_input: bool) -> None:
    """End the group that ``launch`` describes, because this rank cannot join it. Never raises.

    The others get ``message`` as a :class:`PeerFailure` when they join. Returns when they have. Those that
    joined before are given a few seconds, the others as long as they would wait for the store: a slow
    machine starts them well after this rank.
    """
    start = time.monotonic()
    try:
        store = _open_store(launch, _STORE_PATIENCE_S)
        report_failure(store, launch.rank, message, bad_input=bad_input)
        store.set(f"{_FIRST_GROUP}{_SEEN}/{launch.rank}", b"1")
        joined_s = time.monotonic() + _FAREWELL_S
        while time.monotonic() < start + _STORE_PATIENCE_S:
            awaited = [_SEEN] if time.monotonic() < joined_s else [_SEEN, f"{_IDENTITY}#0"]
            if all(_has_any(store, awaited, rank) for rank in range(launch.size)):
                return
            time.sleep(_POLL_S)
    except RuntimeError:
        return


def _has_any(store: Any, names: list[str], rank: int) -> bool:
    """Whether ``rank`` has published one of ``names`` to its first group."""
    return any(store.check([f"{_FIRST_GROUP}{name}/{rank}"]) for name in names)


def _open_store(launch: LaunchInfo, patience_s: float) -> Any:
    if _serves_store(launch):
        store = serve_store(launch.host, launch.port, launch.size)
    else:
        store = connect_store(launch, patience_s)
    return prefixed(store, launch.attempt)


def _serves_store(launch: LaunchInfo) -> bool:
    return launch.rank == 0 and not launch.store_is_served
