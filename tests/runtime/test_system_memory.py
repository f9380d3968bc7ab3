"""Memory of the machine and of the process: control groups of both versions, and /proc/self/status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dwdp import system_memory
from dwdp.memory_plan import available_memory_bytes
from dwdp.system_memory import memory_pools, peak_rss_bytes, restart_peak_rss, rss_bytes

MACHINE_BYTES = 1000


class FakeMachine:
    """A /proc/self and control groups, as files under ``root``."""

    def __init__(self, root: Path, *, kind: str, mounted: str = "/") -> None:
        self.mount_point = root / "cgroup with a space"
        self.proc = root / "proc"
        self.is_v2 = kind == "cgroup2"
        self.mount_point.mkdir()
        self.proc.mkdir()
        escaped = str(self.mount_point).replace(" ", "\\040")
        options = "rw" if self.is_v2 else "rw,memory"
        (self.proc / "mountinfo").write_text(
            "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
            f"31 24 0:26 / {root}/elsewhere rw,relatime shared:9 - cgroup cgroup rw,cpu\n"
            f"32 24 0:27 {mounted} {escaped} rw,relatime shared:9 - {kind} {kind} {options}\n"
        )

    def is_in(self, path: str) -> None:
        line = f"0::{path}" if self.is_v2 else f"4:memory:{path}\n3:cpu:/somewhere/else"
        (self.proc / "cgroup").write_text(line + "\n")

    def group(self, path: str, *, limit: str, usage: int, stat: str = "") -> None:
        folder = self.mount_point / path.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        names = (
            ("memory.max", "memory.current")
            if self.is_v2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{usage}\n")
        (folder / "memory.stat").write_text(stat)


@pytest.fixture(params=["cgroup2", "cgroup"])
def machine(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> FakeMachine:
    fake = FakeMachine(tmp_path, kind=request.param)
    monkeypatch.setattr(system_memory, "_PROC", fake.proc)
    memory = type("Memory", (), {"available": MACHINE_BYTES})
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    return fake


def test_a_machine_without_control_groups_limits_alone(machine: FakeMachine) -> None:
    assert available_memory_bytes() == MACHINE_BYTES
    (machine.proc / "mountinfo").unlink()
    assert available_memory_bytes() == MACHINE_BYTES


def test_the_own_group_limits(machine: FakeMachine) -> None:
    machine.is_in("/user/job")
    machine.group("/user/job", limit="500", usage=450)
    machine.group("/user/other job", limit="10", usage=10)
    assert available_memory_bytes() == 50
    assert memory_pools()[1].name == f"in the control group {machine.mount_point}/user/job"


@pytest.mark.parametrize("limited", ["/", "/user", "/user/job"])
def test_every_group_around_it_limits(machine: FakeMachine, limited: str) -> None:
    no_limit = "max" if machine.is_v2 else "9223372036854771712"
    machine.is_in("/user/job/step")
    for path in ("/", "/user", "/user/job", "/user/job/step"):
        machine.group(path, limit="300" if path == limited else no_limit, usage=100)
    assert available_memory_bytes() == 200


def test_cached_files_are_available_and_shared_memory_is_not(machine: FakeMachine) -> None:
    machine.is_in("/job")
    prefix = "" if machine.is_v2 else "total_"
    stat = f"anon 1\n{prefix}active_file 20\n{prefix}inactive_file 30\n{prefix}shmem 400\n"
    machine.group("/job", limit="500", usage=450, stat=stat)
    assert available_memory_bytes() == 100


def test_a_group_above_its_limit_leaves_nothing(machine: FakeMachine) -> None:
    machine.is_in("/job")
    machine.group("/job", limit="300", usage=400)
    assert available_memory_bytes() == 0


def test_no_limit_leaves_the_machine(machine: FakeMachine) -> None:
    machine.is_in("/job")
    machine.group("/job", limit="max" if machine.is_v2 else "9223372036854771712", usage=1)
    assert available_memory_bytes() == MACHINE_BYTES


@pytest.mark.parametrize(
    ("mounted", "path"),
    [
        ("/docker/1234", "/docker/1234"),  # the container's own group is the mount's root
        ("/docker/1234", "/docker/5678"),  # a group outside of what is mounted
        ("/", "/../.."),  # a group outside of the process's namespace
        ("/", "/docker/1234"),  # the host's name, and a mount that shows the container's group
    ],
)
def test_in_a_container_the_mounted_group_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounted: str, path: str
) -> None:
    fake = FakeMachine(tmp_path, kind="cgroup2", mounted=mounted)
    monkeypatch.setattr(system_memory, "_PROC", fake.proc)
    fake.is_in(path)
    fake.group("/", limit="64", usage=4)
    assert available_memory_bytes() == 60


def test_processes_of_one_group_name_one_pool(machine: FakeMachine) -> None:
    machine.is_in("/user/a")
    for path in ("/user", "/user/a", "/user/b"):
        machine.group(path, limit="300", usage=100)
    of_a = [pool.key for pool in memory_pools()]
    machine.is_in("/user/b")
    of_b = [pool.key for pool in memory_pools()]
    assert of_a[0] == of_b[0] and of_a[1] != of_b[1] and of_a[2] == of_b[2]
    assert len(of_a) == len(of_b) == 3


def test_resident_memory_and_its_peak() -> None:
    program = """
from dwdp.system_memory import peak_rss_bytes, restart_peak_rss, rss_bytes
before = rss_bytes()
taken = bytearray(64 << 20)
full = rss_bytes()
del taken
print(before, full, peak_rss_bytes(), rss_bytes())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    before, full, peak, after = map(int, done.stdout.split())
    assert full - before >= 60 << 20
    assert peak >= full - (1 << 20)
    assert after < full - (60 << 20)


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel keeps the peak"
)
def test_the_peak_can_be_restarted() -> None:
    taken = bytearray(64 << 20)
    full = rss_bytes()
    del taken
    restart_peak_rss()
    assert peak_rss_bytes() < full - (32 << 20)
