"""The servers that are measured: ``dwdp serve``, and ranks that run alone without a router."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

from serving_load import Target

from dwdp.config import DwdpConfig
from dwdp.serving.environment import rank_command
from dwdp.serving.rank_server.options import RankOptions
from dwdp.serving.supervisor.transformers_ranks import TransformersRanks

DTYPE = "float32"
MODEL = "model"
START_S = 300.0


class Served:
    """A running ``dwdp serve``."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

    @property
    def target(self) -> Target:
        return Target(self.url, MODEL)

    def rank_pids(self) -> dict[int, int]:
        """Processes of the ranks that are ready."""
        with urlopen(f"{self.url}/page/events", timeout=30) as events:
            document = json.loads(events.readline().removeprefix(b"data: "))
        return {rank["rank"]: rank["pid"] for rank in document["ranks"] if rank["state"] == "ready"}

    def recoveries_s(self) -> dict[str, float]:
        with urlopen(f"{self.url}/metrics", timeout=30) as response:
            text = response.read().decode()
        found = re.findall(
            r'^dwdp_rank_recovery_seconds\{rank="(\d+)"\} (\S+)$', text, re.MULTILINE
        )
        return {rank: float(value) for rank, value in found}


@contextmanager
def dwdp_serve(model_dir: str, num_ranks: int) -> Iterator[Served]:
    """``dwdp serve`` on a free port, one compute thread per rank."""
    command = [sys.executable, "-m", "dwdp", "serve", model_dir, "--port", "0"]
    options = ["--dwdp-size", str(num_ranks), "--dtype", DTYPE, "--threads-per-rank", "1"]
    process = subprocess.Popen(
        [*command, *options, "--served-model-name", MODEL],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        found = re.search(r"ready at (\S+)", process.stdout.readline())
        if found is None:
            raise RuntimeError("dwdp serve did not start; run it by hand to see why")
        yield Served(process, found.group(1))
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def independent_server(model_dir: str) -> Iterator[Target]:
    """One server with the whole model and no router in front, reached over TCP as a router is."""
    launcher = TransformersRanks(
        Path(model_dir),
        MODEL,
        DwdpConfig(),
        RankOptions(),
        dtype=DTYPE,
        device="cpu",
        num_threads=1,
    )
    launcher.new_group()
    start = launcher.start(0, 0)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    job = {**json.loads(start.stdin), "socket": str(port)}
    process = subprocess.Popen(
        rank_command("serving_tcp_rank"),
        env=start.environment,
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps(job).encode() + b"\n")
        process.stdin.close()
        target = Target(f"http://127.0.0.1:{port}", MODEL, headers=start.endpoint.headers)
        asyncio.run(_until_ready(target, process))
        yield target
    finally:
        process.terminate()
        process.wait(60)


async def _until_ready(target: Target, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    async with target.session() as session:
        while time.monotonic() < deadline and process.poll() is None:
            try:
                async with session.get("/health/ready") as response:
                    if response.status == 200:
                        return
            except OSError:
                await asyncio.sleep(0.1)
    raise RuntimeError("an independent server did not start")
