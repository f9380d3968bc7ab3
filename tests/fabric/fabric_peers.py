"""What the other processes of the fabric tests do, and how the tests look at their own process."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwdp.fabric import Fabric, FabricError, Region, create_fabric

if TYPE_CHECKING:
    import torch

TOKEN = b"0123456789abcdef"
NOBODY = 65534
F_GET_SEALS = 1034


def start(
    target: Callable[..., None], *arguments: Any, ready: bool = True
) -> tuple[BaseProcess, Connection, Any]:
    """Run ``target(connection, *arguments)`` in a fresh process; also returns its first message."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return process, ours, ours.recv() if ready else None


def pattern(seed: int, num_bytes: int) -> torch.Tensor:
    import torch  # here, because most processes start sooner without it

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)


def serve(fabric: Fabric) -> str:
    """Serve from this process; returns the address."""
    fabric.serve(TOKEN)
    return fabric.ticket().decode()


def fetch(
    fabric: Fabric,
    address: str,
    name: str,
    sizes: list[int],
    *,
    token: bytes = TOKEN,
    timeout_s: float = 20.0,
) -> list[Region]:
    """Regions published under ``name`` by the process that serves at ``address``."""
    return fabric.fetch_regions(address.encode(), token, name, sizes, timeout_s)


def export_pieces(connection: Connection, seeds: list[int], num_pages: list[int]) -> None:
    """Publish one region per seed under "pieces"; send the address; then do as told."""
    fabric = create_fabric("host")
    regions, views = [], []
    for seed, pages in zip(seeds, num_pages, strict=True):
        num_bytes = pages * fabric.granularity
        region = fabric.allocate(num_bytes)
        address_range = fabric.reserve(num_bytes)
        address_range.map(0, region)
        address_range.enable_access(writable=True)
        view = address_range.bytes_tensor(0, num_bytes)
        view.copy_(pattern(seed, num_bytes))
        regions.append(region)
        views.append(view)
    address = serve(fabric)
    fabric.publish("pieces", regions)
    connection.send(address)
    while (command := connection.recv()) != "stop":
        index, value = command
        views[index].fill_(value)
        connection.send("written")


def write_to_imported(connection: Connection, address: str, num_bytes: int, write: bool) -> None:
    """Map a peer's region and read it; writing to it is the end of this process."""
    fabric = create_fabric("host")
    [region] = fetch(fabric, address, "pieces", [num_bytes])
    address_range = fabric.reserve(num_bytes)
    address_range.map(0, region)
    address_range.enable_access(writable=False)
    view = address_range.bytes_tensor(0, num_bytes)
    connection.send(int(view.sum()))
    if write:
        view[0] = 1


def fetch_as_nobody(connection: Connection, address: str, num_bytes: int) -> None:
    fabric = create_fabric("host")
    os.setuid(NOBODY)
    try:
        fetch(fabric, address, "pieces", [num_bytes])
        connection.send("served")
    except FabricError as error:
        connection.send(str(error))


def serve_as_nobody(connection: Connection) -> None:
    fabric = create_fabric("host")
    os.setuid(NOBODY)
    connection.send(serve(fabric))
    connection.recv()


def fork_with_engine(connection: Connection) -> None:
    """Fork while copy threads, a server and a mapping exist; report what the child could do."""
    fabric = create_fabric("host")
    fabric.serve(TOKEN)
    engine = fabric.copy_engine(2, 2)
    done = fabric.event()
    fetch = engine.prepare([])
    child = os.fork()
    if child == 0:
        status = 1
        try:
            engine.submit(fetch, after=None, done=done)
        except FabricError as error:
            status = 0 if "parent process" in str(error) else 2
        engine.close()
        del engine
        fabric.close()
        os._exit(status)
    deadline = time.monotonic() + 20.0
    pid, status = 0, 0
    while pid == 0 and time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    if pid == 0:
        os.kill(child, 9)
        connection.send("the child hangs")
        return
    engine.submit(fetch, after=None, done=done)
    done.wait()
    engine.close()
    connection.send(os.waitstatus_to_exitcode(status))


def export_one(fabric: Fabric, num_pages: int = 1) -> tuple[str, int]:
    """Serve one region under "pieces" from this process; returns the address and its bytes."""
    num_bytes = num_pages * fabric.granularity
    address = serve(fabric)
    fabric.publish("pieces", [fabric.allocate(num_bytes)])
    return address, num_bytes


def region_descriptors() -> list[int]:
    """This process's descriptors of regions."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)
        except FileNotFoundError:  # the descriptor that lists the folder
            continue
        if target.startswith("/memfd:dwdp-region"):
            found.append(int(entry.name))
    return found


def seals_of(fd: int) -> int:
    return fcntl.fcntl(fd, F_GET_SEALS)


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def num_region_mappings() -> int:
    return Path("/proc/self/maps").read_text().count("/memfd:dwdp-region")


def native_threads() -> list[str]:
    """Names of the threads that dwdp started in this process."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        try:
            name = (task / "comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        if name.startswith("dwdp-"):
            names.append(name)
    return sorted(names)


def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
