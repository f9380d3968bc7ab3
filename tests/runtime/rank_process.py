"""Ranks as processes that tests can stop and kill."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


class Rank:
    """Runs worker.py: says "attached", then answers ``ask`` with one line."""

    def __init__(
        self, rank: int, num_ranks: int, port: int, mode: str, incarnation: int = 0
    ) -> None:
        environ = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
            "DWDP_RANK": str(rank),
            "DWDP_WORLD_SIZE": str(num_ranks),
            "DWDP_INCARNATION": str(incarnation),
            "DWDP_RENDEZVOUS": f"127.0.0.1:{port}",
            "DWDP_STORE_IS_SERVED": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), mode],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, num_forwards: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{num_forwards}\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.close()
        last = self.read()
        self.process.wait(30)
        return last
