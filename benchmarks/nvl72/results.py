"""The results of a sweep: every run with what was measured and what was expected, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from measurements import Measurement, read_measurement
from points import point_folders
from prediction import Expectations, Prediction
from sweep import Point, Sweep, read_section

SCHEMA = "dwdp-nvl72-1"


@dataclass(frozen=True)
class Run:
    """One load on one point.

    Attributes:
        measured: None: not measured.
    """

    point: Point
    concurrency: int
    predicted: Prediction
    measured: Measurement | None

    @property
    def usable(self) -> Measurement | None:
        """What may be compared: a measurement in which no request failed."""
        return self.measured if self.measured is not None and not self.measured.failed else None

    def as_json(self) -> dict[str, Any]:
        """Plain data, stable keys."""
        return {
            "point": self.point.model_dump(mode="json"),
            "concurrency": self.concurrency,
            "predicted": asdict(self.predicted),
            "measured": None if self.measured is None else self.measured.as_json(),
        }


@dataclass(frozen=True)
class Results:
    """All runs of a sweep."""

    sweep: Sweep
    expectations: Expectations
    runs: tuple[Run, ...]

    @property
    def num_measured(self) -> int:
        """Runs with a result."""
        return sum(run.measured is not None for run in self.runs)

    def as_json(self) -> dict[str, Any]:
        """Plain data, stable keys."""
        return {
            "schema": SCHEMA,
            "sweep": self.sweep.model_dump(mode="json"),
            "runs": [run.as_json() for run in self.runs],
        }


def collect(folder: Path) -> Results:
    """Read the results in a sweep's folder.

    Raises:
        ValueError: not such a folder, or a file in it is broken; one line that names it.
    """
    folders = point_folders(folder)
    sweep: Sweep = read_section(folder / "sweep.yaml", Sweep)
    expectations = Expectations(sweep.model, sweep.hardware)
    order = {point.name: number for number, point in enumerate(sweep.expanded)}
    points = []
    for target in folders:
        content = yaml.safe_load((target / "point.yaml").read_text(encoding="utf-8"))
        points.append((target, Point.model_validate(content)))
    points.sort(key=lambda item: order.get(item[1].name, len(order)))
    runs = tuple(
        Run(
            point,
            concurrency,
            expectations.of(point, concurrency),
            read_measurement(target, point, concurrency),
        )
        for target, point in points
        for concurrency in point.concurrency
    )
    return Results(sweep, expectations, runs)
