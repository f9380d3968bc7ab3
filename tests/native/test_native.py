"""The native core's own tests, without Python; `make test-asan` and `make test-tsan` run them sanitized."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


@pytest.mark.timeout(600)
def test_the_native_core() -> None:
    done = subprocess.run(
        ["make", "-C", str(Path(__file__).parent), "plain"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests, 0 failed" in done.stdout
