"""``dwdp plan``: whether DWDP pays for a model on given hardware, and how to set it up."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dwdp.cli.options import FloatRange, IntRange
from dwdp.cli.output_files import OutputFiles, check_writable

if TYPE_CHECKING:
    from rich.console import Console

    from dwdp.perf.candidates import Candidate
    from dwdp.perf.planner import Plan

_SHOWN_CANDIDATES = 8


@click.command()
@click.argument("model", metavar="MODEL_OR_CONFIG")
@click.option(
    "--hardware", required=True, metavar="NAME_OR_YAML", help="gb200, h200, ... or a YAML file."
)
@click.option("--isl", type=IntRange(min=1), required=True, help="Input length, tokens.")
@click.option("--osl", type=IntRange(min=1), required=True, help="Output length, tokens.")
@click.option("--ranks", type=IntRange(min=1), help="GPUs in all. Default: one link domain.")
@click.option(
    "--tps-per-user",
    type=FloatRange(min=0, min_open=True),
    default=50.0,
    show_default=True,
    help="Tokens per second that each user shall get.",
)
@click.option(
    "--max-num-tokens",
    type=IntRange(min=1),
    help="Tokens per prefill forward. Default: 32768, or the input length if that is more.",
)
@click.option(
    "--length-ratio",
    type=FloatRange(min=0, max=1, min_open=True),
    default=0.8,
    show_default=True,
    help="Inputs are uniform in [ratio * isl, isl].",
)
@click.option(
    "--load-cv",
    type=FloatRange(min=0, max=1),
    default=0.2,
    show_default=True,
    help="Variation of the load between ranks.",
)
@click.option(
    "--trace",
    "trace_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Also serve these requests: JSON lines with arrival_s, input_tokens, output_tokens.",
)
@click.option(
    "--gpus-per-node", type=IntRange(min=1), default=4, show_default=True, help="For Slurm."
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write TensorRT-LLM's YAML files, the Slurm job, plan.json and the Pareto plot there.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the plan to this file.",
)
def plan(
    model: str,
    hardware: str,
    isl: int,
    osl: int,
    ranks: int | None,
    tps_per_user: float,
    max_num_tokens: int | None,
    length_ratio: float,
    load_cv: float,
    trace_path: Path | None,
    gpus_per_node: int,
    out: Path | None,
    json_path: Path | None,
) -> None:
    """Say whether DWDP pays, by how much and why, and how to set it up.

    MODEL_OR_CONFIG is a Hugging Face config.json, a directory with one, or a name (deepseek-r1-nvfp4,
    deepseek-r1, qwen3-235b-a22b). Needs no GPU: everything is computed from the performance model.
    """
    from rich.console import Console

    from dwdp.perf.candidates import Workload
    from dwdp.perf.hardware import load_hardware
    from dwdp.perf.model_config import load_model
    from dwdp.perf.plan_report import as_json
    from dwdp.perf.planner import plan as make_plan

    if json_path is not None:
        check_writable(json_path)
    device = load_hardware(hardware)
    workload = Workload(
        isl,
        osl,
        length_ratio,
        load_cv,
        max(32768, isl) if max_num_tokens is None else max_num_tokens,
        device.link.domain_size if ranks is None else ranks,
        tps_per_user,
    )
    answer = make_plan(load_model(model), device, workload)
    console = Console(highlight=False)
    _print(console, answer)
    if trace_path is not None:
        _print_trace(console, answer, trace_path)
    written: list[Path] = []
    with OutputFiles() as files:
        if json_path is not None:
            files.write(json_path, json.dumps(as_json(answer), indent=1) + "\n")
        if out is not None:
            folder = files.folder(out)
            made = _write(answer, folder, gpus_per_node)
            written = [out / path.relative_to(folder) for path in made]
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True)


def _write(answer: Plan, out: Path, gpus_per_node: int) -> list[Path]:
    """Write everything to the folder ``out``, and return the files' paths."""
    from dwdp.perf.job_files import Cluster, write_job
    from dwdp.perf.launch_files import job_of_plan
    from dwdp.perf.plan_report import as_json, pareto_front

    written = [out / "plan.json"]
    written[0].write_text(json.dumps(as_json(answer), indent=1) + "\n", encoding="utf-8")
    if answer.best is None:
        return written
    try:
        job = job_of_plan(answer)
    except ValueError as error:
        click.echo(f"no launch files: {error}", err=True)
    else:
        written += write_job(job, Cluster(gpus_per_node=gpus_per_node), out)
    if find_spec("matplotlib") is None:
        click.echo("no Pareto plot: matplotlib is not installed (dwdp[plot])", err=True)
        return written
    from dwdp.perf.plots import plot_pareto

    plots = [out / "pareto.png", out / "pareto.svg"]
    plot_pareto(pareto_front(answer), plots)
    return written + plots


