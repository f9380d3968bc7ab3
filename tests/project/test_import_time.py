"""What an import costs, measured by what it loads: a wall time would depend on the machine."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import dwdp

HEAVY = {"numpy", "pydantic", "torch", "transformers"}


def modules_loaded_by(code: str) -> set[str]:
    """Names of the top-level modules that a fresh interpreter has loaded after running ``code``."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_import_dwdp_loads_only_the_standard_library() -> None:
    extra = modules_loaded_by("import dwdp") - modules_loaded_by("import importlib, typing")
    assert extra - set(sys.stdlib_module_names) == {"dwdp"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["no-such-command"]])
def test_the_command_loads_nothing_heavy_before_it_knows_what_to_do(arguments: list[str]) -> None:
    loaded = modules_loaded_by(f"from dwdp.cli.main import run\nrun({arguments!r})")
    assert "click" in loaded
    assert not loaded & HEAVY


def test_arithmetic_loads_no_torch() -> None:
    assert "torch" not in modules_loaded_by(
        "import dwdp.placement, dwdp.layout, dwdp.fetch_plan, dwdp.config"
    )


@pytest.mark.parametrize("name", dwdp.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(dwdp, name) is not None
    assert name in dir(dwdp)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = dwdp.no_such_name  # type: ignore[attr-defined]
