"""``dwdp reproduce``: the paper's results beside the performance model's."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dwdp.cli.output_files import OutputFiles, check_writable

if TYPE_CHECKING:
    from dwdp.perf.reproduce import Cell, Reproduction


@click.command()
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write everything to this file.",
)
@click.option(
    "--page",
    "page_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write it as a Markdown page, with its plots in images/ beside it (needs matplotlib).",
)
def reproduce(json_path: Path | None, page_path: Path | None) -> None:
    """Compute the DWDP paper's results and show paper, ours and error cell by cell.

    Constants are calibrated on some cells and predict the others; the table says which. Needs no GPU.
    """
    from rich.console import Console

    from dwdp.perf.reproduce import reproduce as run

    if page_path is not None and find_spec("matplotlib") is None:
        raise ValueError("--page needs matplotlib, which is not installed (dwdp[plot]).")
    if json_path is not None:
        check_writable(json_path)
    console = Console(stderr=True)
    with console.status("calibrating and simulating"), OutputFiles() as files:
        reproduction = run()
        if page_path is not None:
            from dwdp.perf.page import write_page

            write_page(reproduction, files.folder(page_path.parent) / page_path.name)
        if json_path is not None:
            files.write(json_path, json.dumps(reproduction.as_json(), indent=1) + "\n")
    _print(reproduction)


def _print(reproduction: Reproduction) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("result", "row", "column")
    for name in ("paper", "ours", "error"):
        table.add_column(name, justify="right")
    table.add_column("how")
    previous = None
    for cell in reproduction.cells:
        if previous is not None and cell.result != previous:
            table.add_section()
        previous = cell.result
        table.add_row(cell.result, cell.row, cell.column, *_figures(cell), _how(cell))
    console.print(table)
    constants = Table("constant", "value", "unit", "calibrated on")
    for constant in reproduction.calibration.constants:
        constants.add_row(constant.name, f"{constant.value:.3g}", constant.unit, constant.from_cell)
    console.print(constants)
    misses = reproduction.misses()
    console.print(
        f"{len(reproduction.cells) - len(misses)} of {len(reproduction.cells)} cells within tolerance."
    )


def _figures(cell: Cell) -> tuple[str, str, str]:
    from dwdp.perf.display import error_text, figure_text

    theirs = figure_text(cell.paper)
    if cell.upper is not None:
        theirs += f"-{figure_text(cell.upper)}"
    return theirs, figure_text(cell.ours), error_text(cell.error)


def _how(cell: Cell) -> str:
    return cell.kind if cell.is_reproduced else f"{cell.kind}, misses {cell.tolerance:.0%}"
