"""One GPU report: builds dwdp, runs the GPU tests and every benchmark, and writes what came of them.

Every step is a process of its own with a time limit, so that one that hangs or breaks the GPU's context
costs its own figures only. What did not fit the time is written as not measured. Ends with 1 when the
build, a GPU test or a benchmark fails or a stated limit is missed, and with 2 where there is no GPU.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from figures import NOT_MEASURED, Column, Part, Table, read_tables, table_json

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
START_UP_S = 15.0
"""For a program to import torch and to start the GPU: not a benchmark's to measure in."""
KILL_S = 5.0
LEAST_S = 30.0
"""Nothing is started with less time than that left."""


@dataclass(frozen=True)
class Step:
    """A program of the report, and how long it may take."""

    name: str
    arguments: tuple[str, ...]
    limit_s: float

    @property
    def command(self) -> str:
        return shlex.join(("python", *self.arguments))


BUILD = Step("build", ("setup.py", "--quiet", "build_ext", "--inplace"), 180)
TESTS = Step("GPU tests", ("-m", "pytest", "-q", "-m", "gpu", "tests/gpu", "tests/cuda"), 180)
BENCHMARKS = (
    Step("fetch bandwidth", ("benchmarks/gpu/fetch_bandwidth.py",), 60),
    Step("issue time", ("benchmarks/gpu/issue_time.py",), 40),
    Step("overlap", ("benchmarks/gpu/overlap.py",), 60),
    Step("demand against staged", ("benchmarks/gpu/demand_crossover.py",), 95),
    Step("model", ("benchmarks/gpu/model_throughput.py",), 110),
)


@dataclass(frozen=True)
class Outcome:
    """How a program ended: ``returncode`` is None when it ran past its time."""

    returncode: int | None
    seconds: float
    output: str


def run(arguments: Sequence[str], limit_s: float) -> Outcome:
    """Run a Python program from the repository's root; it and all it started end within ``limit_s``."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
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


def build(limit_s: float) -> Part:
    """Bring the native module up to date."""
    done = run(BUILD.arguments, limit_s)
    part = Part(BUILD.name, BUILD.command, done.seconds)
    if done.returncode != 0:
        part.failed = True
        part.problem = (
            f"FAILED: ran past {limit_s:.0f} s"
            if done.returncode is None
            else f"FAILED: {last_line(done.output)}"
        )
        click.echo(done.output, err=True)
    return part


def gpu_tests(limit_s: float) -> Part:
    """Run the tests marked ``gpu``; each of them is a row."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "junit.xml"
        own_limit_s = max(5.0, limit_s - START_UP_S)
        done = run(
            (
                *TESTS.arguments,
                f"--junitxml={result}",
                f"--session-timeout={own_limit_s:.0f}",
                "--timeout=120",
                "-p",
                "no:cacheprovider",
            ),
            limit_s,
        )
        click.echo(done.output)
        part = Part(TESTS.name, TESTS.command, done.seconds)
        if not result.is_file():
            part.failed = True
            part.problem = f"FAILED: no results: {last_line(done.output) or 'ran past its time'}"
            return part
        part.tables = [read_junit(result)]
    passed = sum(row[1] == "passed" for row in part.tables[0].rows)
    part.failed = done.returncode != 0 or passed == 0
    if part.failed:
        part.problem = f"FAILED: {last_line(done.output)}"
    return part


def read_junit(path: Path) -> Table:
    """Every test of pytest's junit file."""
    rows, notes = [], []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        outcome = "passed"
        for kind, word in (("failure", "FAILED"), ("error", "FAILED"), ("skipped", "skipped")):
            entry = case.find(kind)
            if entry is not None:
                outcome = word
                reason = " ".join((entry.get("message") or "").split())
                notes.append(f"{name}: {word}: {reason[:400]}")
        rows.append((name, outcome, float(case.get("time") or 0)))
    columns = (Column("test"), Column("outcome"), Column("s", ".1f"))
    return Table("GPU tests", columns, tuple(rows), tuple(dict.fromkeys(notes)))


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
        if output.is_file():
            part.tables = read_tables(output)
        elif done.returncode is None:
            part.problem = f"{NOT_MEASURED}: ran past {limit_s:.0f} s"
        else:
            part.failed = True
            part.problem = f"FAILED, {NOT_MEASURED}: {last_line(done.output)}"
    return part


