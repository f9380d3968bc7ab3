"""The startup file in what pip installs: there with a wheel and with an editable install, gone afterwards."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STARTUP_FILE = "dwdp-tensorrt-llm.pth"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project, but with a native module that compiles in no time."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(
        ROOT / "dwdp", folder / "dwdp", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    bindings = folder / "csrc" / "bindings"
    bindings.mkdir(parents=True)
    (bindings / "module.cpp").write_text("int dwdp_native_module;\n")
    return folder


@pytest.fixture
def python(tmp_path: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True
    )
    return tmp_path / "venv" / "bin" / "python"


def pip(python: Path, *arguments: str) -> None:
    """The pip of the tests' own interpreter, acting on another one."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), *arguments],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def wait_for_tensorrt_llm(python: Path) -> tuple[list[str], str]:
    """The finders of dwdp in a new process, and what it says when it starts."""
    code = "import sys; print(*(type(f).__name__ for f in sys.meta_path if 'Dwdp' in type(f).__name__))"
    done = subprocess.run(
        [str(python), "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=python.parent,
        env={},
    )
    return done.stdout.split(), done.stderr


@pytest.mark.parametrize("options", [["--no-build-isolation"], ["--no-build-isolation", "-e"]])
def test_the_startup_file_comes_and_goes_with_the_package(
    project: Path, python: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DWDP_CUDA", "0")
    # Build requirements are taken from the interpreter that runs pip's build: it has to find them.
    [packages] = python.parent.parent.glob("lib/python*/site-packages")
    before = {path.name for path in packages.iterdir()}
    borrowed = packages / "borrowed.pth"
    borrowed.write_text(
        "\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n"
    )
    pip(python, "install", "--no-deps", "--no-compile", *options, str(project))
    borrowed.unlink()
    assert (packages / STARTUP_FILE).is_file()
    assert wait_for_tensorrt_llm(python) == (["DwdpStartupFinder"], "")

    pip(python, "uninstall", "--yes", "dwdp")
    # An empty folder is removed with the last package.
    remains = {path.name for path in packages.iterdir()} if packages.exists() else set()
    assert remains <= before
    assert wait_for_tensorrt_llm(python) == ([], "")
