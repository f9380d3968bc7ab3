"""What runs when Python starts, and the hook that it puts in place when ``tensorrt_llm`` is imported."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from dwdp.engines.tensorrt_llm.import_hook import DwdpImportHook

ROOT = Path(__file__).resolve().parents[2]
STARTUP_FILE = "dwdp-tensorrt-llm.pth"


class Interpreter:
    """A Python of its own, with dwdp's startup file and a package called ``tensorrt_llm``, without dwdp."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.python = folder / "bin" / "python"
        [self.packages] = folder.glob("lib/python*/site-packages")
        write_startup_file(self.packages)
        package = self.packages / "tensorrt_llm"
        (package / "llmapi").mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "version.py").write_text('__version__ = "0.0"\n')
        (package / "llmapi" / "__init__.py").write_text("")
        (package / "llmapi" / "llm.py").write_text(
            "class LLM:\n    def __init__(self, model, **kwargs):\n        self.kwargs = kwargs\n"
        )

    def run(
        self, *arguments: str, path: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        environ = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
        environ |= variables | ({} if path is None else {"PYTHONPATH": str(path)})
        return subprocess.run(
            [str(self.python), *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            env=environ,
            cwd=self.packages.parent,
        )


def write_startup_file(folder: Path) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_startup_file", "--build-lib", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Interpreter:
    return Interpreter(tmp_path_factory.mktemp("interpreter"))


def imported(interpreter: Interpreter) -> list[str]:
    lines = interpreter.run("-X", "importtime", "-c", "pass").stderr.splitlines()
    return [line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")]


def test_other_programs_import_nothing_more(interpreter: Interpreter) -> None:
    with_it = imported(interpreter)
    (interpreter.packages / STARTUP_FILE).rename(interpreter.packages / "off")
    try:
        without = imported(interpreter)
    finally:
        (interpreter.packages / "off").rename(interpreter.packages / STARTUP_FILE)
    assert "site" in with_it
    assert with_it == without


def test_a_program_runs_as_before_when_dwdp_is_gone(interpreter: Interpreter) -> None:
    done = interpreter.run(
        "-c", "import tensorrt_llm.llmapi.llm as m; print(m.LLM('x', parallel='dwdp'))"
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("remains", ["dwdp", "dwdp/engines", "dwdp/engines/tensorrt_llm"])
def test_a_program_runs_as_before_when_dwdp_is_half_removed(
    interpreter: Interpreter, tmp_path: Path, remains: str
) -> None:
    (tmp_path / remains).mkdir(parents=True)
    done = interpreter.run("-c", "import tensorrt_llm", path=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_broken_dwdp_is_named_in_one_line(interpreter: Interpreter, tmp_path: Path) -> None:
    (tmp_path / "dwdp").mkdir()
    (tmp_path / "dwdp" / "__init__.py").write_text("raise OSError('disk')")
    done = interpreter.run("-c", "import json, tensorrt_llm; print('runs')", path=tmp_path)
    assert done.stdout == "runs\n"
    assert done.stderr == "dwdp: not available in tensorrt_llm: OSError('disk')\n"


def test_it_can_be_turned_off(interpreter: Interpreter) -> None:
    code = "import tensorrt_llm.llmapi.llm, sys; print([n for n in sys.modules if 'dwdp' in n])"
    assert interpreter.run("-c", code, path=ROOT, DWDP_DISABLE="1").stdout == "[]\n"
    assert "dwdp" in interpreter.run("-c", code, path=ROOT).stdout


ASKED_AFTER_OURS = """
import sys

class After:
    def find_spec(self, name, path=None, target=None):
        if name == "tensorrt_llm":
            print("asked")

ours = [type(finder).__name__ for finder in sys.meta_path].index("DwdpStartupFinder")
sys.meta_path.insert(ours + 1, After())
import tensorrt_llm
"""


@pytest.mark.parametrize("dwdp", ["works", "is off", "is gone", "is broken"])
def test_the_finder_after_ours_is_asked(
    interpreter: Interpreter, tmp_path: Path, dwdp: str
) -> None:
    """It may be the one that finds TensorRT-LLM: some editable installs have their own."""
    path = ROOT if dwdp == "works" else tmp_path
    if dwdp == "is broken":
        (tmp_path / "dwdp").mkdir()
        (tmp_path / "dwdp" / "__init__.py").write_text("raise OSError('disk')")
    variables = {"DWDP_DISABLE": "1"} if dwdp == "is off" else {}
    done = interpreter.run("-c", ASKED_AFTER_OURS, path=path, **variables)
    assert (done.returncode, done.stdout) == (0, "asked\n"), done.stderr


def test_finding_tensorrt_llm_runs_nothing_of_it(interpreter: Interpreter) -> None:
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.find_spec('tensorrt_llm')\n"
        "print(spec.origin, 'tensorrt_llm' in sys.modules)"
    )
    done = interpreter.run("-c", code, path=ROOT)
    assert done.stdout == f"{interpreter.packages}/tensorrt_llm/__init__.py False\n"


REFUSED = """
from multiprocessing import get_context
from tensorrt_llm.llmapi.llm import LLM

def ask():
    assert LLM("model", dtype="auto").kwargs == {"dtype": "auto"}
    try:
        LLM("model", parallel="dwdp")
    except RuntimeError as error:
        return str(error)

if __name__ == "__main__":
    print(ask())
    with get_context("spawn").Pool(1) as pool:
        print(pool.apply(ask))
"""


def test_what_does_not_fit_is_refused_here_and_in_spawned_processes(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    """The package above has no version that dwdp knows, and next to none of the symbols."""
    script = tmp_path / "script.py"
    script.write_text(REFUSED)
    done = interpreter.run(str(script), path=ROOT)
    assert done.returncode == 0, done.stderr
    here, spawned = done.stdout.splitlines()
    assert here == spawned
    assert here.startswith("dwdp does not fit TensorRT-LLM 0.0 (tested with 1.3.0rc3): ")
    assert "there is no module tensorrt_llm.commands.serve" in here


SERVE = """
import sys

import click

@click.command()
@click.argument("model")
def serve(model):
    print(__name__, sys.modules["__main__"].__spec__.name, model)

main = click.Group(commands={"serve": serve})

if __name__ == "__main__":
    main()
"""


def test_a_module_that_runs_as_a_program_is_patched(interpreter: Interpreter) -> None:
    """``python -m`` runs a module's code and imports nothing; torchrun -m starts ranks so."""
    commands = interpreter.packages / "tensorrt_llm" / "commands"
    commands.mkdir()
    (commands / "__init__.py").write_text("")
    (commands / "serve.py").write_text(SERVE)
    [click] = {str(Path(find_spec("click").origin).parents[1])}  # type: ignore[union-attr, arg-type]
    path = Path(f"{ROOT}{os.pathsep}{click}")
    program = ("-m", "tensorrt_llm.commands.serve", "serve", "MODEL")
    try:
        done = interpreter.run(*program, path=path)
        module = "tensorrt_llm.commands.serve"
        assert done.stdout == f"{module} {module} MODEL\n", done.stderr
        refused = interpreter.run(*program, "--parallel", "dwdp", path=path)
        assert refused.returncode == 1
        assert refused.stderr.startswith("Error: dwdp does not fit TensorRT-LLM 0.0"), refused
    finally:
        shutil.rmtree(commands)


class Events:
    """A hook over the package ``watched_package``, and what it called."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.hook = DwdpImportHook(
            {"tensorrt_llm", "tensorrt_llm.inner"}, lambda: self.seen.append("before"), self.after
        )

    def after(self, module: ModuleType) -> None:
        self.seen.append(f"after {module.__name__} with {module.VALUE}")
        module.VALUE = 2  # type: ignore[attr-defined]


@pytest.fixture
def events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Events]:
    package = tmp_path / "tensorrt_llm"
    package.mkdir()
    (package / "__init__.py").write_text(
        "VALUE = 1\nfrom tensorrt_llm.inner import VALUE as INNER\n"
    )
    (package / "inner.py").write_text("VALUE = 1\n")
    (package / "broken.py").write_text("raise OSError('disk')\n")
    (package / "other.py").write_text("VALUE = 1\n")
    events = Events()
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if is_ours(name)}
    monkeypatch.setattr(sys, "meta_path", [events.hook, *plain_finders()])
    monkeypatch.syspath_prepend(str(tmp_path))
    yield events
    for name in [name for name in sys.modules if is_ours(name)]:
        del sys.modules[name]
    sys.modules.update(kept)


def is_ours(name: str) -> bool:
    return name.partition(".")[0] == "tensorrt_llm"


def plain_finders() -> list[object]:
    """Those of Python itself, so that no TensorRT-LLM is found elsewhere."""
    return [finder for finder in sys.meta_path if isinstance(finder, type)]


def test_modules_are_patched_right_after_they_were_executed(events: Events) -> None:
    module = importlib.import_module("tensorrt_llm")
    # The package sees the inner module patched already, as it imports it by name.
    assert events.seen == [
        "before",
        "after tensorrt_llm.inner with 1",
        "after tensorrt_llm with 1",
    ]
    assert (module.VALUE, module.INNER) == (2, 2)


def test_modules_look_as_if_there_were_no_hook(events: Events) -> None:
    module = importlib.import_module("tensorrt_llm.inner")
    assert module.__spec__ is not None
    assert type(module.__spec__.loader).__name__ == "SourceFileLoader"
    assert module.__loader__ is module.__spec__.loader
    assert importlib.reload(module).VALUE == 2


def test_others_are_left_alone(events: Events) -> None:
    assert events.hook.find_spec("tensorrt_llm.other", None) is None
    assert events.hook.find_spec("json", None) is None


def test_source_can_be_read_through_a_spec(events: Events) -> None:
    spec = events.hook.find_spec("tensorrt_llm", None)
    assert spec is not None and spec.loader is not None
    assert "INNER" in spec.loader.get_source("tensorrt_llm")  # type: ignore[attr-defined]
    assert events.seen == []


def test_a_finder_of_the_old_protocol_is_left_out(events: Events) -> None:
    sys.meta_path.insert(1, object())  # type: ignore[arg-type]
    assert importlib.import_module("tensorrt_llm.inner").VALUE == 2


def test_a_module_that_fails_is_not_patched(events: Events) -> None:
    hook = DwdpImportHook({"tensorrt_llm.broken"}, lambda: None, events.after)
    sys.meta_path.insert(0, hook)
    with pytest.raises(OSError, match="disk"):
        importlib.import_module("tensorrt_llm.broken")
    assert "tensorrt_llm.broken" not in " ".join(events.seen)
    assert "tensorrt_llm.broken" not in sys.modules


def test_importing_the_plugin_needs_only_the_standard_library(interpreter: Interpreter) -> None:
    """Whoever imports TensorRT-LLM without asking for DWDP pays for nothing else."""
    code = (
        "import sys, dwdp.engines.tensorrt_llm.import_hook as h; h.install()\n"
        "from dwdp.engines.tensorrt_llm import patches; patches.obstacle(); patches.prepare()\n"
        "names = {n.partition('.')[0] for n in sys.modules} - set(sys.stdlib_module_names)\n"
        "print(sorted(names - {'__main__', 'sitecustomize'}))"
    )
    done = interpreter.run("-c", code, path=ROOT)
    assert done.stdout == "['dwdp']\n", done.stderr
