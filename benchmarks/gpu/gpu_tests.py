"""The GPU tests as a part of the report: every test is a row, whatever became of the tests after it."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import click
from figures import Cell, Column, Part, Table
from outcome_log import FAILED, PASSED
from steps import Outcome, Step, last_line, run

TEST_LIMIT_S = 60
"""For one test, its fixtures included."""
LAST_TEST_S = 10.0
"""No test is begun with less time than that left."""
NOT_RUN = "not run"


@dataclass
class Log:
    """What the plugin of :mod:`outcome_log` wrote.

    Attributes:
        collected: names of all tests, in the order in which they run.
        outcomes: outcome, seconds and reason of those that ended, by name.
        running: the test that had begun and not ended, and when it began.
        is_stopped: whether tests were left out for lack of time.
    """

    collected: list[str] = field(default_factory=list)
    outcomes: dict[str, tuple[str, float, str]] = field(default_factory=dict)
    running: tuple[str, float] | None = None
    is_stopped: bool = False

    @classmethod
    def read(cls, path: Path) -> Log:
        """A line that was cut off in the midst of writing is left out."""
        log = cls()
        text = path.read_text() if path.is_file() else ""
        for line in text.splitlines(keepends=True):
            if line.endswith("\n"):
                log._add(json.loads(line))
        return log

    def _add(self, entry: dict[str, object]) -> None:
        match entry:
            case {"collected": list(names)}:
                self.collected = names
            case {"started": str(name), "at": float(at)}:
                self.running = (name, at)
            case {"test": str(name), "outcome": str(outcome), "seconds": float(seconds)}:
                self.outcomes[name] = (outcome, seconds, str(entry["reason"]))
                self.running = None
            case {"stopped": True}:
                self.is_stopped = True

    def end(self, done: Outcome, end_s: float) -> None:
        """Judge the test during which pytest ended: by itself, or at ``end_s`` because time was up."""
        if self.running is None:
            return
        name, begun_s = self.running
        seconds = max(0.0, end_s - begun_s)
        if done.returncode is not None:
            reason = f"pytest ended in it, with code {done.returncode}"
        elif seconds >= TEST_LIMIT_S:
            reason = f"did not end within {TEST_LIMIT_S} s"
        else:
            return
        self.outcomes[name] = (FAILED, seconds, reason)

    def table(self) -> Table:
        rows: list[tuple[Cell, ...]] = []
        notes = []
        for name in dict.fromkeys((*self.collected, *self.outcomes)):
            outcome, seconds, reason = self.outcomes.get(name, (NOT_RUN, None, ""))
            rows.append((short(name), outcome, seconds))
            if reason:
                notes.append(f"{short(name)}: {outcome}: {reason}")
        columns = (Column("test"), Column("outcome"), Column("s", ".1f"))
        return Table("GPU tests", columns, tuple(rows), tuple(notes))


def short(name: str) -> str:
    """``test_x::test_a[b]`` of ``tests/gpu/test_x.py::test_a[b]``."""
    file, _, test = name.partition("::")
    return f"{Path(file).stem}::{test}" if test else Path(file).stem


def gpu_tests(step: Step, limit_s: float) -> Part:
    """Run the tests marked ``gpu``."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "outcomes.jsonl"
        end_s = time.monotonic() + limit_s
        options = (
            "-p",
            "outcome_log",
            f"--outcome-log={path}",
            f"--no-test-after={end_s - LAST_TEST_S}",
            f"--timeout={TEST_LIMIT_S}",
            "--continue-on-collection-errors",
            "-p",
            "no:cacheprovider",
        )
        done = run((*step.arguments, *options), limit_s)
        log = Log.read(path)
    log.end(done, end_s)
    click.echo(done.output)
    part = Part(step.name, step.command, done.seconds)
    part.tables = [log.table()] if log.collected or log.outcomes else []
    part.failed, part.problem = verdict(log, done)
    return part


def verdict(log: Log, done: Outcome) -> tuple[bool, str]:
    """Whether the tests failed, and what is to say about them; nothing where all ran and passed."""
    outcomes = [outcome for outcome, _, _ in log.outcomes.values()]
    num_failed = outcomes.count(FAILED)
    num_all = len({*log.collected, *log.outcomes})
    cut_short = f"not all run: {len(outcomes)} of {num_all}, the time was up"
    is_out_of_time = done.returncode is None or log.is_stopped
    if num_failed:
        left_out = f"; {cut_short}" if is_out_of_time and len(outcomes) < num_all else ""
        return True, f"FAILED: {num_failed} of {num_all} tests failed{left_out}"
    if is_out_of_time and len(outcomes) < num_all:
        return False, cut_short
    if done.returncode is None:
        return True, f"FAILED: pytest did not end after {len(outcomes)} of {num_all} tests"
    if PASSED not in outcomes or done.returncode != 0:
        reason = last_line(done.output) or f"pytest ended with code {done.returncode}"
        return True, f"FAILED: {outcomes.count(PASSED)} of {num_all} tests passed: {reason}"
    return False, ""
