"""The examples run as they are."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str, folder: Path) -> str:
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(300)
def test_the_demo(tmp_path: Path) -> None:
    output = run(
        str(ROOT / "examples" / "demo.py"), "--ranks", "2", "--max-new-tokens", "4", folder=tmp_path
    )
    for mode in ("staged", "direct"):
        assert f"{mode}: 8 of 8 completions (32 tokens) equal the unsharded model's" in output
    assert "DIFFERENT" not in output
    shown = [line[2:] for line in output.splitlines() if line.startswith("$ ")]
    assert len(shown) == 2
    assert "--max-new-tokens 4" in shown[0]
    check_it_would_run(shown[0], tmp_path)


def check_it_would_run(command: str, folder: Path) -> None:
    """A ``dwdp generate`` finds out last of all, before it starts ranks, that its port is in use."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = [*shlex.split(command), "--port", str(taken.getsockname()[1])]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Address already in use" in done.stderr


@pytest.mark.timeout(300)
def test_the_python_api_under_torchrun(tmp_path: Path) -> None:
    output = run(
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        str(ROOT / "examples" / "python_api.py"),
        folder=tmp_path,
    )
    for rank in (0, 1):
        assert f"--- rank {rank} of 2" in output
        assert f"rank {rank}: " in output
