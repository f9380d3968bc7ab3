"""Results as Markdown: the paper's tables with the model's figures and the measured ones beside.

A cell that nobody has measured says so. Paper: arXiv 2604.01621 (``dwdp/perf/paper.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean

from measurements import Measurement
from prediction import Prediction
from results import Results, Run
from sweep import Point

from dwdp.perf import paper
from dwdp.perf.calibration import GROUP, LOAD_CV, end_to_end
from dwdp.perf.display import figure_text
from dwdp.perf.reproduce import (
    TABLE_1_COLLECTIVE,
    TABLE_1_FORMATS,
    breakdown_cells,
    sync_share,
    table_1_time,
)
from dwdp.perf.serving import Strategy

NOT_MEASURED = "not measured"
NOT_GIVEN = "-"


def page(results: Results) -> str:
    """All tables of a sweep."""
    sweep = results.sweep
    count = f"{results.num_measured} of {len(results.runs)} runs are measured."
    parts = [
        f"# {sweep.name}",
        f"{sweep.description} Model: {sweep.model}, hardware: {sweep.hardware}. {count}",
        "*Paper*: arXiv 2604.01621. *Model*: the performance model, computed. *Measured*: these runs.",
        *_LAYOUTS[sweep.table](results),
        "## All runs",
        _all_runs(results),
    ]
    failed = [run for run in results.runs if run.measured is not None and run.measured.failed]
    parts += [
        f"{run.point.name} at {run.concurrency}: {run.measured.failed} of {run.measured.requests} "
        "requests failed; the run is in no comparison."
        for run in failed
        if run.measured is not None
    ]
    return "\n\n".join(parts) + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _text(value: float | None, missing: str = NOT_MEASURED) -> str:
    return missing if value is None else figure_text(value)


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


# What is compared, of a run: measured or expected.


def _measured_rate(run: Run) -> float | None:
    return run.usable.context_tokens_per_s_per_gpu if run.usable else None


def _measured_iteration_ms(run: Run) -> float | None:
    if run.usable is None or run.usable.iterations is None:
        return None
    return run.usable.iterations.mean_ms


def _iteration_ms(run: Run) -> float:
    return run.predicted.iteration_ms


def _rate(run: Run) -> float:
    return run.predicted.context_tokens_per_s_per_gpu


def _best(runs: Iterable[Run], value: Callable[[Run], float | None]) -> float | None:
    """The best of several loads."""
    return max((found for run in runs if (found := value(run)) is not None), default=None)


def _mean(runs: Iterable[Run], value: Callable[[Run], float | None]) -> float | None:
    found = [figure for run in runs if (figure := value(run)) is not None]
    return fmean(found) if found else None


def _of(results: Results, system: str, **keys: object) -> list[Run]:
    return [
        run
        for run in results.runs
        if run.point.system == system
        and all(getattr(run.point, key) == value for key, value in keys.items())
    ]


def _all_runs(results: Results) -> str:
    header = (
        "point",
        "load",
        "GPUs, context + generation",
        "context tokens/s/GPU, model",
        "measured",
        "iteration ms, model",
        "measured",
        "TPS/user, model",
        "measured",
        "TPS/GPU, model",
        "measured",
        "mean first token s, model",
        "measured",
    )
    rows = []
    for run in results.runs:
        predicted, measured = run.predicted, run.measured
        seconds = None if predicted.mean_ttft_ms is None else predicted.mean_ttft_ms / 1e3
        iterations = None if measured is None else measured.iterations
        one_token = run.point.osl == 1
        no_speed = NOT_GIVEN if one_token else NOT_MEASURED
        rows.append(
            (
                run.point.name,
                str(run.concurrency),
                f"{run.point.context_gpus} + {run.point.generation_gpus}",
                _text(predicted.context_tokens_per_s_per_gpu),
                _text(measured and measured.context_tokens_per_s_per_gpu),
                _text(predicted.iteration_ms),
                _text(iterations and iterations.mean_ms),
                _text(predicted.tps_per_user, NOT_GIVEN),
                _text(measured and measured.tps_per_user, no_speed),
                _text(predicted.tps_per_gpu, NOT_GIVEN),
                NOT_GIVEN if one_token else _text(measured and measured.tps_per_gpu),
                _text(seconds, NOT_GIVEN),
                _text(measured and measured.mean_ttft_ms / 1e3),
            )
        )
    return _table(header, rows)


def _iteration(results: Results) -> Iterator[str]:
    """Table 3."""
    yield "## Iteration breakdown (the paper's table 3), ms"
    cells = {
        (cell.column, cell.row): cell.ours
        for cell in breakdown_cells(results.expectations.hardware, results.expectations.model)
    }
    systems = (("DEP4", "dep", paper.DEP4_MS), ("DWDP4", "dwdp", paper.DWDP4_MS))
    header = ["part"]
    for name, _, _ in systems:
        header += [f"{name}, paper", "model", "measured"]
    rows = []
    for part in paper.DEP4_MS:
        row: list[str] = [part]
        for name, system, theirs in systems:
            runs = _of(results, system) if part == "iteration" else []
            row += [
                _text(theirs[part]),
                _text(cells[name, part]),
                _text(_mean(runs, _measured_iteration_ms)),
            ]
        rows.append(row)
    yield _table(header, rows)
    dep, dwdp = _of(results, "dep"), _of(results, "dwdp")
    yield _table(
        ("DWDP over DEP", "paper", "model, load CV 20 %", "model, these lengths", "measured"),
        [
            (
                "iterations per second",
                _text(paper.DEP4_MS["iteration"] / paper.DWDP4_MS["iteration"]),
                _text(cells["DEP4 / DWDP4", "iteration"]),
                _text(_ratio(_mean(dep, _iteration_ms), _mean(dwdp, _iteration_ms)), NOT_GIVEN),
                _text(
                    _ratio(_mean(dep, _measured_iteration_ms), _mean(dwdp, _measured_iteration_ms))
                ),
            ),
            ("context tokens/s/GPU", NOT_GIVEN, NOT_GIVEN, *_gain(dep, dwdp)),
        ],
    )
    yield (
        "The logs have whole iterations; their parts need a profile of the GPU. The model's parts are of "
        f"ranks whose load varies with CV {LOAD_CV:.0%}, as the paper says of this set-up."
    )


def _gain(below: list[Run], above: list[Run]) -> tuple[str, str]:
    """Prefill throughput of ``above`` over ``below``: model, measured."""
    predicted = _ratio(_best(above, _rate), _best(below, _rate))
    measured = _ratio(_best(above, _measured_rate), _best(below, _measured_rate))
    return _text(predicted, NOT_GIVEN), _text(measured)


def _roofline(results: Results) -> Iterator[str]:
    """Table 1. The paper's figures are at datasheet peaks; the model is shown there and as calibrated."""
    yield "## Roofline (the paper's table 1), one prompt per rank"
    header = (
        "ISL",
        "T_compute / T_prefetch, paper",
        "model at peaks",
        "T_DEP / T_DWDP, paper",
        "model at peaks",
        "model",
        "measured",
    )
    model = results.expectations.model.with_formats(**TABLE_1_FORMATS)
    rows = []
    theirs = {row.isl: row for row in paper.TABLE_1}
    for isl in sorted({run.point.isl for run in results.runs}):
        time, row = table_1_time(model, TABLE_1_COLLECTIVE, isl), theirs.get(isl)
        dep, dwdp = _of(results, "dep", isl=isl), _of(results, "dwdp", isl=isl)
        predicted = _ratio(_mean(dep, _iteration_ms), _mean(dwdp, _iteration_ms))
        measured = _ratio(_mean(dep, _measured_iteration_ms), _mean(dwdp, _measured_iteration_ms))
        rows.append(
            (
                str(isl),
                _text(row and row.compute_to_prefetch, NOT_GIVEN),
                _text(time.compute_to_prefetch),
                _text(row and row.dep_to_dwdp, NOT_GIVEN),
                _text(time.dep_to_dwdp),
                _text(predicted, NOT_GIVEN),
                _text(measured),
            )
        )
    yield _table(header, rows)


