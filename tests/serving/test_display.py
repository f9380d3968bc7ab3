"""What is shown on standard error."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from dwdp.cli.display import show_progress, summary_table
from dwdp.config import DwdpConfig
from dwdp.observability.report import (
    GenerateReport,
    ModelReport,
    RankReport,
    SamplingReport,
    total,
)
from dwdp.serving.messages import Completion, Counters


def report(num_bytes: int, lost: tuple[int, ...] = ()) -> GenerateReport:
    ranks = tuple(
        RankReport(
            rank=rank,
            num_prompts=12,
            prompt_tokens=3456,
            generated_tokens=7890,
            wall_s=10.0,
            tokens_per_s=789.0,
            dense_bytes=num_bytes,
            resident_expert_bytes=num_bytes,
            staging_bytes=num_bytes,
            num_slots=2,
            num_fetches=100,
            num_demands=0,
            fetched_bytes=num_bytes,
            num_waits=1,
            exposed_wait_s=0.125,
            load_s=1.0,
            peak_rss_bytes=num_bytes,
        )
        for rank in range(2)
    )
    return GenerateReport(
        dwdp_version="0",
        launcher="dwdp",
        model=ModelReport(
            path="m",
            model_type="qwen3_moe",
            num_layers=3,
            num_moe_layers=2,
            num_experts=64,
            dtype="bfloat16",
        ),
        sampling=SamplingReport(max_new_tokens=1, temperature=0.0, seed=0),
        device="cpu",
        threads_per_rank=1,
        fetch_mode="staged",
        config=DwdpConfig(dwdp_size=2),
        ranks=ranks,
        lost_ranks=lost,
        totals=total(ranks, 10.0),
    )


def lines_of(shown: GenerateReport) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=80).print(summary_table(shown))
    return [line for line in file.getvalue().splitlines() if line.strip()]


@pytest.mark.parametrize(
    ("num_bytes", "unit", "cell", "total_cell"),
    [(1 << 20, "MiB", "1.0", "2.0"), (60 << 30, "GiB", "60.0", "120.0")],
)
def test_the_table_fits_80_columns(num_bytes: int, unit: str, cell: str, total_cell: str) -> None:
    lines = lines_of(report(num_bytes))
    assert not any("…" in line for line in lines)
    assert lines[0].strip() == "qwen3_moe: 2 of 3 layers with 64 experts, bfloat16, staged"
    assert sum(line.count(unit) for line in lines) == 5
    bytes_cells = [cell] * 4
    for rank in range(2):
        row = next(line.split() for line in lines if line.strip().startswith(str(rank)))
        assert row == [str(rank), "12", "3456", "7890", "789.0", *bytes_cells, "0.125", cell]
    assert lines[-1].split() == [
        *("all", "24", "6912", "15780", "1578.0"),
        *([total_cell] * 4),
        "0.250",
    ]


def test_a_lost_rank_is_marked() -> None:
    lines = lines_of(report(1 << 20, lost=(1,)))
    assert [line.split()[:2] for line in lines if "lost" in line] == [["1", "lost"]]


def test_progress_counts_ranks_then_prompts() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80)
    with show_progress(console, num_ranks=1, num_prompts=2) as progress:
        progress.rank_is_ready(0)
        progress.prompt_is_finished(Completion(0, (1, 2, 3), "stop", Counters()))
        progress.prompt_is_finished(Completion(1, (4,), "stop", Counters()))
    shown = file.getvalue()
    assert "loading ranks" in shown
    assert "2/2" in shown
    assert "4 tokens" in shown


def test_no_progress_where_there_is_no_terminal() -> None:
    file = io.StringIO()
    with show_progress(Console(file=file), num_ranks=1, num_prompts=1) as progress:
        progress.rank_is_ready(0)
        progress.prompt_is_finished(Completion(0, (1,), "stop", Counters()))
    assert file.getvalue().strip() == ""
