"""What ``dwdp generate`` shows on standard error: a progress bar while it runs, a table at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dwdp.observability.report import GenerateReport
from dwdp.serving.messages import Completion

_MIB_LIMIT = 10_000


class RunProgress:
    """Two bars, one after the other: ranks that are set up, prompts that are finished."""

    def __init__(self, progress: Progress, num_ranks: int, num_prompts: int) -> None:
        self._progress = progress
        self._num_tokens = 0
        self._ranks = progress.add_task("loading ranks", total=num_ranks, note="")
        self._prompts = progress.add_task(
            "generating", total=num_prompts, note="", visible=False, start=False
        )

    def rank_is_ready(self, rank: int) -> None:
        self._progress.advance(self._ranks)
        if self._progress.tasks[self._ranks].finished:
            self._progress.update(self._prompts, visible=True)
            self._progress.start_task(self._prompts)

    def prompt_is_finished(self, completion: Completion) -> None:
        self._num_tokens += len(completion.token_ids)
        self._progress.update(self._prompts, advance=1, note=f"{self._num_tokens} tokens")


@contextmanager
def show_progress(console: Console, num_ranks: int, num_prompts: int) -> Iterator[RunProgress]:
    """Bars on ``console`` if it is a terminal; nothing elsewhere."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    with progress:
        yield RunProgress(progress, num_ranks, num_prompts)


class _Column(NamedTuple):
    header: str
    cells: list[str]
    footer: str


def summary_table(report: GenerateReport) -> Table:
    """One row per rank and one for the group. Fits 80 columns unless numbers are very large."""
    model, ranks, totals = report.model, report.ranks, report.totals
    columns = (
        _Column(
            "rank",
            [f"{r.rank} lost" if r.rank in report.lost_ranks else str(r.rank) for r in ranks],
            "all",
        ),
        _Column("prompts", [str(r.num_prompts) for r in ranks], str(totals.num_prompts)),
        _Column("tokens\nin", [str(r.prompt_tokens) for r in ranks], str(totals.prompt_tokens)),
        _Column(
            "tokens\nout", [str(r.generated_tokens) for r in ranks], str(totals.generated_tokens)
        ),
        _Column(
            "tokens\n/s", [f"{r.tokens_per_s:.1f}" for r in ranks], f"{totals.tokens_per_s:.1f}"
        ),
        _bytes_column("experts", [r.resident_expert_bytes for r in ranks]),
        _bytes_column("staging", [r.staging_bytes for r in ranks]),
        _bytes_column("dense", [r.dense_bytes for r in ranks]),
        _bytes_column("fetched", [r.fetched_bytes for r in ranks]),
        _Column(
            "waited\ns", [f"{r.exposed_wait_s:.3f}" for r in ranks], f"{totals.exposed_wait_s:.3f}"
        ),
        _bytes_column("peak\nRSS", [r.peak_rss_bytes for r in ranks], has_sum=False),
    )
    table = Table(
        title=f"{model.model_type}: {model.num_moe_layers} of {model.num_layers} layers with "
        f"{model.num_experts} experts, {model.dtype}, {report.fetch_mode}",
        title_justify="left",
        box=SIMPLE_HEAD,
        show_footer=True,
        padding=0,
        show_edge=False,
    )
    for column in columns:
        table.add_column(column.header, column.footer, justify="right", no_wrap=True)
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*row)
    return table


def _bytes_column(name: str, values: Sequence[int], *, has_sum: bool = True) -> _Column:
    """All numbers of a column are in one unit, which its header names."""
    in_gib = sum(values) >= _MIB_LIMIT << 20
    unit, shift = ("GiB", 30) if in_gib else ("MiB", 20)
    cells = [f"{value / (1 << shift):.1f}" for value in values]
    footer = f"{sum(values) / (1 << shift):.1f}" if has_sum else ""
    return _Column(f"{name}\n{unit}", cells, footer)