def _contention(results: Results) -> Iterator[str]:
    yield "## Contention: slices in turn over the sources, against whole shares one after the other"
    on, off = (_of(results, "dwdp", contention_opt=value) for value in (True, False))
    yield _table(
        ("", "paper", "model", "measured"),
        [
            ("contention_opt on / off", _text(paper.CONTENTION_GAIN), *_gain(off, on)),
            ("off / DEP", NOT_GIVEN, *_gain(_of(results, "dep"), off)),
            ("on / DEP", NOT_GIVEN, *_gain(_of(results, "dep"), on)),
        ],
    )


def _end_to_end(results: Results) -> Iterator[str]:
    """Table 4: the best point of each system in a range of TPS/user."""
    yield "## End to end (the paper's table 4)"
    hardware, model = results.expectations.hardware, results.expectations.model

    def matched(strategy: Strategy, tps_per_user: float) -> float:
        efficiency = hardware.achieved.generation
        return end_to_end(hardware, model, strategy, efficiency, tps_per_user).tps_per_gpu

    rows = []
    for row in paper.TABLE_4:
        middle = (row.low + row.high) / 2
        dep = _best(_of(results, "dep"), lambda run, row=row: _rate_in(row, run.usable))
        dwdp = _best(_of(results, "dwdp"), lambda run, row=row: _rate_in(row, run.usable))
        expected = _ratio(
            _best(_of(results, "dwdp"), lambda run, row=row: _rate_in(row, run.predicted)),
            _best(_of(results, "dep"), lambda run, row=row: _rate_in(row, run.predicted)),
        )
        rows.append(
            (
                f"{row.low}-{row.high}",
                _text(row.gain),
                _text(matched("dwdp", middle) / matched("dep", middle)),
                _text(expected, NOT_GIVEN),
                _text(_ratio(dwdp, dep)),
                _text(dep),
                _text(dwdp),
            )
        )
    yield _table(
        (
            "TPS/user",
            "TPS/GPU gain, paper",
            "model, as many prefill GPUs as needed",
            "model, these points",
            "measured",
            "DEP TPS/GPU, measured",
            "DWDP TPS/GPU, measured",
        ),
        rows,
    )
    notes = (
        "A row compares the best point of each system whose own TPS/user is in the range, among these points "
        "(`-`: the model has none there). The paper's mean over 20-100 TPS/user is "
        f"{paper.MEAN_GAIN_20_TO_100}."
    )
    if any(run.point.mtp_layers for run in results.runs):
        notes += (
            " The model knows no draft layers: its generation constant stands for those of the paper, so its "
            "TPS/user of a given load is not to be compared with the measured one."
        )
    yield notes


