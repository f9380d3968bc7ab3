"""What all GPU benchmarks share: the device, time budgets, timing, and the command line.

Times are taken with CUDA events, in rounds that run every variant in turn and in another order each
time; the figure is the median over the rounds, after one that warms up.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from figures import Table, write_tables
from rich.console import Console

from dwdp import _C
from dwdp.fabric import Fabric, create_fabric

BLOCKING_CYCLES = 8_000_000
"""About 4 ms: longer than the host takes to submit what is timed behind it, slices aside."""
BLOCKING_CYCLES_PER_SLICE = 10_000
"""About 5 us, for each slice that is submitted."""


class Budget:
    """Time that a benchmark may take. What does not fit is not measured."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def is_spent(self) -> bool:
        return time.monotonic() >= self._end

    @property
    def left_s(self) -> float:
        return max(0.0, self._end - time.monotonic())


def require_device() -> None:
    """End the program in one line where there is no GPU, or a build that cannot use it."""
    if not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device: GPU benchmarks need one (nothing was measured)")
    if _C.build_info()["fabrics"] != "host+cuda":
        raise SystemExit(
            "error: dwdp was built without its CUDA fabric: build it where nvcc is "
            "(python setup.py build_ext --inplace; set CUDA_HOME if nvcc is not found)"
        )


def cuda_fabric() -> Fabric:
    """The CUDA fabric of the current device."""
    return create_fabric("cuda", ordinal=torch.cuda.current_device())


def free_bytes() -> int:
    """Memory of the device that nobody uses, what torch keeps cached given back first."""
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


def block_device(num_slices: int = 0) -> None:
    """Keep the device busy for some milliseconds, so that submitting is not what is timed."""
    torch.cuda._sleep(BLOCKING_CYCLES + num_slices * BLOCKING_CYCLES_PER_SLICE)


def nothing() -> None:
    """For callers that have nothing to run."""


def elapsed_ms(
    work: Callable[[], object], before: Callable[[], object] = nothing, num_slices: int = 0
) -> float:
    """Device time of ``work``, in milliseconds.

    ``before`` runs right ahead of the start and is not timed: it brings things into a steady state.
    The device is kept busy while both are submitted, the longer the more slices they copy.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    block_device(num_slices)
    before()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def interleaved(
    variants: Mapping[str, Callable[[], float]], rounds: int, budget: Budget | None = None
) -> dict[str, float]:
    """The median over ``rounds`` of what each variant measures, in any unit.

    Every round runs all variants, each time another one first; a first round warms up. When the
    budget is spent, the rounds so far count; one at least.
    """
    names = list(variants)
    measured: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds + 1):
        if round_ > 1 and budget is not None and budget.is_spent:
            break
        by = round_ % len(names)
        for name in names[by:] + names[:by]:
            figure = variants[name]()
            if round_:
                measured[name].append(figure)
    return {name: statistics.median(figures) for name, figures in measured.items()}


def gbs(num_bytes: float, ms: float) -> float:
    """GB/s (1e9 bytes) of ``num_bytes`` in ``ms``."""
    return num_bytes / ms / 1e6


def over(figure: float | None, baseline: float | None) -> float | None:
    """``figure / baseline``; None if one of them was not measured."""
    return None if figure is None or baseline is None else figure / baseline


def benchmark_command(command: Callable[..., Iterator[Sequence[Table]]]) -> click.Command:
    """A command of ``command``, which takes a Budget and its own options.

    It yields its tables whenever there are new figures in them, once at least. They are written where
    ``--output`` says each time, and shown at the end. Ends with 1 when a limit is missed.
    """

    def run(budget_s: float, output: Path | None, **options: Any) -> None:
        require_device()
        tables: Sequence[Table] = ()
        with torch.inference_mode():
            for tables in command(Budget(budget_s), **options):
                if output is not None:
                    write_tables(output, tables, is_complete=False)
        console = Console(width=None if sys.stdout.isatty() else 160)
        for table in tables:
            table.show(console)
        if output is not None:
            write_tables(output, tables, is_complete=True)
        sys.exit(1 if any(limit.is_missed for table in tables for limit in table.limits) else 0)

    run.__doc__ = command.__doc__
    run.__click_params__ = list(getattr(command, "__click_params__", []))  # type: ignore[attr-defined]
    for option in (
        click.option(
            "--budget-s", default=120.0, help="Seconds; what does not fit is not measured."
        ),
        click.option("--output", type=click.Path(path_type=Path), help="Write the tables as JSON."),
    ):
        run = option(run)
    return click.command(context_settings={"show_default": True})(run)
