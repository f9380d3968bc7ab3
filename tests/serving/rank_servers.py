"""Rank servers as processes, and ways to talk to them."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from dwdp.config import DwdpConfig
from dwdp.rendezvous import serve_store
from dwdp.serving.rank_server.job import RankServerJob
from dwdp.serving.rank_server.options import RankOptions

MODEL_DIR = Path(__file__).resolve().parents[2] / "examples" / "tiny_moe" / "model"
TOKEN = "a-token"
MODEL = "tiny"
PROMPT = "def main("
START_S = 120.0


class Rank:
    """One rank process and ways to talk to it."""

    def __init__(self, process: subprocess.Popen[bytes], name: str) -> None:
        self.process = process
        self.name = name
        self.http = httpx.Client(
            transport=httpx.HTTPTransport(uds=f"\0{name}"),
            base_url="http://rank",
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=60,
        )
        self.client = openai.OpenAI(
            api_key=TOKEN, base_url="http://rank/v1", http_client=self.http, max_retries=0
        )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"exit code {self.process.returncode}"
            try:
                if self.http.get("/health/ready").status_code == 200:
                    return
            except httpx.ConnectError:
                time.sleep(0.05)
        pytest.fail("the rank is not ready")

    def stats(self, query: str = "") -> dict[str, Any]:
        stats = self.http.get(f"/internal/stats{query}").json()
        assert isinstance(stats, dict)
        return stats

    def wait_for(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + 30
        while True:
            stats = self.stats()
            if condition(stats):
                return stats
            assert time.monotonic() < deadline, stats
            time.sleep(0.02)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def job(
    name: str,
    model_dir: Path | str = MODEL_DIR,
    config: DwdpConfig | None = None,
    parent_pid: int | None = os.getpid(),
    **options: Any,
) -> bytes:
    values = RankServerJob(
        model_dir=str(model_dir),
        served_model_name=MODEL,
        dtype="float32",
        num_threads=1,
        config=config if config is not None else DwdpConfig(),
        options=RankOptions(**options),
        socket=name,
        token=TOKEN,
        parent_pid=parent_pid,
    )
    return values.model_dump_json().encode() + b"\n"


def start(
    line: bytes, environment: dict[str, str] | None = None, **kwargs: Any
) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", "dwdp.serving.rank_server"],
        stdin=subprocess.PIPE,
        env={**os.environ, **(environment or {})},
        **kwargs,
    )
    assert process.stdin is not None
    process.stdin.write(line)
    process.stdin.close()
    return process


@contextmanager
def started(
    config: DwdpConfig | None = None, model_dir: Path | str = MODEL_DIR, **options: Any
) -> Iterator[list[Rank]]:
    """A group of ranks, ready."""
    size = config.dwdp_size if config is not None else 1
    store = serve_store("127.0.0.1", 0, size)
    ranks = []
    try:
        for rank in range(size):
            name = f"dwdp-test-{secrets.token_hex(8)}"
            environment = {
                "DWDP_RANK": str(rank),
                "DWDP_WORLD_SIZE": str(size),
                "DWDP_RENDEZVOUS": f"127.0.0.1:{store.port}",
                "DWDP_STORE_IS_SERVED": "1",
            }
            process = start(job(name, model_dir, config, **options), environment)
            ranks.append(Rank(process, name))
        for one in ranks:
            one.wait_until_ready()
        yield ranks
    finally:
        for one in ranks:
            one.http.close()
            one.process.kill()
            one.process.wait()


def begin_stream(rank: Rank, num_tokens: int) -> Any:
    """A stream that has brought its first event."""
    stream = rank.client.completions.create(
        model=MODEL,
        prompt="a",
        max_tokens=num_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(stream)
    return stream
