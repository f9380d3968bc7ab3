"""Entry point of ``dwdp``: finds the command, imports only that one, reports errors in one line.

Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import NamedTuple

import click

from dwdp._version import __version__

EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

_BAD_INPUT_ERRNOS = frozenset(
    {
        errno.EACCES,
        errno.EADDRINUSE,
        errno.EEXIST,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.ENOTEMPTY,
        errno.EPERM,
        errno.EROFS,
    }
)

_EXTRAS = {
    "httptools": "serve",
    "prometheus_client": "serve",
    "matplotlib": "plot",
    "safetensors": "transformers",
    "starlette": "serve",
    "tokenizers": "transformers",
    "transformers": "transformers",
    "uvicorn": "serve",
    "uvloop": "serve",
}
"""Which extra of the package brings a module that only some commands need."""


class CommandEntry(NamedTuple):
    """Where a command lives. The module is imported when the command is run, not before."""

    module: str
    attribute: str
    short_help: str


COMMANDS = {
    "doctor": CommandEntry(
        "dwdp.cli.doctor", "doctor", "Say what dwdp can do here, and with this TensorRT-LLM."
    ),
    "generate": CommandEntry(
        "dwdp.cli.generate", "generate", "Generate text with a group of ranks on this machine."
    ),
    "make-model": CommandEntry(
        "dwdp.cli.make_model", "make_model", "Write a random-weight MoE checkpoint for tests."
    ),
    "serve": CommandEntry(
        "dwdp.cli.serve", "serve", "Serve a group of ranks on this machine to OpenAI clients."
    ),
    "plan": CommandEntry(
        "dwdp.cli.plan",
        "plan",
        "Say whether DWDP pays on given hardware, and set it up.",
    ),
    "reproduce": CommandEntry(
        "dwdp.cli.reproduce",
        "reproduce",
        "Show the paper's results beside the model's.",
    ),
}


@dataclass
class Settings:
    """What the options of ``dwdp`` itself say; the ``obj`` of every command's context."""

    debug: bool = False


class LazyGroup(click.Group):
    """A group that lists its commands from :data:`COMMANDS` and imports one only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command = getattr(import_module(entry.module), entry.attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name].short_help) for name in sorted(COMMANDS)])


def version_text() -> str:
    """``dwdp 0.1.0 (native: host)``: the version, and what the native module was built with."""
    try:
        from dwdp import _C
    except ImportError as error:
        return f"dwdp {__version__} (native: not available: {error})"
    info = _C.build_info()
    architectures = info.get("cuda_architectures")
    built_for = f", CUDA {info['cuda_version']} for {architectures}" if architectures else ""
    return f"dwdp {__version__} (native: {info['fabrics']}{built_for})"


def _print_version(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(version_text())
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and what the native module was built with.",
)
@click.option(
    "--debug",
    is_flag=True,
    envvar="DWDP_DEBUG",
    show_envvar=True,
    help="Show the traceback of an error.",
)
@click.pass_obj
def cli(settings: Settings, debug: bool) -> None:
    """Mixture-of-experts inference in which expert weights travel and tokens stay."""
    settings.debug = debug


def main(args: Sequence[str] | None = None) -> None:
    """Run ``dwdp`` with ``args`` (the process's own by default) and exit."""
    _open_missing_streams()
    signal.signal(signal.SIGTERM, _end)
    # A rank that ends takes its store along: torch would print a C++ trace beside the one-line error.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    sys.exit(run(sys.argv[1:] if args is None else args))


def _open_missing_streams() -> None:
    """Put /dev/null where the caller closed a standard stream.

    The next file or socket that is opened would get the stream's number otherwise, and be written to as if
    it were the stream, by this process or a child.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is taken, and that is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _end(signal_number: int, _frame: object) -> None:
    """End like on an error, so that what is half done is removed."""
    sys.exit(128 + signal_number)


def run(args: Sequence[str]) -> int:
    """Run ``dwdp`` and return its exit code; an error is reported on stderr in one line."""
    settings = Settings()
    try:
        result = cli.main(list(args), prog_name="dwdp", standalone_mode=False, obj=settings)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return EXIT_INTERRUPTED
    except Exception as error:
        if settings.debug:
            traceback.print_exc()
        text, exit_code = describe_error(error)
        print(f"dwdp: error: {' '.join(text.split())}", file=sys.stderr)
        return exit_code
    return result if isinstance(result, int) else 0


def describe_error(error: Exception) -> tuple[str, int]:
    """The text and the exit code for ``error``.

    What a user got wrong is a ``ValueError`` (pydantic's included), a click usage error, or a path or
    port that cannot be used; what went wrong on the way is a ``RuntimeError`` (``FabricError``,
    ``GroupError``) or another ``OSError``. Anything else is a defect, and says so.
    """
    if isinstance(error, click.UsageError):
        text = error.format_message().removesuffix(".")
        if error.ctx is not None:
            text += f" (see '{error.ctx.command_path} --help')"
        return text, error.exit_code
    if isinstance(error, click.FileError):
        return error.format_message(), EXIT_BAD_INPUT
    if isinstance(error, click.ClickException):
        return error.format_message(), error.exit_code
    if isinstance(error, ValueError):
        return _value_error_text(error), EXIT_BAD_INPUT
    if isinstance(error, OSError):
        return _os_error_text(error), _os_error_exit_code(error)
    if isinstance(error, MemoryError):
        return f"out of memory: {error}" if str(error) else "out of memory", EXIT_FAILURE
    if isinstance(error, RuntimeError) and str(error):
        cause = error.__cause__
        in_use = isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE
        return str(error), EXIT_BAD_INPUT if in_use else EXIT_FAILURE
    if isinstance(error, ModuleNotFoundError) and error.name in _EXTRAS:
        extra = _EXTRAS[error.name]
        return f"{error.name} is not installed: pip install 'dwdp[{extra}]'", EXIT_FAILURE
    name = type(error).__name__
    return f"internal error, {name}: {error} (DWDP_DEBUG=1 shows where)", EXIT_FAILURE


def _value_error_text(error: ValueError) -> str:
    if "pydantic" in sys.modules:
        from pydantic import ValidationError

        if isinstance(error, ValidationError):
            problems = error.errors(include_url=False, include_context=False)
            return "; ".join(
                ": ".join([*map(str, problem["loc"]), problem["msg"]]) for problem in problems
            )
    return str(error) or "bad value (DWDP_DEBUG=1 shows where)"


def _os_error_text(error: OSError) -> str:
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return ": ".join([*names, error.strerror or str(error)])


def _os_error_exit_code(error: OSError) -> int:
    return EXIT_BAD_INPUT if error.errno in _BAD_INPUT_ERRNOS else EXIT_FAILURE