@dataclass(frozen=True)
class Report:
    """All parts, and what they were measured on."""

    date: str
    command: str
    seconds: float
    environment: dict[str, str]
    parts: list[Part]

    @property
    def is_good(self) -> bool:
        """Whether nothing failed and no limit was missed."""
        return not any(part.failed or part.missed for part in self.parts)

    @property
    def name(self) -> str:
        """``<gpu>-<date>``."""
        gpu = re.sub(r"^nvidia ", "", self.environment["GPU"].lower())
        return f"{re.sub(r'[^a-z0-9]+', '-', gpu).strip('-')}-{self.date}"

    def markdown(self) -> str:
        facts = [*self.environment.items(), ("command", f"`{self.command}`")]
        facts.append(("took", f"{self.seconds:.0f} s"))
        rows = "\n".join(f"| {name} | {fact} |" for name, fact in facts)
        outcomes = "\n".join(
            f"| {part.name} | {part.seconds:.0f} | {part.outcome} |" for part in self.parts
        )
        sections = [
            f"# GPU report: {self.environment['GPU']}, {self.date}",
            "| | |\n| --- | --- |\n" + rows,
            "| part | s | outcome |\n| --- | ---: | --- |\n" + outcomes,
        ]
        for part in self.parts:
            if part.tables or part.name in {step.name for step in BENCHMARKS}:
                sections.append(f"## {part.name[0].upper()}{part.name[1:]}\n\n`{part.command}`")
                sections += [part.problem] if part.problem else []
                sections += [table.markdown() for table in part.tables]
        return "\n\n".join(sections) + "\n"

    def json(self) -> dict[str, Any]:
        return {
            "date": self.date,
            "command": self.command,
            "seconds": self.seconds,
            "environment": self.environment,
            "parts": [
                {
                    "name": part.name,
                    "command": part.command,
                    "seconds": part.seconds,
                    "outcome": part.outcome,
                    "failed": part.failed,
                    "tables": [table_json(table) for table in part.tables],
                }
                for part in self.parts
            ],
        }

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write ``<name>.md`` and ``<name>.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = (folder / f"{self.name}.md", folder / f"{self.name}.json")
        paths[0].write_text(self.markdown())
        paths[1].write_text(json.dumps(self.json(), indent=2) + "\n")
        return paths


def describe_environment() -> dict[str, str]:
    """Facts about the GPU and the versions; ends the program where there is no GPU."""
    done = run(("benchmarks/gpu/environment.py",), 60)
    if done.returncode != 0:
        click.echo(done.output.strip(), err=True)
        sys.exit(2)
    facts: dict[str, str] = json.loads(last_line(done.output))
    return facts


def run_parts(total_s: float) -> tuple[dict[str, str], list[Part]]:
    """Build, look at the environment, test and measure, within ``total_s``."""
    end = time.monotonic() + total_s

    def limit(step: Step) -> float:
        return min(step.limit_s, end - time.monotonic())

    parts = [build(limit(BUILD))]
    if parts[0].failed:
        sys.exit(1)
    environment = describe_environment()
    click.echo(f"{environment['GPU']}: the native module took {parts[0].seconds:.0f} s to build")
    for step in (TESTS, *BENCHMARKS):
        left_s = limit(step)
        if left_s < LEAST_S:
            problem = f"{NOT_MEASURED}: no time was left"
            parts.append(Part(step.name, step.command, 0.0, problem, failed=step is TESTS))
            continue
        click.echo(f"{step.name}: at most {left_s:.0f} s")
        parts.append(gpu_tests(left_s) if step is TESTS else benchmark(step, left_s))
    return environment, parts


@click.command(context_settings={"show_default": True})
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=HERE.parent / "results",
    show_default="benchmarks/results",
    help="Where the report goes.",
)
@click.option("--total-s", default=520.0, help="Seconds that everything together may take.")
def main(output_dir: Path, total_s: float) -> None:
    """Build, test and measure dwdp on this machine's GPU, and write a report."""
    start = time.monotonic()
    environment, parts = run_parts(total_s)
    report = Report(
        datetime.date.today().isoformat(),
        "make gpu-report",
        time.monotonic() - start,
        environment,
        parts,
    )
    for path in report.write(output_dir):
        click.echo(f"wrote {path}")
    for part in parts:
        click.echo(f"{part.name}: {part.outcome}")
        for limit in part.missed:
            click.echo(f"  {limit}")
    sys.exit(0 if report.is_good else 1)


if __name__ == "__main__":
    main()
