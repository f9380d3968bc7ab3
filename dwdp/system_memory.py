"""Memory of this machine and of this process, read from /proc and from control groups (version 1 and 2)."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc/self")
_V1_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_V2_FILES = ("memory.max", "memory.current", "")


class MemoryPool(NamedTuple):
    """Memory that processes draw on together: the machine's, or what a control group is limited to.

    Attributes:
        key: the same for two processes of one machine exactly if they share the pool.
        name: for messages.
        available_bytes: what can still be taken.
    """

    key: str
    name: str
    available_bytes: int


def memory_pools() -> list[MemoryPool]:
    """Every pool that this process's memory counts against, the machine's first.

    A control group counts if it has a limit: the process's own as well as every one around it.
    """
    import psutil

    machine = MemoryPool("machine", "on this machine", psutil.virtual_memory().available)
    return [machine, *_limited_groups()]


def rss_bytes() -> int:
    """Resident memory of this process."""
    return _status_bytes("VmRSS")


def peak_rss_bytes() -> int:
    """The highest value of :func:`rss_bytes` so far, in this program's life."""
    # Not getrusage(): its maximum also counts the parent's memory, from before this program began.
    return _status_bytes("VmHWM")


def restart_peak_rss() -> None:
    """Set :func:`peak_rss_bytes` back to the present value, where the kernel lets a process do so."""
    try:
        (_PROC / "clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _status_bytes(field: str) -> int:
    for line in (_PROC / "status").read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return 0


def _limited_groups() -> Iterator[MemoryPool]:
    for folder, files in _control_groups():
        available = _left_in(folder, *files)
        if available != inf:
            status = folder.stat()
            key = f"{status.st_dev}:{status.st_ino}"
            yield MemoryPool(key, f"in the control group {folder}", int(available))


def _control_groups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Folders and file names of the groups that limit this process: its own, then those around it."""
    try:
        memberships = (_PROC / "cgroup").read_text(encoding="utf-8").splitlines()
        mounts = (_PROC / "mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for membership in memberships:
        # "4:memory,cpu:/path" in version 1, "0::/path" in version 2
        number, controllers, path = membership.split(":", 2)
        if number == "0":
            mount, files = _mounted(mounts, "cgroup2", None), _V2_FILES
        elif "memory" in controllers.split(","):
            mount, files = _mounted(mounts, "cgroup", "memory"), _V1_FILES
        else:
            continue
        if mount is None:
            continue
        root, mount_point = mount
        # A container may see its own group, or one above it, as the root, under the host's name for
        # the path; then the part below the mount is not known, and the mount itself is the group.
        below = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path()
        if ".." in below.parts or not (mount_point / below).is_dir():
            below = Path()
        for folder in (below, *below.parents):
            yield mount_point / folder, files


def _mounted(mounts: list[str], kind: str, controller: str | None) -> tuple[Path, Path] | None:
    """The group that is mounted, and where, of the file system ``kind`` with ``controller``."""
    for line in mounts:
        # "31 24 0:26 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory"
        place, _, source = line.partition(" - ")
        file_system, _, options = source.split(" ", 2)
        if file_system == kind and (controller is None or controller in options.split(",")):
            root, mount_point = (
                Path(field.encode().decode("unicode_escape")) for field in place.split(" ")[3:5]
            )
            return root, mount_point
    return None


def _left_in(folder: Path, limit_file: str, usage_file: str, stat_prefix: str) -> float:
    try:
        limit = int((folder / limit_file).read_text(encoding="ascii"))
        usage = int((folder / usage_file).read_text(encoding="ascii"))
        stat = (folder / "memory.stat").read_text(encoding="ascii").split()
    except (OSError, ValueError):  # no such controller here, or no limit ("max")
        return inf
    # Cached pages of files are given back when memory is needed; shared memory is not among these two.
    counters = dict(zip(stat[::2], stat[1::2], strict=True))
    cached = sum(
        int(counters.get(stat_prefix + key, 0)) for key in ("active_file", "inactive_file")
    )
    return max(0, limit - usage + cached)
