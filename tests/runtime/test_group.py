"""Set-up: ranks find each other, and the failure or death of one ends all with its message."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from ranks import run_ranks

import dwdp.group as group_module
from dwdp.group import Group, fail_before_joining
from dwdp.launch import LaunchInfo
from dwdp.process_identity import ProcessIdentity
from dwdp.rendezvous import GroupError, PeerFailure, prefixed, report_failure, serve_store

MEMBER = """
import os, signal, sys, time
from dwdp.group import Group
from dwdp.launch import discover_launch
from dwdp.rendezvous import PeerFailure
launch = discover_launch()
group = Group.join(launch, timeout_s=60)
action = sys.argv[1] if launch.rank == 1 else "wait"
try:
    with group.setting_up():
        group.barrier("joined")
        if action == "refuse":
            raise ValueError("the checkpoint is corrupt")
        if action == "fail":
            raise RuntimeError("the checkpoint is corrupt")
        if action == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        group.barrier("done")
except PeerFailure as failure:
    print(failure)
    sys.exit(4 if failure.bad_input else 3)
print("ok", group.is_one_host, group.token.hex())
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_members(size: int, action: str, *, served: bool) -> tuple[list[int], list[str], float]:
    """Exit codes, outputs, and the seconds from the last start to the last end."""
    store = serve_store("127.0.0.1", 0, size) if served else None
    port = store.port if store is not None else free_port()
    members = []
    for rank in range(size):
        environ = {
            **os.environ,
            "DWDP_RANK": str(rank),
            "DWDP_WORLD_SIZE": str(size),
            "DWDP_RENDEZVOUS": f"127.0.0.1:{port}",
            "DWDP_STORE_IS_SERVED": "1" if served else "0",
        }
        members.append(
            subprocess.Popen(
                [sys.executable, "-c", MEMBER, action],
                env=environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    started = time.monotonic()
    outputs = []
    for member in members:
        out, err = member.communicate(timeout=60)
        outputs.append(out + err)
    return [member.returncode for member in members], outputs, time.monotonic() - started


@pytest.mark.parametrize("served", [True, False], ids=["launcher's store", "rank 0's store"])
def test_ranks_meet(served: bool) -> None:
    codes, outputs, _ = run_members(3, "nothing", served=served)
    assert codes == [0, 0, 0], outputs
    assert len({output.strip() for output in outputs}) == 1
    assert outputs[0].startswith("ok True")


@pytest.mark.parametrize("served", [True, False], ids=["launcher's store", "rank 0's store"])
@pytest.mark.parametrize(
    ("action", "codes", "text"),
    [
        ("refuse", [4, 1, 4], "rank 1: the checkpoint is corrupt"),
        ("fail", [3, 1, 3], "rank 1: the checkpoint is corrupt"),
        ("die", [3, -signal.SIGKILL, 3], r"rank 1: process \d+ died during set-up"),
    ],
)
def test_one_failure_ends_all_with_its_message(
    served: bool, action: str, codes: list[int], text: str
) -> None:
    import re

    ended, outputs, _ = run_members(3, action, served=served)
    assert ended == codes, outputs
    assert re.search(text, outputs[0])
    assert re.search(text, outputs[2])


def test_a_rank_that_never_comes_is_named() -> None:
    from torch.distributed import HashStore

    with pytest.raises(GroupError, match=r"no answer from rank\(s\) 1, 2 within 0 s"):
        Group(0, 3, HashStore(), timeout_s=0.2)


def test_a_taken_port_is_refused_by_name() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(GroupError, match=f"127.0.0.1:{port}: Address already in use"):
            serve_store("127.0.0.1", port, 1)


def test_the_store_listens_on_loopback_alone() -> None:
    store = serve_store("127.0.0.1", 0, 1)
    with open("/proc/net/tcp", encoding="ascii") as file:
        rows = [line.split()[1] for line in file if line.split()[3] == "0A"]
    assert [row for row in rows if row.endswith(f":{store.port:04X}")] == [
        f"0100007F:{store.port:04X}"
    ]


def test_the_first_failure_is_the_one_quoted() -> None:
    from torch.distributed import HashStore

    store = HashStore()
    report_failure(store, 2, "first")
    report_failure(store, 0, "second")
    with pytest.raises(PeerFailure, match="rank 2: first"):
        Group(0, 2, store, timeout_s=5)


def test_a_failure_reported_by_the_launcher_reaches_the_group() -> None:
    store = serve_store("127.0.0.1", 0, 2)
    report_failure(prefixed(store), 1, "did not start")
    with pytest.raises(PeerFailure, match="rank 1: did not start"):
        Group(0, 2, prefixed(store), timeout_s=5)


def test_a_rank_that_cannot_join_ends_the_others() -> None:
    launches = [
        LaunchInfo("mpirun", rank, 2, "127.0.0.1", port, False)
        for port in [free_port()]
        for rank in range(2)
    ]
    refused = threading.Thread(
        target=fail_before_joining, args=(launches[0], "bad option"), kwargs={"bad_input": True}
    )
    refused.start()
    with pytest.raises(PeerFailure, match="rank 0: bad option") as failure:
        Group.join(launches[1], timeout_s=30)
    assert failure.value.bad_input
    refused.join(30)
    assert not refused.is_alive()


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_rank_that_starts_late_hears_why_another_cannot_join(
    bad_rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_module, "_FAREWELL_S", 0.1)
    port = free_port()
    launches = [LaunchInfo("mpirun", rank, 2, "127.0.0.1", port, False) for rank in range(2)]
    refused = threading.Thread(
        target=fail_before_joining,
        args=(launches[bad_rank], "bad option"),
        kwargs={"bad_input": True},
    )
    refused.start()
    time.sleep(1.0)
    with pytest.raises(PeerFailure, match=f"rank {bad_rank}: bad option"):
        Group.join(launches[1 - bad_rank], timeout_s=30)
    refused.join(30)
    assert not refused.is_alive()


def test_a_rank_that_fails_later_does_not_wait_for_peers_that_have_joined(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(group_module, "_FAREWELL_S", 0.1)
    store = serve_store("127.0.0.1", 0, 2)
    launches = [LaunchInfo("torchrun", rank, 2, "127.0.0.1", store.port, True) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        groups = list(pool.map(lambda launch: Group.join(launch, timeout_s=30), launches))
    assert len(groups) == 2
    refused = threading.Thread(
        target=fail_before_joining, args=(launches[1], "lost"), kwargs={"bad_input": False}
    )
    refused.start()
    refused.join(30)
    assert not refused.is_alive()


def test_ranks_that_all_cannot_join_do_not_wait_for_each_other() -> None:
    store = serve_store("127.0.0.1", 0, 3)
    launches = [LaunchInfo("torchrun", rank, 3, "127.0.0.1", store.port, True) for rank in range(3)]
    ended = []

    def refuse(launch: LaunchInfo) -> None:
        fail_before_joining(launch, "bad option", bad_input=True)
        ended.append(prefixed(store).check([f"1/seen/{rank}" for rank in range(3)]))

    threads = [threading.Thread(target=refuse, args=(launch,)) for launch in launches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert ended == [True, True, True]


def test_a_failure_interrupts_a_peer_that_waits_for_nobody() -> None:
    ended_after_s = []

    def body(group: Group) -> None:
        if group.rank == 1:
            raise ValueError("the checkpoint is corrupt")
        start = time.monotonic()
        try:
            while time.monotonic() < start + 60:
                time.sleep(0.001)
        finally:
            ended_after_s.append(time.monotonic() - start)

    with pytest.raises((ValueError, PeerFailure), match="the checkpoint is corrupt"):
        run_ranks(2, body)
    assert ended_after_s[0] < 10


def test_a_group_that_is_set_up_is_not_interrupted_any_more() -> None:
    unharmed = []

    def body(group: Group) -> None:
        for _ in range(5):
            with group.setting_up():
                group.barrier("again")
        report_failure(group._store, 1 - group.rank, "too late")
        time.sleep(1)
        unharmed.append(group.rank)

    from torch.distributed import HashStore

    store = HashStore()
    threads = [
        threading.Thread(target=lambda r=rank: body(Group(r, 2, store, timeout_s=10)))
        for rank in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(unharmed) == [0, 1]


def test_exchange_is_in_rank_order() -> None:
    values = run_ranks(4, lambda group: group.exchange("x", str(group.rank).encode()))
    assert values == [[b"0", b"1", b"2", b"3"]] * 4


def test_a_group_of_one_needs_nobody() -> None:
    group = Group.single()
    group.barrier("alone")
    assert group.exchange("x", b"y") == [b"y"]


def test_a_recycled_pid_is_not_the_same_process() -> None:
    mine = ProcessIdentity.current()
    assert mine.is_alive()
    assert not replace(mine, start_ticks=mine.start_ticks + 1).is_alive()


def test_a_process_of_another_container_cannot_be_judged() -> None:
    mine = ProcessIdentity.current()
    assert mine.is_visible_to(mine)
    assert not replace(mine, pid_namespace=mine.pid_namespace + 1).is_visible_to(mine)


def test_groups_can_follow_each_other_on_one_store() -> None:
    def body(group: Group) -> list[bytes]:
        if group.rank == 1:
            time.sleep(0.2)
        second = Group(group.rank, group.size, group._store, timeout_s=10)
        assert second.token != group.token
        return second.exchange("process", str(group.rank).encode())

    assert run_ranks(2, body) == [[b"0", b"1"]] * 2


def test_a_port_that_somebody_else_listens_on_does_not_hold_a_rank() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        launch = LaunchInfo("mpirun", 1, 2, "127.0.0.1", taken.getsockname()[1], False)
        with pytest.raises(GroupError, match="does not answer as the group's store"):
            Group.join(launch, timeout_s=5)


def test_a_store_that_nobody_serves_is_named() -> None:
    launch = LaunchInfo("mpirun", 1, 2, "127.0.0.1", free_port(), False)
    with pytest.raises(GroupError, match="could not reach the group's store"):
        Group.join(launch, timeout_s=0.3)
