"""The ``dwdp`` command itself: help, version, exit codes, one line per error."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pydantic
import pytest

from dwdp import __version__
from dwdp.cli import main as cli_main
from dwdp.cli.main import COMMANDS, CommandEntry, cli, describe_error, run
from dwdp.config import DwdpConfig
from dwdp.fabric.base import FabricError


@pytest.fixture
def add_command(monkeypatch: pytest.MonkeyPatch):
    """Makes a function the body of a command called ``probe``."""

    def add(body) -> None:
        monkeypatch.setattr(
            sys.modules[__name__], "probe", click.command("probe")(body), raising=False
        )
        monkeypatch.setitem(COMMANDS, "probe", CommandEntry(__name__, "probe", "A test's own."))

    return add


def test_version_names_the_native_build(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    pattern = rf"dwdp {re.escape(__version__)} \(native: host(\+cuda, CUDA .+ for .+)?\)\n"
    assert re.fullmatch(pattern, capsys.readouterr().out)


def test_version_says_so_when_the_native_module_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import dwdp

    monkeypatch.setitem(sys.modules, "dwdp._C", None)
    monkeypatch.delattr(dwdp, "_C", raising=False)
    assert cli_main.version_text().startswith(f"dwdp {__version__} (native: not available: ")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    for name, entry in COMMANDS.items():
        assert re.search(
            rf"^  {re.escape(name)} +{re.escape(entry.short_help)}$", text, re.MULTILINE
        )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_listed_command_exists_and_explains_itself(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None and command.name == name
    assert run([name, "--help"]) == 0
    assert f"dwdp {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["no-such-command"], "no-such-command"),
        (["--no-such-option"], "--no-such-option"),
        (["make-model", "--no-such-option"], "--no-such-option"),
    ],
)
def test_unknown_words_are_bad_input(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("dwdp: error: ")
    assert named in captured.err
    assert captured.err.count("\n") == 1


PLAN = ("plan", "deepseek-r1", "--hardware", "gb200", "--isl", "1024", "--osl", "8")
MAKE_MODEL = ("make-model", "{folder}/model", "--arch", "qwen3_moe")


@pytest.mark.parametrize(
    ("command", "flag", "value", "what"),
    [
        (MAKE_MODEL, "--expert-gib", "inf", "inf is not in the range 0<x<=1048576"),
        (MAKE_MODEL, "--expert-gib", "nan", "'nan' is not a finite number"),
        (MAKE_MODEL, "--expert-gib", "1e300", "1e+300 is not in the range"),
        (MAKE_MODEL, "--expert-gib", "big", "'big' is not a valid number"),
        (MAKE_MODEL, "--seed", str(2**64), f"{2**64} is not in the range 0<=x<={2**63 - 1}"),
        (MAKE_MODEL, "--num-layers", str(10**14), f"{10**14} is not in the range 1<=x<=10000"),
        (MAKE_MODEL, "--num-experts", str(10**20), "is not in the range 1<=x<=65536"),
        (MAKE_MODEL, "--hidden-size", str(10**20), "is not in the range 1<=x<=1048576"),
        (MAKE_MODEL, "--num-layers", "x", "'x' is not a valid integer"),
        (PLAN, "--ranks", "x", "'x' is not a valid integer"),
        (PLAN, "--tps-per-user", "nan", "'nan' is not a finite number"),
        (PLAN, "--tps-per-user", "inf", "'inf' is not a finite number"),
        (PLAN, "--load-cv", "x", "'x' is not a valid number"),
        (PLAN, "--json", "{folder}/none/plan.json", "there is no directory"),
        (("reproduce",), "--json", "{folder}/none/all.json", "there is no directory"),
    ],
)
def test_bad_values_are_refused_in_one_line(
    command: tuple[str, ...],
    flag: str,
    value: str,
    what: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run([word.format(folder=tmp_path) for word in (*command, flag, value)]) == 2
    error = capsys.readouterr().err
    assert what in error
    assert error.startswith("dwdp: error: ") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_plan_is_written_with_all_its_files_or_not_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    as_json = ["--json", str(tmp_path / "plan.json")]
    assert run([*PLAN, *as_json, "--out", str(tmp_path / "file" / "job")]) == 2
    assert f"{tmp_path / 'file' / 'job'}: Not a directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

    assert run([*PLAN, *as_json, "--out", str(tmp_path / "new" / "job")]) == 0
    assert f"wrote {tmp_path / 'new' / 'job' / 'plan.json'}" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "new", "plan.json"]
    job = (tmp_path / "new" / "job" / "plan.json").read_text()
    assert job == (tmp_path / "plan.json").read_text()


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    assert "Commands:" in capsys.readouterr().err


def test_an_error_is_one_line_without_a_traceback(
    add_command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def body() -> None:
        raise ValueError("first line\n  second line")

    monkeypatch.setenv("DWDP_DEBUG", "0")
    add_command(body)
    assert run(["probe"]) == 2
    assert capsys.readouterr().err == "dwdp: error: first line second line\n"


@pytest.mark.parametrize("how", ["option", "environment"])
def test_debug_shows_the_traceback_too(
    how: str, add_command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def body() -> None:
        raise RuntimeError("it broke")

    add_command(body)
    if how == "environment":
        monkeypatch.setenv("DWDP_DEBUG", "1")
    assert run(["probe"] if how == "environment" else ["--debug", "probe"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback (most recent call last):")
    assert error.endswith("dwdp: error: it broke\n")


def test_a_command_can_choose_its_exit_code(add_command) -> None:
    add_command(lambda: click.get_current_context().exit(3))
    assert run(["probe"]) == 3


def _in_use() -> Exception:
    error = RuntimeError("cannot serve on 127.0.0.1:80")
    error.__cause__ = OSError(errno.EADDRINUSE, "Address already in use")
    return error


def _invalid_config() -> Exception:
    try:
        DwdpConfig(dwdp_size=0)
    except pydantic.ValidationError as error:
        return error
    raise AssertionError("dwdp_size 0 was accepted")


@pytest.mark.parametrize(
    ("error", "exit_code", "text"),
    [
        (ValueError("17 experts"), 2, "17 experts"),
        (_invalid_config(), 2, "dwdp_size: Input should be greater than or equal to 1"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/m"), 2, "/m: No such file"),
        (PermissionError(errno.EACCES, "Permission denied", "/m"), 2, "/m: Permission denied"),
        (_in_use(), 2, "127.0.0.1:80"),
        (OSError(errno.ENOSPC, "No space left on device", "/m"), 1, "/m: No space left"),
        (FabricError("mmap of 4096 bytes failed"), 1, "mmap of 4096 bytes failed"),
        (MemoryError(), 1, "out of memory"),
        (KeyError("x"), 1, "internal error, KeyError: 'x'"),
        (
            ModuleNotFoundError("No module", name="transformers"),
            1,
            "pip install 'dwdp[transformers]'",
        ),
    ],
)
def test_errors_are_sorted_into_bad_input_and_failure(
    error: Exception, exit_code: int, text: str
) -> None:
    described, code = describe_error(error)
    assert code == exit_code
    assert text in described


def test_interrupt_ends_with_130_and_no_words() -> None:
    script = (
        "import sys, time, click\n"
        "from dwdp.cli import main as m\n"
        "@click.command()\n"
        "def probe():\n"
        "    print('started', flush=True)\n"
        "    time.sleep(60)\n"
        "m.COMMANDS['probe'] = m.CommandEntry('__main__', 'probe', 'A test\\'s own.')\n"
        "m.main(['probe'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error.strip() == ""


def test_python_dash_m_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dwdp", "nope"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "DWDP_DEBUG": "0"},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("dwdp: error: ")


def test_standard_streams_that_are_closed_lead_nowhere(tmp_path: Path) -> None:
    script = (
        "import os, subprocess, sys, click\n"
        "from pathlib import Path\n"
        "from dwdp.cli import main as m\n"
        "@click.command()\n"
        "@click.argument('path', type=Path)\n"
        "def probe(path):\n"
        "    ours = [os.readlink(f'/proc/self/fd/{n}') for n in range(3)]\n"
        "    print('lost')\n"
        "    print('lost', file=sys.stderr)\n"
        "    assert sys.stdin.read() == ''\n"
        "    with path.open('w') as file:\n"
        "        child = subprocess.run(['sh', '-c', 'echo a && echo b >&2'])\n"
        "        file.write(f'{ours} {child.returncode}')\n"
        "m.COMMANDS['probe'] = m.CommandEntry('__main__', 'probe', 'A test\\'s own.')\n"
        "m.main(['probe', sys.argv[1]])\n"
    )
    found = tmp_path / "found"
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    done = subprocess.run([*closed, sys.executable, "-c", script, str(found)], timeout=60)
    assert done.returncode == 0
    assert found.read_text() == f"{['/dev/null'] * 3} 0"


def test_an_error_without_standard_error_is_still_an_exit_code() -> None:
    closed = ["sh", "-c", 'exec "$@" 2>&-', "sh"]
    done = subprocess.run(
        [*closed, sys.executable, "-m", "dwdp", "generate", "/nowhere", "--prompt", "x"],
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
