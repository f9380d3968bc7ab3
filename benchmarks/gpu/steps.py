"""Steps of the GPU report: each is a program with a time limit, so that one that hangs or breaks the
GPU's context costs its own figures only."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from figures import NOT_MEASURED, Part, read_tables

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
START_UP_S = 15.0
"""For a program to import torch and to start the GPU: not a benchmark's to measure in."""
KILL_S = 5.0
GOOD_CODES = (0, 1)
"""Of a benchmark that ran to its end: 1 means that a limit was missed."""


@dataclass(frozen=True)
class Step:
    """A program of the report.

    Attributes:
        limit_s: how long it may take.
        least_s: what the steps before it leave it; with less time it is not started.
    """

    name: str
    arguments: tuple[str, ...]
    limit_s: float
    least_s: float

    @property
    def command(self) -> str:
        return shlex.join(("python", *self.arguments))


@dataclass(frozen=True)
class Outcome:
    """How a program ended: ``returncode`` is None when it ran past its time."""

    returncode: int | None
    seconds: float
    output: str


def run(arguments: Sequence[str], limit_s: float) -> Outcome:
    """Run a Python program from the repository's root; it and all it started end within ``limit_s``."""
    folders = (str(ROOT), str(HERE), os.environ.get("PYTHONPATH"))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, folders)),
        "PYTHONUNBUFFERED": "1",
        "DWDP_BUILD_JOBS": os.environ.get("DWDP_BUILD_JOBS", "0"),
    }
    start = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        returncode: int | None
        try:
            returncode = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            returncode = None
        finally:
            if process.poll() is None:
                kill_group(process)
        log.seek(0)
        output = log.read().decode(errors="replace")
    return Outcome(returncode, time.monotonic() - start, output)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it started; what they held on the GPU is free a little later."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    end = time.monotonic() + KILL_S
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(process.pid, 0)
            time.sleep(0.05)


def last_line(output: str) -> str:
    """The last line that says something: where programs put their errors."""
    return next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "")


def build(step: Step, limit_s: float) -> Part:
    """Bring the native module up to date."""
    done = run(step.arguments, limit_s)
    part = Part(step.name, step.command, done.seconds)
    if done.returncode != 0:
        part.failed = True
        part.problem = (
            f"FAILED: ran past {limit_s:.0f} s"
            if done.returncode is None
            else f"FAILED: {last_line(done.output)}"
        )
        click.echo(done.output, err=True)
    return part


def benchmark(step: Step, limit_s: float) -> Part:
    """Run one benchmark; what it could not measure in its time is not measured."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "tables.json"
        budget_s = max(1.0, limit_s - START_UP_S)
        done = run(
            (*step.arguments, "--budget-s", f"{budget_s:.0f}", "--output", str(output)), limit_s
        )
        click.echo(done.output)
        part = Part(step.name, step.command, done.seconds)
        is_complete = False
        if output.is_file():
            part.tables, is_complete = read_tables(output)
    missing = f"not all {NOT_MEASURED.removeprefix('not ')}" if part.tables else NOT_MEASURED
    if done.returncode is not None and done.returncode not in GOOD_CODES:
        reason = last_line(done.output) or f"ended with code {done.returncode}"
        part.failed = True
        part.problem = f"FAILED: {reason}" if is_complete else f"FAILED, {missing}: {reason}"
    elif is_complete:
        return part
    elif done.returncode is None:
        part.problem = f"{missing}: ran past {limit_s:.0f} s"
    else:
        part.failed = True
        part.problem = f"FAILED, {missing}: {last_line(done.output)}"
    return part