def _rate_in(row: paper.EndToEndRow, figures: Measurement | Prediction | None) -> float | None:
    """Output TPS/GPU where TPS/user is in the range of ``row``."""
    if figures is None or figures.tps_per_user is None:
        return None
    return figures.tps_per_gpu if row.low <= figures.tps_per_user < row.high else None


def _length_variation(results: Results) -> Iterator[str]:
    yield "## Variation of the input lengths"
    low, high = paper.SYNCHRONISATION_SHARE_AT_CV_20
    dep_0 = _of(results, "dep", length_cv=0.0)
    rows = []
    for cv in sorted({run.point.length_cv or 0.0 for run in results.runs}):
        dep, dwdp = _of(results, "dep", length_cv=cv), _of(results, "dwdp", length_cv=cv)
        loss = _ratio(_best(dep, _measured_rate), _best(dep_0, _measured_rate))
        waiting = sync_share(results.expectations.hardware, results.expectations.model, cv)
        rows.append(
            (
                f"{cv:.0%}",
                f"{low:.0%}-{high:.0%}" if cv == LOAD_CV else NOT_GIVEN,
                f"{waiting:.0%}",
                NOT_MEASURED if loss is None else f"{1 - loss:.0%}",
                *_gain(dep, dwdp),
            )
        )
    yield _table(
        (
            "CV",
            "DEP, share of waiting, paper",
            "model",
            "DEP, tokens/s lost against CV 0, measured",
            "DWDP / DEP, model",
            "measured",
        ),
        rows,
    )


def _group_size(results: Results) -> Iterator[str]:
    yield f"## Group size, over DEP of {GROUP.size}"
    dep = _of(results, "dep")
    rows = []
    for size in sorted({run.point.group_size for run in _of(results, "dwdp")}):
        dwdp = _of(results, "dwdp", group_size=size)
        rows.append(
            (
                str(size),
                _experts(dwdp[0].point, results),
                _text(_best(dwdp, _rate)),
                _text(_best(dwdp, _measured_rate)),
                *_gain(dep, dwdp),
            )
        )
    yield _table(
        (
            "group",
            "experts per rank",
            "context tokens/s/GPU, model",
            "measured",
            "DWDP / DEP, model",
            "measured",
        ),
        rows,
    )


def _experts(point: Point, results: Results) -> str:
    stored = point.num_experts_per_worker
    if stored is None:
        stored = -(-results.expectations.model.moe.num_experts // point.group_size)
    return str(stored)


def _runs(_: Results) -> Iterator[str]:
    """Nothing but the table of all runs."""
    yield from ()


_LAYOUTS: dict[str, Callable[[Results], Iterator[str]]] = {
    "runs": _runs,
    "iteration": _iteration,
    "roofline": _roofline,
    "contention": _contention,
    "end_to_end": _end_to_end,
    "length_variation": _length_variation,
    "group_size": _group_size,
}
