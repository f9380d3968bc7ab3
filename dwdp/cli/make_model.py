"""``dwdp make-model``: write a random-weight MoE checkpoint for tests and benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from dwdp.cli.options import FloatRange, IntRange

if TYPE_CHECKING:
    from dwdp.engines.transformers.make_model import Checkpoint


def _parse_fields(
    ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, Any]:
    """``("hidden_size=512", "layer_types=[...]")`` as a dict; values are JSON, or else text."""
    fields: dict[str, Any] = {}
    for value in values:
        name, separator, text = value.partition("=")
        if not name or not separator:
            raise click.BadParameter(f"{value!r}: give it as FIELD=VALUE", ctx, parameter)
        try:
            fields[name] = json.loads(text)
        except json.JSONDecodeError:
            fields[name] = text
    return fields


@click.command("make-model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--arch", required=True, metavar="NAME", help="Transformers model type, e.g. qwen3_moe."
)
@click.option(
    "--preset",
    type=click.Choice(["tiny", "small"]),
    default="tiny",
    show_default=True,
    help="Size to start from.",
)
@click.option(
    "--seed",
    type=IntRange(min=0, max=2**63 - 1),
    default=0,
    show_default=True,
    help="Of the random weights.",
)
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True
)
@click.option(
    "--num-layers", type=IntRange(min=1, max=10_000), help="Layers, instead of the preset's."
)
@click.option(
    "--num-experts", type=IntRange(min=1, max=2**16), help="Routed experts per MoE layer."
)
@click.option("--hidden-size", type=IntRange(min=1, max=2**20), help="Hidden size.")
@click.option(
    "--expert-gib",
    type=FloatRange(min=0, max=2**20, min_open=True),
    metavar="GIB",
    help="About how much the experts of all layers hold together; sets their intermediate size.",
)
@click.option(
    "--set",
    "fields",
    multiple=True,
    metavar="FIELD=VALUE",
    callback=_parse_fields,
    help="Any other field of the architecture's configuration; may be repeated.",
)
@click.option("--force", is_flag=True, help="Replace a checkpoint that OUT holds.")
def make_model(
    out: Path,
    arch: str,
    preset: Literal["tiny", "small"],
    seed: int,
    dtype: Literal["float32", "bfloat16"],
    num_layers: int | None,
    num_experts: int | None,
    hidden_size: int | None,
    expert_gib: float | None,
    fields: dict[str, Any],
    force: bool,
) -> None:
    """Write a random-weight checkpoint of an MoE architecture, with its tokenizer, to OUT.

    OUT appears only when it is complete. The same options give the same bytes.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from dwdp.engines.transformers.make_model import write_checkpoint

    sizes = {
        "num_hidden_layers": num_layers,
        "num_experts": num_experts,
        "hidden_size": hidden_size,
    }
    overrides = {name: value for name, value in sizes.items() if value is not None}
    twice = sorted(overrides.keys() & fields.keys())
    if twice:
        raise click.BadParameter(f"{twice[0]} has an option of its own", param_hint="--set")

    columns = (BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("")
        checkpoint = write_checkpoint(
            out,
            arch,
            preset=preset,
            seed=seed,
            dtype=dtype,
            expert_bytes=None if expert_gib is None else int(expert_gib * 2**30),
            overrides=overrides | fields,
            force=force,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    _print_summary(checkpoint)


def _print_summary(checkpoint: Checkpoint) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    share = 100 * checkpoint.expert_bytes / checkpoint.num_bytes
    for name, value in (
        ("path", str(checkpoint.path)),
        ("architecture", checkpoint.arch),
        ("layers", f"{checkpoint.num_layers}, {checkpoint.num_moe_layers} of them MoE"),
        ("experts per MoE layer", f"{checkpoint.num_experts}"),
        ("parameters", f"{checkpoint.num_parameters:,} ({checkpoint.dtype})"),
        ("size", f"{_mib(checkpoint.num_bytes)} in {checkpoint.num_files} file(s)"),
        ("experts", f"{_mib(checkpoint.expert_bytes)} ({share:.0f} %)"),
    ):
        table.add_row(name, value)
    Console().print(table)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
