"""Tables of figures: what a benchmark hands over, what people read, and what programs read.

A cell is a figure, a text, or None for a figure that was not measured. Nothing is ever filled in for
one: it is shown as "not measured", and a limit that rests on it is neither met nor missed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

NOT_MEASURED = "not measured"
NONE = "-"
"""Where there is nothing to measure."""

Cell = str | int | float | None


@dataclass(frozen=True)
class Column:
    """A heading, and how its figures are written (a format specification; texts stay as they are)."""

    name: str
    format: str = ""

    def text(self, cell: Cell) -> str:
        if cell is None:
            return NOT_MEASURED
        return cell if isinstance(cell, str) else format(cell, self.format)


@dataclass(frozen=True)
class Limit:
    """What a figure has to be: ``worst`` is the worst one measured, None if none was."""

    what: str
    worst: float | None
    at_least: float = -math.inf
    at_most: float = math.inf

    @classmethod
    def floor(cls, what: str, figures: Iterable[float | None], at_least: float) -> Limit:
        """Every figure has to be ``at_least`` so much."""
        return cls(what, min((f for f in figures if f is not None), default=None), at_least)

    @classmethod
    def ceiling(cls, what: str, figures: Iterable[float | None], at_most: float) -> Limit:
        """Every figure has to be ``at_most`` so much."""
        worst = max((f for f in figures if f is not None), default=None)
        return cls(what, worst, at_most=at_most)

    @property
    def is_missed(self) -> bool:
        """Whether a figure was measured and lies outside."""
        return self.worst is not None and not self.at_least <= self.worst <= self.at_most

    def __str__(self) -> str:
        wanted = (
            f"at least {self.at_least:.3g}"
            if self.at_most == math.inf
            else f"at most {self.at_most:.3g}"
        )
        if self.worst is None:
            return f"{self.what}: {NOT_MEASURED} ({wanted} is wanted)"
        verdict = "MISSED" if self.is_missed else "met"
        return f"{self.what}: worst {self.worst:.3g}, {wanted} is wanted: {verdict}"


@dataclass(frozen=True)
class Table:
    """Figures of one benchmark.

    Attributes:
        title: what was measured.
        columns: headings; ratios are a column of their own.
        rows: one cell per column.
        notes: what a reader has to know, baselines above all.
        limits: what the figures have to be.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    limits: tuple[Limit, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"{self.title}: a row of {len(row)} cells under {len(self.columns)} headings"
                )

    def texts(self) -> list[list[str]]:
        """The cells as they are shown."""
        return [
            [column.text(cell) for column, cell in zip(self.columns, row, strict=True)]
            for row in self.rows
        ]

    def markdown(self) -> str:
        """The table in GitHub's Markdown, under a heading of level 3."""
        rule = ["---:" if self._is_numeric(i) else "---" for i in range(len(self.columns))]
        lines = [[column.name for column in self.columns], rule, *self.texts()]
        body = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        parts = [f"### {self.title}", body, *self.notes]
        if self.limits:
            parts.append("\n".join(f"- {limit}" for limit in self.limits))
        return "\n\n".join(parts)

    def show(self, console: Console) -> None:
        """Print the table, its notes and its limits."""
        shown = RichTable(title=escape(self.title), box=box.SIMPLE_HEAD, title_justify="left")
        for index, column in enumerate(self.columns):
            shown.add_column(
                escape(column.name), justify="right" if self._is_numeric(index) else "left"
            )
        for cells in self.texts():
            shown.add_row(*map(escape, cells))
        console.print(shown)
        for note in self.notes:
            console.print(escape(note))
        for limit in self.limits:
            console.print(escape(str(limit)), style="bold red" if limit.is_missed else "")

    def _is_numeric(self, index: int) -> bool:
        return not any(isinstance(row[index], str) and row[index] != NONE for row in self.rows)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Table:
        """The inverse of ``asdict``, after a trip through JSON."""
        return cls(
            value["title"],
            tuple(Column(**column) for column in value["columns"]),
            tuple(tuple(row) for row in value["rows"]),
            tuple(value["notes"]),
            tuple(
                Limit(
                    limit["what"],
                    limit["worst"],
                    -math.inf if limit["at_least"] is None else limit["at_least"],
                    math.inf if limit["at_most"] is None else limit["at_most"],
                )
                for limit in value["limits"]
            ),
        )


def table_json(table: Table) -> dict[str, Any]:
    """A table as JSON has it: an open side of a limit is null, for JSON knows no infinity."""
    value = asdict(table)
    for limit in value["limits"]:
        for side in ("at_least", "at_most"):
            if math.isinf(limit[side]):
                limit[side] = None
    return value


def write_tables(path: Path, tables: Sequence[Table], *, is_complete: bool) -> None:
    """Write tables for :func:`read_tables`, at once, whatever is there already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    value = {"is_complete": is_complete, "tables": [table_json(table) for table in tables]}
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(value, indent=2) + "\n")
    beside.replace(path)


def read_tables(path: Path) -> tuple[list[Table], bool]:
    """The tables that a benchmark wrote last, and whether it had come to its end."""
    value = json.loads(path.read_text())
    return [Table.from_json(table) for table in value["tables"]], value["is_complete"]


@dataclass
class Part:
    """One step of a report: the build, the tests or a benchmark.

    Attributes:
        name: short name.
        command: what was run.
        seconds: how long it took.
        problem: why there are no figures, or not all of them; empty if it ran to its end.
        failed: whether the report fails because of it.
        tables: its figures.
    """

    name: str
    command: str
    seconds: float
    problem: str = ""
    failed: bool = False
    tables: list[Table] = field(default_factory=list)

    @property
    def missed(self) -> list[Limit]:
        """Limits that measured figures break."""
        return [limit for table in self.tables for limit in table.limits if limit.is_missed]

    @property
    def outcome(self) -> str:
        """One line: what came of it."""
        if self.problem:
            return self.problem
        if self.missed:
            return f"{len(self.missed)} limit(s) missed"
        return "done"
