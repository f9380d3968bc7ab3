"""What ``dwdp generate`` shows on standard error: a progress bar while it runs, a table at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dwdp.observability.report import GenerateReport
from dwdp.serving.messages import Completion

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


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
    """One row per rank and one for the group."""
    model, totals = report.model, report.totals
    table = Table(
        title=f"{model.model_type}, {model.num_moe_layers} of {model.num_layers} layers with "
        f"{model.num_experts} experts, {model.dtype}, {report.fetch_mode}",
        show_footer=True,
    )
    sums = (
        ("rank", "all"),
        ("prompts", str(totals.num_prompts)),
        ("tokens in", str(totals.prompt_tokens)),
        ("tokens out", str(totals.generated_tokens)),
        ("tokens/s", f"{totals.tokens_per_s:.1f}"),
        ("experts", bytes_text(totals.resident_expert_bytes)),
        ("staging", bytes_text(totals.staging_bytes)),
        ("dense", bytes_text(totals.dense_bytes)),
        ("fetched", bytes_text(totals.fetched_bytes)),
        ("exposed wait", f"{totals.exposed_wait_s:.3f} s"),
        ("peak RSS", ""),
    )
    for header, footer in sums:
        table.add_column(header, footer, justify="right", no_wrap=True)
    for rank in report.ranks:
        lost = " (lost)" if rank.rank in report.lost_ranks else ""
        table.add_row(
            f"{rank.rank}{lost}",
            str(rank.num_prompts),
            str(rank.prompt_tokens),
            str(rank.generated_tokens),
            f"{rank.tokens_per_s:.1f}",
            bytes_text(rank.resident_expert_bytes),
            bytes_text(rank.staging_bytes),
            bytes_text(rank.dense_bytes),
            bytes_text(rank.fetched_bytes),
            f"{rank.exposed_wait_s:.3f} s",
            bytes_text(rank.peak_rss_bytes),
        )
    return table


def bytes_text(num_bytes: int) -> str:
    """``1536`` -> ``"1.5 KiB"``."""
    power = min(max(num_bytes.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    value = num_bytes / 1024**power
    return f"{value:.1f} {_UNITS[power]}" if power else f"{num_bytes} B"
