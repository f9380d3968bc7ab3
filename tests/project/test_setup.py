"""``make setup`` does again what has changed, and no more; a native build records what it was made for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STARTUP = "dwdp/engines/tensorrt_llm/startup.py"
SETTINGS = ("PYTHON", "CXX", "TORCH_INDEX", "VENV", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
CLEAN_ENVIRON = {name: value for name, value in os.environ.items() if name not in SETTINGS}


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """A virtual environment as make leaves one that it has set up with these settings."""
    for stamp in (".packages", ".native"):
        (tmp_path / stamp).touch()
    (tmp_path / ".settings.mk").write_text(
        "RECORDED_PYTHON := python3.98\n"
        "RECORDED_TORCH_INDEX := https://index/cpu\\#one\n"
        "RECORDED_CXX := ccache g++\n"
    )
    return tmp_path


def planned(venv: Path, *arguments: str, **environ: str) -> str:
    """What ``make setup`` would do."""
    return subprocess.run(
        ["make", "--dry-run", f"VENV={venv}", "setup", *arguments],
        cwd=ROOT,
        env=CLEAN_ENVIRON | environ,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def test_what_is_up_to_date_stays(venv: Path) -> None:
    same = {"PYTHON": "python3.98", "CXX": "ccache g++", "TORCH_INDEX": "https://index/cpu#one"}
    for plan in (planned(venv), planned(venv, **same)):
        assert "pip" not in plan and "build_ext" not in plan
    (venv / ".settings.mk").unlink()
    for plan in (planned(venv), planned(venv, CXX="clang++")):
        assert "pip" not in plan and "build_ext" not in plan


@pytest.mark.parametrize("environ", [{"PYTHON": "python3.99"}, {"TORCH_INDEX": "https://other"}])
def test_another_interpreter_or_index_makes_the_environment_anew(
    venv: Path, environ: dict[str, str]
) -> None:
    plan = planned(venv, **environ)
    python = environ.get("PYTHON", "python3.98")
    assert f"{python} -m venv --clear {venv}" in plan and "-e '.[" in plan
    record = {"PYTHON": python, "TORCH_INDEX": r"https://index/cpu\#one", "CXX": "ccache g++"}
    written = " ".join(f"{name} '{value}'" for name, value in (record | environ).items())
    assert f"{written} > {venv}/.settings.mk" in plan
    if "PYTHON" in environ:
        (venv / ".settings.mk").unlink()
        assert f"python3.99 -m venv --clear {venv}" in planned(venv, **environ)


def test_another_compiler_rebuilds_the_native_module(venv: Path) -> None:
    plan = planned(venv, "CXX=clang++")
    assert "setup.py --quiet build_ext --inplace" in plan and "CXX 'clang++'" in plan
    assert "pip" not in plan


def test_a_changed_startup_file_is_installed(venv: Path) -> None:
    plan = planned(venv, "-W", STARTUP)
    assert "-e '.[" in plan and "--clear" not in plan


def test_a_build_that_fails_leaves_no_record_of_what_it_was_for(tmp_path: Path) -> None:
    (tmp_path / "configuration.txt").write_text("another one")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "-t", str(tmp_path), "-b", str(tmp_path)],
        cwd=ROOT,
        env=CLEAN_ENVIRON | {"CC": "false", "CXX": "false", "DWDP_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "false" in done.stderr
    assert not (tmp_path / "configuration.txt").exists()
