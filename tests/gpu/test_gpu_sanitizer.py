"""The demand kernel by itself, and under NVIDIA's checkers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_support import needs_gpu

pytestmark = needs_gpu
PROGRAM = Path(__file__).with_name("demand_program.py")
ROOT = PROGRAM.parents[2]
FOUND_AN_ERROR = 86


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.run(
        [*command, sys.executable, str(PROGRAM)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )


def test_activated_experts_arrive_and_nothing_else_changes() -> None:
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every slot is right" in done.stdout


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_checkers_find_nothing(tool: str) -> None:
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        pytest.skip("compute-sanitizer is not on PATH")
    done = run(checker, "--tool", tool, "--error-exitcode", str(FOUND_AN_ERROR))
    output = done.stdout + done.stderr
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, output
    assert "every slot is right" in output
