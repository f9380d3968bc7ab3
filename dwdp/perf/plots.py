"""Pictures of the performance model, as SVG (and PNG where asked). Needs matplotlib (``dwdp[plot]``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from dwdp.perf import paper
from dwdp.perf.beyond import Gain
from dwdp.perf.calibration import paper_model
from dwdp.perf.reproduce import (
    BREAKDOWN,
    TABLE_1_COLLECTIVE,
    TABLE_1_FORMATS,
    Reproduction,
    end_to_end_gain,
    table_1_time,
)

_PAPER, _OURS = "#1a1a1a", "#0072b2"
_COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#999999")
_WIDTH_INCHES = 6.4


@contextmanager
def figure(
    paths: Sequence[Path], columns: int = 1, height_inches: float = 3.2
) -> Iterator[tuple[Any, list[Any]]]:
    """A figure with ``columns`` axes, saved to every path (``.svg`` or ``.png``) at the end.

    Equal content gives equal files: no dates, no random identifiers.
    """
    matplotlib = import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = import_module("matplotlib.pyplot")
    settings = {
        "svg.hashsalt": "dwdp",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "legend.frameon": False,
    }
    with pyplot.rc_context(settings):
        picture, axes = pyplot.subplots(
            1, columns, figsize=(_WIDTH_INCHES, height_inches), squeeze=False
        )
        yield picture, list(axes[0])
        picture.tight_layout()
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            metadata = {"Date": None} if path.suffix == ".svg" else None
            picture.savefig(path, metadata=metadata, dpi=150)
        pyplot.close(picture)


def plot_roofline(path: Path) -> None:
    """Both columns of table 1 over the input length."""
    model = paper_model().with_formats(**TABLE_1_FORMATS)
    lengths = [round(1024 * 2 ** (step / 4)) for step in range(21)]
    times = [table_1_time(model, TABLE_1_COLLECTIVE, length) for length in lengths]
    with figure([path], columns=2) as (_, (left, right)):
        left.plot(lengths, [time.compute_to_prefetch for time in times], color=_OURS, label="model")
        right.plot(lengths, [time.dep_to_dwdp for time in times], color=_OURS, label="model")
        isls = [row.isl for row in paper.TABLE_1]
        left.plot(
            isls,
            [row.compute_to_prefetch for row in paper.TABLE_1],
            "o",
            color=_PAPER,
            label="paper",
        )
        right.plot(
            isls, [row.dep_to_dwdp for row in paper.TABLE_1], "o", color=_PAPER, label="paper"
        )
        left.set_yscale("log")
        for axes, title in ((left, "T_compute / T_prefetch"), (right, "T_DEP / T_DWDP")):
            axes.set_xscale("log", base=2)
            axes.axhline(1, color="grey", linewidth=0.8)
            axes.set_title(title)
            axes.set_xlabel("input length, tokens")
            axes.legend()


def plot_breakdown(reproduction: Reproduction, path: Path) -> None:
    """Stacked iterations of table 3, paper and model."""
    rows = [row for row in paper.DEP4_MS if row != "iteration"]
    ours = {
        (cell.column, cell.row): cell.ours
        for cell in reproduction.cells
        if cell.result == BREAKDOWN
    }
    bars = [
        ("DEP4\npaper", [paper.DEP4_MS[row] for row in rows]),
        ("DEP4\nmodel", [ours["DEP4", row] for row in rows]),
        ("DWDP4\npaper", [paper.DWDP4_MS[row] for row in rows]),
        ("DWDP4\nmodel", [ours["DWDP4", row] for row in rows]),
    ]
    with figure([path]) as (_, (axes,)):
        names = [name for name, _ in bars]
        bottoms = [0.0] * len(bars)
        for index, row in enumerate(rows):
            heights = [values[index] for _, values in bars]
            axes.bar(names, heights, 0.6, bottom=bottoms, label=row, color=_COLOURS[index])
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
        axes.set_ylabel("ms per iteration")
        axes.grid(axis="x", visible=False)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def plot_synchronisation(reproduction: Reproduction, path: Path) -> None:
    """Share of a DEP iteration spent waiting, over the variation of the load."""
    with figure([path], height_inches=2.6) as (_, (axes,)):
        axes.plot(
            [100 * cv for cv, _ in reproduction.sync_curve],
            [100 * share for _, share in reproduction.sync_curve],
            color=_OURS,
            label="model, 4 ranks",
        )
        low, high = paper.SYNCHRONISATION_SHARE_AT_CV_20
        axes.plot([20, 20], [100 * low, 100 * high], color=_PAPER, linewidth=4, label="paper")
        axes.set_xlabel("CV of the load between ranks, %")
        axes.set_ylabel("waiting, % of an iteration")
        axes.legend()


def plot_end_to_end(reproduction: Reproduction, path: Path) -> None:
    """Gain in output TPS/GPU over the speed that users get."""
    model, calibration = paper_model(), reproduction.calibration
    speeds = range(20, 181, 10)
    with figure([path], height_inches=2.8) as (_, (axes,)):
        for tokens, style, label in (
            (32768, "-", "model, full prefill forwards"),
            (8192, "--", "model, one prompt per forward"),
        ):
            gains = [end_to_end_gain(calibration, model, tps, tokens) for tps in speeds]
            axes.plot(speeds, gains, style, color=_OURS, label=label)
        for index, row in enumerate(paper.TABLE_4):
            name = "paper" if index == 0 else None
            axes.plot([row.low, row.high], [row.gain] * 2, color=_PAPER, linewidth=4, label=name)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set_xlabel("TPS/user")
        axes.set_ylabel("TPS/GPU, DWDP over DEP")
        axes.legend()


def plot_beyond(gains: Sequence[Gain], path: Path) -> None:
    """Gains of each idea over the paper's design, grouped by input length, for the larger load CV."""
    load_cv = max(gain.load_cv for gain in gains)
    isls = sorted({gain.isl for gain in gains})
    names = list(dict.fromkeys(gain.idea for gain in gains))
    value = {(g.idea, g.isl): g.gain for g in gains if g.load_cv == load_cv}
    with figure([path], height_inches=3.0) as (_, (axes,)):
        width = 0.8 / len(names)
        for index, name in enumerate(names):
            positions = [
                place + (index - (len(names) - 1) / 2) * width for place in range(len(isls))
            ]
            heights = [value[name, isl] - 1 for isl in isls]
            axes.bar(positions, heights, width, bottom=1, label=name, color=_COLOURS[index])
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set_xticks(range(len(isls)), [f"ISL {isl:,}" for isl in isls])
        axes.set_ylabel("tokens/s over the paper's design")
        axes.grid(axis="x", visible=False)
        axes.legend(fontsize=7)


def plot_pareto(
    points: Sequence[tuple[float, float | None, float | None]], paths: Sequence[Path]
) -> None:
    """Output TPS/GPU over TPS/user: (speed, DWDP, expert parallelism) per point."""
    with figure(paths) as (_, (axes,)):
        for column, label, colour in (
            (1, "DWDP in prefill", _OURS),
            (2, "expert parallel", _PAPER),
        ):
            known = [(point[0], point[column]) for point in points if point[column] is not None]
            axes.plot([x for x, _ in known], [y for _, y in known], "o-", color=colour, label=label)
        axes.set_xlabel("TPS/user")
        axes.set_ylabel("output TPS/GPU")
        axes.set_ylim(bottom=0)
        axes.legend()
