"""The page that sets the paper's results beside the model's: text, tables and plots in one go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from dwdp.perf import paper
from dwdp.perf.beyond import (
    DEMAND_SEQUENCES,
    LOAD_CVS,
    MAX_NUM_TOKENS,
    Gain,
    decode_layers,
    demand_gains,
    ideas,
    prefill_gains,
)
from dwdp.perf.calibration import GROUP, paper_model
from dwdp.perf.display import error_text, figure_text
from dwdp.perf.hardware import load_hardware
from dwdp.perf.plots import (
    plot_beyond,
    plot_breakdown,
    plot_end_to_end,
    plot_roofline,
    plot_synchronisation,
)
from dwdp.perf.reproduce import (
    ASSUMPTIONS,
    BREAKDOWN,
    CANNOT_FIT,
    CONTENTION,
    END_TO_END,
    SHARE,
    TABLE_1,
    TABLE_1_COLLECTIVE,
    TABLE_1_FORMATS,
    Reproduction,
    concurrency_gain,
    end_to_end_gain,
    prefill_shares,
)
from dwdp.perf.roofline import hiding_length, winning_batch, winning_length


def write_page(reproduction: Reproduction, path: Path) -> None:
    """Write the page to ``path`` and its pictures to ``images/`` beside it.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    images = path.parent / "images"
    gains = list(prefill_gains(paper_model(), reproduction.calibration.hardware))
    plot_roofline(images / "paper-roofline.svg")
    plot_breakdown(reproduction, images / "paper-breakdown.svg")
    plot_synchronisation(reproduction, images / "paper-synchronisation.svg")
    plot_end_to_end(reproduction, images / "paper-end-to-end.svg")
    plot_beyond(gains, images / "paper-beyond.svg")
    path.write_text("\n".join(_lines(reproduction, gains)) + "\n", encoding="utf-8")


def _lines(reproduction: Reproduction, gains: list[Gain]) -> Iterator[str]:
    misses = reproduction.misses()
    yield "# The paper's results, reproduced"
    yield ""
    yield (
        "What the performance model (`dwdp/perf`) makes of the figures of the DWDP paper "
        "([arXiv 2604.01621](https://arxiv.org/abs/2604.01621): DeepSeek-R1 NVFP4 on GB200). Nothing here "
        "was measured on such hardware. `dwdp reproduce --page docs/paper.md` writes this page and its "
        "plots; `dwdp reproduce --json FILE` gives the same figures as data."
    )
    yield ""
    yield (
        f"**{len(reproduction.cells) - len(misses)} of {len(reproduction.cells)} cells are within their "
        "tolerance.** *Calibrated* cells fixed a constant, *assumed* ones helped to choose assumptions, "
        "*predicted* ones did neither."
    )
    yield ""
    yield "## Constants"
    yield ""
    yield from _table(
        ("constant", "value", "unit", "calibrated on"),
        (
            (item.name, figure_text(item.value), item.unit, item.from_cell)
            for item in reproduction.calibration.constants
        ),
    )
    yield ""
    yield (
        "One set for all results. Peaks are the datasheet's. They are also what "
        "`dwdp/perf/data/hardware/gb200.yaml` says the hardware achieves."
    )
    yield ""
    yield "Assumptions:"
    yield ""
    yield from (f"- {text}" for text in ASSUMPTIONS)
    yield ""
    yield from _roofline(reproduction)
    yield from _breakdown(reproduction)
    yield from _rest(reproduction)
    yield from _beyond(reproduction, gains)
    yield "## What it cannot fit"
    yield ""
    yield from (f"- {text}" for text in CANNOT_FIT)
    yield (
        "- The form of the generation constant was chosen after a first one failed: a share on the whole "
        "step could not reach 170 TPS/user at all. The present one leaves the reading of weights at the "
        "roofline and slows what grows with the number of sequences."
    )


def _roofline(reproduction: Reproduction) -> Iterator[str]:
    yield "## Roofline (table 1)"
    yield ""
    yield from _cells(reproduction, TABLE_1)
    yield ""
    yield "![Both ratios over the input length](images/paper-roofline.svg)"
    yield ""
    model = paper_model().with_formats(**TABLE_1_FORMATS)
    hardware = load_hardware("gb200").at_peak()
    hidden = hiding_length(model, hardware, GROUP)
    won = winning_length(model, hardware, GROUP, TABLE_1_COLLECTIVE)
    count = winning_batch(model, hardware, GROUP, 1024, TABLE_1_COLLECTIVE)
    yield (
        f"Crossings under these assumptions: one prompt hides the fetch from {_count(hidden)} tokens on, and "
        f"DWDP wins from {_count(won)} on; with prompts of 1024 tokens it wins from {_count(count)} per "
        "forward on."
    )
    yield ""
    yield "Eight cells do not fix all assumptions, but they rule some out. Worst cell under others:"
    yield ""
    yield from _table(
        ("assumptions", "worst cell"),
        ((name, f"{100 * worst:.1f} %") for name, worst in reproduction.alternatives),
    )
    yield ""


