"""The ``dwdp`` command itself: help, version, exit codes, one line per error."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time

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