def _print(console: Console, answer: Plan) -> None:
    from dwdp.perf.plan_report import layer_lanes, memory_bar

    console.print(f"Does DWDP pay here? [bold]{answer.verdict}[/bold]{_gain_text(answer)}")
    for reason in answer.reasons:
        console.print(f"  - {reason}")
    best = answer.best
    if best is None:
        return
    console.print()
    bar, legend = memory_bar(best.memory.parts())
    console.print(f"Memory of a rank, {best.memory.capacity / 1e9:.0f} GB", markup=False)
    console.print(f"  {bar}", markup=False)
    console.print("  " + ", ".join(legend), markup=False)
    if best.group.size > 1:
        console.print()
        console.print("One layer, a full prefill forward")
        for line in layer_lanes(answer):
            console.print(f"  {line}", markup=False, no_wrap=True)
    console.print()
    _print_settings(console, answer)
    _print_candidates(console, answer)
    _print_pareto(console, answer)
    for note in answer.model.notes:
        console.print(f"Note: {note}")
    if answer.hardware.assumed:
        console.print(f"Assumed, not measured: {', '.join(answer.hardware.assumed)}")


def _gain_text(answer: Plan) -> str:
    parts = []
    if answer.gain is not None:
        parts.append(f"{answer.gain:.2f} times the output TPS/GPU of expert parallelism")
    if answer.prefill_gain is not None:
        parts.append(f"{answer.prefill_gain:.2f} times its prefill rate")
    return f": {', '.join(parts)}" if parts else ""


def _print_settings(console: Console, answer: Plan) -> None:
    from rich.table import Table

    from dwdp.perf.launch_files import dwdp_options

    assert answer.best is not None
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column()
    if answer.best.group.size > 1:
        for name, value in dwdp_options(answer).items():
            table.add_row(name, str(value))
        mode = "staged"
        if answer.demand_up_to_tokens:
            mode += f", demand for steps of up to {answer.demand_up_to_tokens} tokens"
        table.add_row("fetch mode", mode)
        table.add_row("slots", str(answer.num_slots))
        table.add_row("slice", f"{answer.policy.slice_bytes >> 20} MiB")
    table.add_row("GPUs", _gpus_text(answer))
    console.print(table)


def _gpus_text(answer: Plan) -> str:
    from dwdp.perf.launch_files import job_of_plan

    text = f"{answer.num_prefill_gpus} for prefill"
    try:
        generation = job_of_plan(answer).generation
    except ValueError:
        return text
    text += f", {generation.num_gpus} for generation"
    if generation.num_servers > 1:
        text += f" (servers of {generation.gpus_per_server})"
    left = answer.workload.num_gpus - answer.num_prefill_gpus - generation.num_gpus
    return text + (f", {left} left over" if left else "")


def _print_candidates(console: Console, answer: Plan) -> None:
    from rich.table import Table

    title = "Prefill, estimated; fastest first, the plan's in bold"
    table = Table("group", "experts per rank", title=title)
    for name in ("GB per rank", "T_compute / T_prefetch", "tokens/s per GPU"):
        table.add_column(name, justify="right")
    table.add_column("sources")
    fastest: dict[tuple[int, bool], Candidate] = {}
    for candidate in answer.candidates:
        # Of the rows with the host's memory as a further source, the fastest one shows what it would bring.
        key = (0 if candidate.from_host else candidate.group.size, candidate.from_host)
        fastest.setdefault(key, candidate)
    shown = list(fastest.values())[:_SHOWN_CANDIDATES]
    if answer.best is not None and answer.best not in shown:
        shown.append(answer.best)
    for candidate in sorted(shown, key=lambda c: -c.tokens_per_s):
        share = -(-answer.model.moe.num_experts // candidate.group.size)
        table.add_row(
            str(candidate.group.size),
            str(candidate.group.num_experts_per_worker or share),
            f"{candidate.memory.used / 1e9:.0f}",
            f"{candidate.window_ratio:.2f}",
            f"{candidate.tokens_per_s:,.0f}",
            "peers + host*" if candidate.from_host else "peers",
            style="bold" if candidate == answer.best else None,
        )
    console.print(table)
    console.print(
        "The plan takes the smallest group, and then the least memory, of what is at most 1 % slower."
    )
    if any(candidate.from_host for candidate in answer.candidates):
        console.print("* What reading from host memory too would bring; it is not implemented.")


def _print_pareto(console: Console, answer: Plan) -> None:
    from rich.table import Table

    from dwdp.perf.plan_report import pareto_front

    points = pareto_front(answer)
    if not points:
        return
    table = Table("TPS/user", title="Output TPS/GPU, prefill and generation matched")
    for name in ("DWDP in prefill", "expert parallel", "gain"):
        table.add_column(name, justify="right")
    for tps, dwdp, dep in points:
        if dwdp is not None and dep is not None:
            table.add_row(f"{tps:g}", f"{dwdp:,.0f}", f"{dep:,.0f}", f"{dwdp / dep:.2f}")
    console.print(table)


def _print_trace(console: Console, answer: Plan, path: Path) -> None:
    from rich.table import Table

    from dwdp.perf.plan_trace import serve_trace
    from dwdp.perf.workload import read_trace

    table = Table("prefill by", title=f"The requests of {path.name}")
    for name in ("GPUs", "TPS/user", "TPS/GPU", "first token: median", "90 %", "99 %"):
        table.add_column(name, justify="right")
    for side in serve_trace(answer, read_trace(path)):
        result = side.result
        table.add_row(
            "DWDP" if side.strategy == "dwdp" else "expert parallelism",
            f"{side.num_prefill_gpus} + {side.num_generation_gpus}",
            f"{result.tps_per_user:.0f}",
            f"{result.tps_per_gpu:,.1f}",
            *(f"{result.ttft_percentile_s(percent):.2f} s" for percent in (50, 90, 99)),
        )
    console.print(table)
