"""What ``dwdp generate`` shows on standard error: a progress bar while it runs, a table at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dwdp.observability.report import GenerateReport
from dwdp.serving.messages import Completion


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


def summary_table(report: GenerateReport) -> Table:
    """One row per rank and one for the group. Fits 80 columns."""
    model, totals = report.model, report.totals
    table = Table(
        title=f"{model.model_type}: {model.num_moe_layers} of {model.num_layers} layers with "
        f"{model.num_experts} experts, {model.dtype}, {report.fetch_mode}",
        box=SIMPLE_HEAD,
        show_footer=True,
        pad_edge=False,
        collapse_padding=True,
    )
    columns = (
        ("rank", "all"),
        ("prompts", str(totals.num_prompts)),
        ("tokens\nin", str(totals.prompt_tokens)),
        ("tokens\nout", str(totals.generated_tokens)),
        ("tokens\n/s", f"{totals.tokens_per_s:.1f}"),
        ("experts\nMiB", _mib(totals.resident_expert_bytes)),
        ("staging\nMiB", _mib(totals.staging_bytes)),
        ("dense\nMiB", _mib(totals.dense_bytes)),
        ("fetched\nMiB", _mib(totals.fetched_bytes)),
        ("waited\ns", f"{totals.exposed_wait_s:.3f}"),
        ("peak RSS\nMiB", ""),
    )
    for header, footer in columns:
        table.add_column(header, footer, justify="right", no_wrap=True)
    for rank in report.ranks:
        table.add_row(
            f"{rank.rank} lost" if rank.rank in report.lost_ranks else str(rank.rank),
            str(rank.num_prompts),
            str(rank.prompt_tokens),
            str(rank.generated_tokens),
            f"{rank.tokens_per_s:.1f}",
            _mib(rank.resident_expert_bytes),
            _mib(rank.staging_bytes),
            _mib(rank.dense_bytes),
            _mib(rank.fetched_bytes),
            f"{rank.exposed_wait_s:.3f}",
            _mib(rank.peak_rss_bytes),
        )
    return table


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):.1f}"
