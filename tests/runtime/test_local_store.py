"""The store that only the group's own processes reach: what it does, and whom it lets in."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore

from dwdp.group import Group
from dwdp.launch import LaunchInfo, discover_launch
from dwdp.local_store import LocalStoreClient, LocalStoreServer, PrefixedStore
from dwdp.rendezvous import GroupError, prefixed
from dwdp.serving.environment import rank_environment


@pytest.fixture(scope="module")
def server() -> Iterator[LocalStoreServer]:
    store = LocalStoreServer()
    yield store
    store.close()


def launch_of(server: LocalStoreServer, rank: int, size: int, token: str = "") -> LaunchInfo:
    environ = rank_environment(
        rank,
        size,
        rendezvous=server.address,
        store_token=token or server.token,
        incarnation=0,
        num_threads=None,
    )
    launch = discover_launch(environ)
    assert launch is not None and launch.rendezvous == server.address
    return launch


EXAMPLES = itertools.count()
KEYS = st.sampled_from(["a", "b", "ü\n"])
VALUES = st.binary(min_size=1, max_size=5)
OPERATIONS = st.one_of(
    st.tuples(st.just("set"), KEYS, VALUES),
    st.tuples(st.just("check"), st.lists(KEYS, min_size=1, max_size=3)),
    st.tuples(st.just("add"), st.sampled_from(["n", "m"]), st.integers(-5, 5)),
    st.tuples(
        st.just("compare_set"), KEYS, st.sampled_from(["", "x"]), st.sampled_from(["x", "y"])
    ),
)


@given(st.lists(OPERATIONS, max_size=20))
def test_it_does_what_torchs_store_does(
    server: LocalStoreServer, operations: list[tuple[Any, ...]]
) -> None:
    client = LocalStoreClient(server.name, server.token)
    ours = PrefixedStore(f"example {next(EXAMPLES)}", client)
    torchs = HashStore()
    seen: set[str] = set()
    for operation, *arguments in operations:
        key = arguments[0]
        if operation == "compare_set" and key not in seen and arguments[1]:
            continue  # torch answers with the expected value, which nobody has set
        expected = getattr(torchs, operation)(*arguments)
        assert getattr(ours, operation)(*arguments) == expected, (operation, arguments)
        if operation != "check":
            seen.add(key)
    for key in seen:
        assert ours.get(key) == torchs.get(key)
    client.close()


def test_a_key_that_is_not_there_is_an_error_and_the_connection_stays(
    server: LocalStoreServer,
) -> None:
    client = LocalStoreClient(server.name, server.token)
    for store in (client, server):
        with pytest.raises(RuntimeError, match="no 'nowhere'"):
            store.get("nowhere")
    client.set("here", "x")
    assert server.get("here") == b"x"
    client.close()


def test_additions_of_many_clients_are_not_lost(server: LocalStoreServer) -> None:
    def add(_: int) -> None:
        client = LocalStoreClient(server.name, server.token)
        for _ in range(50):
            client.add("total", 1)
        client.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(8)))
    assert server.add("total", 0) == 400


def test_a_wrong_token_is_refused(server: LocalStoreServer) -> None:
    with pytest.raises(RuntimeError, match="refuses this process's token"):
        LocalStoreClient(server.name, "0" * 32)
    with pytest.raises(GroupError, match=r"cannot reach the group's store .* token"):
        Group.join(launch_of(server, 0, 1, token="0" * 32), timeout_s=5)


@pytest.mark.parametrize(
    "sent", [b'["set", "stolen", "eA=="]\n', b"GET / HTTP/1.1\r\n\r\n", b"\xff\xfe\n", b"{}\n", b""]
)
def test_nothing_is_done_for_a_client_without_a_token(
    server: LocalStoreServer, sent: bytes
) -> None:
    with socket.socket(socket.AF_UNIX) as guest:
        guest.settimeout(20)
        guest.connect(f"\0{server.name}")
        guest.sendall(sent + b'["set", "stolen", "eA=="]\n')
        guest.shutdown(socket.SHUT_WR)
        answer = guest.makefile("rb").read()
    assert b'"value"' not in answer
    assert not server.check(["stolen"])


STRANGER = """
import os, socket, sys
os.setgid(65534); os.setuid(65534)
with socket.socket(socket.AF_UNIX) as guest:
    guest.settimeout(20)
    guest.connect("\\0" + sys.argv[1])
    try:
        guest.sendall(b'["%s"]\\n["set", "stolen", "eA=="]\\n' % sys.argv[2].encode())
        sys.exit(len(guest.recv(1)))
    except (BrokenPipeError, ConnectionResetError):
        sys.exit(0)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_users_process_is_let_in_by_neither_side(server: LocalStoreServer) -> None:
    arguments = [sys.executable, "-c", STRANGER, server.name, server.token]
    assert subprocess.run(arguments, timeout=60).returncode == 0
    assert not server.check(["stolen"])


def test_a_client_does_not_talk_to_another_users_server(
    server: LocalStoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dwdp.local_store.is_own_user", lambda connection: False)
    with pytest.raises(PermissionError, match="another user's process"):
        LocalStoreClient(server.name, server.token)


def test_ranks_meet_and_hear_of_a_failure(server: LocalStoreServer) -> None:
    def join(rank: int) -> Group:
        return Group.join(launch_of(server, rank, 3), timeout_s=30)

    with ThreadPoolExecutor(3) as pool:
        groups = list(pool.map(join, range(3)))
        assert len({group.token for group in groups}) == 1
        met = pool.map(lambda group: group.exchange("x", bytes([group.rank, 0xFF])), groups)
        assert list(met) == [[b"\0\xff", b"\1\xff", b"\2\xff"]] * 3
    groups[1].fail("the checkpoint is corrupt")
    with pytest.raises(GroupError, match="rank 1: the checkpoint is corrupt"):
        groups[0].barrier("next")


def test_a_store_that_is_gone_is_an_error(wait_for_threads: Callable[[], None]) -> None:
    store = LocalStoreServer()
    launch = launch_of(store, 0, 1)
    group = Group.join(launch, timeout_s=5)
    prefixed(store).set("x", "y")
    store.close()
    store.close()
    with pytest.raises(GroupError, match="store is gone"):
        group.barrier("next")
    with pytest.raises(GroupError, match="Does the process that started this rank still run"):
        Group.join(launch, timeout_s=5)
    wait_for_threads()


@pytest.fixture
def wait_for_threads() -> Callable[[], None]:
    before = threading.active_count()

    def wait() -> None:
        for _ in range(200):
            if threading.active_count() <= before:
                return
            threading.Event().wait(0.05)
        raise AssertionError(f"threads are left: {threading.enumerate()}")

    return wait
