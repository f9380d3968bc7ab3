"""Tests marked ``trtllm`` run TensorRT-LLM's own code: a checkout in TRTLLM_SOURCE, or an installed one."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BOOT = Path(__file__).parent / "boot"
ROOT = Path(__file__).parents[2]

sys.path.insert(0, str(Path(__file__).parent))

if os.environ.get("TRTLLM_SOURCE"):
    sys.path.insert(0, str(BOOT))
    import tensorrt_llm_boot

    try:
        tensorrt_llm_boot.install()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    # Children, those that MPI spawns included, start like this process.
    paths = [str(BOOT), str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def has_tensorrt_llm() -> bool:
    spec = find_spec("tensorrt_llm")
    # This folder, on the path for the sake of its parent's modules, looks like a package without sources.
    return spec is not None and spec.origin is not None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("trtllm") is not None and not has_tensorrt_llm():
        pytest.skip("needs TensorRT-LLM: none is installed, and TRTLLM_SOURCE names no checkout")
