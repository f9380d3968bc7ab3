"""Where the ranks of a group meet: a store, served or connected to, and the failure recorded in it.

Ranks that dwdp starts itself meet at a :class:`~dwdp.local_store.LocalStoreServer` of the process that
starts them; ranks of a launcher, who may be on several hosts, at a TCPStore.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

from dwdp.launch import LaunchInfo
from dwdp.local_store import LocalStoreClient, PrefixedStore

_POLL_S = 0.02
_HANDSHAKE_S = 8.0
_STORE_PREFIX = "dwdp"
_FAILURE = "failure"
_GONE = "gone"


class GroupError(RuntimeError):
    """The group could not be set up: no store, no answer in time, or ranks that do not fit together."""


class PeerFailure(GroupError):
    """Another rank failed while the group was set up; the text carries its message.

    Attributes:
        rank, message: who failed, and what it said.
        bad_input: whether it failed because of what the user gave it (a ValueError there).
    """

    def __init__(self, rank: int, message: str, *, bad_input: bool = False) -> None:
        super().__init__(f"rank {rank}: {message}")
        self.rank = rank
        self.message = message
        self.bad_input = bad_input

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(PeerFailure, bad_input=self.bad_input), (self.rank, self.message)


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


def connect_store(launch: LaunchInfo, patience_s: float) -> Any:
    """The group's store, which may be served a little later than this process starts.

    Whether anybody listens is asked first: a TCPStore waits much longer than its timeout for a port
    that is not open, or that another program listens on.

    Raises:
        GroupError: nothing listens there within ``patience_s`` seconds, or it is no such store.
    """
    if launch.socket:
        return _connect_local_store(launch)
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


def _connect_local_store(launch: LaunchInfo) -> LocalStoreClient:
    # It was there before this process was started.
    try:
        return LocalStoreClient(launch.socket, launch.token)
    except (OSError, RuntimeError) as error:
        raise GroupError(
            f"rank {launch.rank} cannot reach the group's store {launch.socket}: {error}. Does the process "
            "that started this rank still run?"
        ) from error


def prefixed(store: Any, attempt: int = 0) -> PrefixedStore:
    """The part of ``store`` that the ranks of one attempt use (a launcher may start them again)."""
    return PrefixedStore(f"{_STORE_PREFIX}/{attempt}", store)


def report_failure(store: Any, rank: int, message: str, *, bad_input: bool = False) -> None:
    """Record in ``store`` that ``rank`` failed; a failure recorded earlier stays. Never raises."""
    failure = {"rank": rank, "message": message, "bad_input": bad_input}
    with suppress(RuntimeError):
        store.compare_set(_FAILURE, "", json.dumps(failure))


def recorded_failure(store: Any) -> PeerFailure | None:
    """The failure that was recorded first in ``store``, if any.

    Raises:
        RuntimeError: the store is gone.
    """
    if not store.check([_FAILURE]):
        return None
    failure = json.loads(store.get(_FAILURE))
    return PeerFailure(failure["rank"], failure["message"], bad_input=failure["bad_input"])


def report_loss(store: Any, rank: int, message: str) -> None:
    """Record that ``rank`` died and is not started again in this group. Never raises.

    Ranks that rejoin do not wait for it any more.
    """
    with suppress(RuntimeError):
        store.set(f"{_GONE}/{rank}", message)


def recorded_loss(store: Any, rank: int) -> PeerFailure | None:
    """Why ``rank`` never comes back, if that was recorded in ``store``."""
    key = f"{_GONE}/{rank}"
    if not store.check([key]):
        return None
    return PeerFailure(rank, f"{store.get(key).decode()}; it is not started again")