def _breakdown(reproduction: Reproduction) -> Iterator[str]:
    yield "## Iteration breakdown (table 3)"
    yield ""
    yield f"In ms. {paper.UNITS_OF_TABLE_3}"
    yield ""
    yield from _cells(reproduction, BREAKDOWN)
    yield ""
    yield "![Stacked iteration times](images/paper-breakdown.svg)"
    yield ""


def _rest(reproduction: Reproduction) -> Iterator[str]:
    calibration, model = reproduction.calibration, paper_model()
    yield "## Synchronisation, contention, end to end"
    yield ""
    yield from _cells(reproduction, SHARE, CONTENTION, END_TO_END)
    yield ""
    yield "![Waiting over the variation of the load](images/paper-synchronisation.svg)"
    yield ""
    yield "![Gain over TPS/user](images/paper-end-to-end.svg)"
    yield ""
    gain = concurrency_gain(calibration.hardware, model)
    single = end_to_end_gain(calibration, model, 175, 8192)
    yield (
        f"In the contention set-up, one lane per source would gain {100 * (gain - 1):.0f} % instead. At "
        f"170-180 TPS/user, prefill forwards of one prompt would give {single:.2f}."
    )
    yield ""
    yield "The split between prefill and generation, which nothing was fitted to (GPUs that prefill):"
    yield ""
    yield from _table(
        ("TPS/user", "published DEP deployments", "model, DEP"),
        (
            (name, f"{theirs:.2f}", f"{ours:.2f}")
            for name, theirs, ours in prefill_shares(calibration, model)
        ),
    )
    yield ""


def _beyond(reproduction: Reproduction, gains: list[Gain]) -> Iterator[str]:
    hardware = reproduction.calibration.hardware
    yield "## Beyond the paper's design"
    yield ""
    yield (
        "Prefill tokens/s per GPU over the paper's design (serial pulls in fixed order, none before the "
        "forward starts, an even share of experts) at equal assumptions: 4 ranks, forwards of up to "
        f"{MAX_NUM_TOKENS} tokens or one longer prompt. Simulated, not measured."
    )
    yield ""
    isls = sorted({gain.isl for gain in gains})
    value = {(gain.idea, gain.isl, gain.load_cv): gain.gain for gain in gains}
    columns = [(isl, cv) for isl in isls for cv in LOAD_CVS]
    yield from _table(
        ("idea", *(f"ISL {isl // 1024}K, CV {cv:.0%}" for isl, cv in columns), "needs"),
        (
            (
                idea.name,
                *(f"{value[idea.name, isl, cv]:.2f}" for isl, cv in columns),
                idea.needs or "nothing",
            )
            for idea in ideas(hardware)
        ),
    )
    yield ""
    yield "![Gains over the paper's design](images/paper-beyond.svg)"
    yield ""
    yield (
        "Wrap-around prefetch by itself can lose: serial pulls in fixed order then run back to back on "
        "every rank and queue up behind each other at the same source. With one lane per source it saves at "
        "most one exposed fetch of 58 per forward. At 32K tokens everything is hidden already."
    )
    yield ""
    yield (
        "Demand fetches in generation: one layer of a step on 4 ranks, compute and exposed fetch, uniform "
        "routing. From `dwdp/perf/demand.py`; the crossover is what `auto` starts from."
    )
    yield ""
    yield from _table(
        ("tokens per step", "compute, us", "staged, us", "demand, us", "demand is faster by"),
        (
            (
                str(row.num_tokens),
                figure_text(1e6 * row.window_s),
                figure_text(1e6 * row.staged_s),
                figure_text(1e6 * row.demand_s),
                f"{row.gain:.2f}",
            )
            for row in decode_layers(paper_model(), hardware)
        ),
    )
    yield ""
    yield (
        "Steps of generation, demand over staged fetches, by sequences per rank (CV: of their number), with "
        "contexts of ISL tokens and the roofline's time of attention. In closed form: no rank waits for "
        "another, and contention between demand fetches is left out."
    )
    yield ""
    demand = {
        (gain.num_sequences, gain.context_tokens, gain.load_cv): gain.gain
        for gain in demand_gains(paper_model(), hardware)
    }
    yield from _table(
        ("sequences", *(f"ISL {isl // 1024}K, CV {cv:.0%}" for isl, cv in columns)),
        (
            (str(count), *(f"{demand[count, isl, cv]:.2f}" for isl, cv in columns))
            for count in DEMAND_SEQUENCES
        ),
    )
    yield ""


def _count(value: int | None) -> str:
    return "no number" if value is None else f"{value:,}"


def _cells(reproduction: Reproduction, *results: str) -> Iterator[str]:
    rows = []
    for cell in reproduction.cells:
        if cell.result in results:
            theirs = figure_text(cell.paper)
            if cell.upper is not None:
                theirs += f" to {figure_text(cell.upper)}"
            how = str(cell.kind)
            if not cell.is_reproduced:
                how += f", **misses {cell.tolerance:.0%}**"
            rows.append(
                (cell.row, cell.column, theirs, figure_text(cell.ours), error_text(cell.error), how)
            )
    yield from _table(("row", "column", "paper", "ours", "error", "how"), rows)


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "| " + " | ".join("---" for _ in header) + " |"
    for row in rows:
        yield "| " + " | ".join(row) + " |"
