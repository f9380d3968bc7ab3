"""Which process is meant, whether it still runs, and whose it is: known from outside, from the kernel."""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass

_PEER_CREDENTIALS = struct.Struct("3i")


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


def is_own_user(connection: socket.socket) -> bool:
    """Whether a process of this process's user is at the other end of a unix socket."""
    credentials = connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size
    )
    _, user, _ = _PEER_CREDENTIALS.unpack(credentials)
    return bool(user == os.geteuid())


def _start_ticks(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
