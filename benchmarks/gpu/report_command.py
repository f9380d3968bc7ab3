"""The command behind report.py: the steps, how they share the time, and the two files of a report."""

from __future__ import annotations

import datetime
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from figures import NOT_MEASURED, Part, table_json
from gpu_tests import gpu_tests
from steps import HERE, Step, benchmark, build, last_line, run

TOTAL_S = 500.0
BUILD = Step("build", ("setup.py", "--quiet", "build_ext", "--inplace"), 180, 0)
# Most telling first: what the time cuts off is the end.
TESTS = Step(
    "GPU tests",
    (
        *("-m", "pytest", "-q", "-m", "gpu"),
        "tests/gpu/test_gpu_sanitizer.py",
        "tests/gpu/test_gpu_slots.py",
        "tests/cuda",
        "tests/gpu/test_gpu_models.py",
        "tests/gpu/test_gpu_survival.py",
    ),
    170,
    90,
)
# Those that measure fewer rows in less time come last.
BENCHMARKS = (
    Step("issue time", ("benchmarks/gpu/issue_time.py",), 40, 25),
    Step("model", ("benchmarks/gpu/model_throughput.py",), 110, 70),
    Step("overlap", ("benchmarks/gpu/overlap.py",), 60, 35),
    Step("fetch bandwidth", ("benchmarks/gpu/fetch_bandwidth.py",), 70, 30),
    Step("demand against staged", ("benchmarks/gpu/demand_crossover.py",), 100, 40),
)


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


def describe_environment(limit_s: float) -> dict[str, str]:
    """Facts about the GPU and the versions; ends the program where there is no GPU."""
    done = run(("benchmarks/gpu/environment.py",), limit_s)
    if done.returncode != 0:
        click.echo(done.output.strip() or f"error: no GPU found within {limit_s:.0f} s", err=True)
        sys.exit(2)
    facts: dict[str, str] = json.loads(last_line(done.output))
    return facts


def limit_of(step: Step, later: tuple[Step, ...], left_s: float) -> float:
    """Seconds for ``step``: the later steps keep their least where it can be had; 0 for not at all."""
    if left_s < step.least_s:
        return 0.0
    reserved_s = sum(other.least_s for other in later)
    return min(step.limit_s, max(step.least_s, left_s - reserved_s))


def run_steps(environment: dict[str, str], built: Part, end_s: float) -> Iterator[list[Part]]:
    """Test and measure until ``end_s``. After each step: all parts, those to come without figures."""
    steps = (TESTS, *BENCHMARKS)
    parts = [built]
    parts += [Part(s.name, s.command, 0.0, f"{NOT_MEASURED}: not reached") for s in steps]
    yield parts
    for index, step in enumerate(steps, start=1):
        limit_s = limit_of(step, steps[index:], end_s - time.monotonic())
        if limit_s == 0.0:
            parts[index].problem = f"{NOT_MEASURED}: no time was left"
            continue
        click.echo(f"{step.name}: at most {limit_s:.0f} s")
        parts[index] = gpu_tests(step, limit_s) if step is TESTS else benchmark(step, limit_s)
        yield parts
    yield parts


@click.command(context_settings={"show_default": True})
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=HERE.parent / "results",
    show_default="benchmarks/results",
    help="Where the report goes.",
)
@click.option("--total-s", default=TOTAL_S, help="Seconds that everything together may take.")
@click.pass_obj
def report(start_s: float, output_dir: Path, total_s: float) -> None:
    """Build, test and measure dwdp on this machine's GPU, and write a report as it comes."""
    end_s = start_s + total_s
    built = build(BUILD, min(BUILD.limit_s, end_s - time.monotonic()))
    if built.failed:
        sys.exit(1)
    environment = describe_environment(min(60.0, end_s - time.monotonic()))
    click.echo(f"{environment['GPU']}: the native module took {built.seconds:.0f} s to build")
    date = datetime.date.today().isoformat()
    for parts in run_steps(environment, built, end_s):
        seconds = time.monotonic() - start_s
        written = Report(date, "make gpu-report", seconds, environment, parts)
        paths = written.write(output_dir)
    for path in paths:
        click.echo(f"wrote {path}")
    for part in written.parts:
        click.echo(f"{part.name}: {part.outcome}")
        for limit in part.missed:
            click.echo(f"  {limit}")
    sys.exit(0 if written.is_good else 1)
