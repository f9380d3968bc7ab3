"""A pytest plugin: writes what came of every test as soon as it is known, and stops in time.

    python -m pytest -p outcome_log --outcome-log=FILE --no-test-after=SECONDS

FILE gets one JSON object per line: ``{"collected": [...]}``, ``{"started": test, "at": seconds}``,
``{"test": ..., "outcome": ..., "seconds": ..., "reason": ...}`` and ``{"stopped": true}``. Times are of
``time.monotonic()``, which all processes of a machine share.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, TextIO

import pytest

PASSED, FAILED, SKIPPED = "passed", "FAILED", "skipped"
REASON_CHARACTERS = 400


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("outcome log")
    group.addoption("--outcome-log", type=Path, help="file that outcomes are written to")
    group.addoption(
        "--no-test-after", type=float, help="time.monotonic() from which no test is begun"
    )


def pytest_configure(config: pytest.Config) -> None:
    path: Path | None = config.getoption("--outcome-log")
    if path is not None:
        end_s: float | None = config.getoption("--no-test-after")
        config.pluginmanager.register(OutcomeLog(path, end_s))


class OutcomeLog:
    """Writes to ``path``; begins no test from ``end_s`` on, if that is given."""

    def __init__(self, path: Path, end_s: float | None) -> None:
        self._file: TextIO = path.open("w", buffering=1)
        self._end_s = end_s
        self._reports: list[pytest.TestReport] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(
                test=report.nodeid, outcome=FAILED, seconds=0.0, reason=reason_of(report.longrepr)
            )

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._write(collected=[item.nodeid for item in session.items])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._reports.clear()
        self._write(started=nodeid, at=time.monotonic())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        outcome, reason = PASSED, ""
        for report in self._reports:
            if report.failed:
                outcome, reason = FAILED, reason_of(report.longrepr)
                break
            if report.skipped:
                outcome, reason = SKIPPED, reason_of(report.longrepr)
        seconds = sum((report.duration for report in self._reports), 0.0)
        self._write(test=nodeid, outcome=outcome, seconds=seconds, reason=reason)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        if self._end_s is not None and time.monotonic() >= self._end_s:
            self._write(stopped=True)
            raise item.session.Interrupted("no test is begun any more: the time is up")

    def pytest_unconfigure(self) -> None:
        self._file.close()

    def _write(self, **entry: object) -> None:
        self._file.write(json.dumps(entry) + "\n")


def reason_of(longrepr: Any) -> str:
    """The line that says why: of a failure's last frame, or of a skip."""
    if isinstance(longrepr, tuple):
        text = str(longrepr[2]).removeprefix("Skipped: ")
    else:
        crash = getattr(longrepr, "reprcrash", None)
        text = crash.message if crash is not None else str(longrepr)
    return " ".join(text.split())[:REASON_CHARACTERS]
