"""Compares expert parallelism (DEP) and DWDP in prefill on a GB200 NVL72. ``README.md`` here is the guide.

python benchmarks/nvl72/nvl72.py generate SWEEP.yaml --cluster CLUSTER.yaml --out DIR [--dry-run]
python benchmarks/nvl72/nvl72.py submit DIR [--dry-run]
python benchmarks/nvl72/nvl72.py collect DIR
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, get_args

import click
from cluster import ClusterFile, load_cluster
from dataset import Format, check_dataset, read_dataset, write_dataset
from points import check_sweep_folder, point_folders, remove_old_points, write_sweep
from results import collect as collect_results
from sweep import load_sweep, read_section
from tables import page

from dwdp.perf.job_files import JOB

FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Bad input is one line on stderr, and exit code 2."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, OSError) as error:
            click.echo(f"nvl72: error: {' '.join(str(error).split())}", err=True)
            sys.exit(2)

    return wrapped


@click.group()
def cli() -> None:
    """Compare expert parallelism and DWDP on a GB200 NVL72."""


@cli.command()
@click.argument("sweep_path", metavar="SWEEP.yaml", type=FILE)
@click.option("--cluster", "cluster_path", required=True, type=FILE, help="The cluster file.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the sweep, on a file system that all nodes see.",
)
@click.option("--dry-run", is_flag=True, help="Write to a temporary folder, check, and remove it.")
@one_line_errors
def generate(sweep_path: Path, cluster_path: Path, out: Path | None, dry_run: bool) -> None:
    """Write every file of every point, and check them. Needs neither Slurm nor GPUs."""
    sweep, cluster = load_sweep(sweep_path), load_cluster(cluster_path)
    if dry_run == (out is not None):
        raise ValueError("--out: give a folder, or --dry-run")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if out is None else out
        remove_old_points(folder)
        for warning in write_sweep(sweep, cluster, folder):
            click.echo(f"warning: {warning}", err=True)
        report(folder)
    if out is not None:
        click.echo(f"next: python {shlex.quote(sys.argv[0])} submit {shlex.quote(str(out))}")


def report(folder: Path) -> None:
    """Check a sweep's folder, and say so; ends with 2 if anything is wrong."""
    problems = check_sweep_folder(folder)
    for problem in problems:
        click.echo(f"nvl72: error: {problem}", err=True)
    if problems:
        sys.exit(2)
    folders = point_folders(folder)
    files = sum(1 for path in folders for _ in path.iterdir())
    click.echo(f"{len(folders)} points, {files} files: all valid")


@cli.command()
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--only", multiple=True, metavar="POINT", help="This point; may be given again.")
@click.option("--again", is_flag=True, help="Also points that were submitted before.")
@click.option("--dry-run", is_flag=True, help="Check, and show what would be submitted.")
@one_line_errors
def submit(folder: Path, only: tuple[str, ...], again: bool, dry_run: bool) -> None:
    """Make the datasets, and hand every point to Slurm."""
    cluster: ClusterFile = read_section(folder / "cluster.yaml", ClusterFile)
    report(folder)
    targets = {path.name: path for path in point_folders(folder)}
    for name in only:
        if name not in targets:
            raise ValueError(f"--only: no point is called {name}; there are {', '.join(targets)}")
    chosen = [path for name, path in targets.items() if not only or name in only]
    commands = [
        (path, ["sbatch", "--parsable", f"--chdir={path.resolve()}", str(path.resolve() / JOB)])
        for path in chosen
        if again or not (path / "job_id").exists()
    ]
    if dry_run:
        for _, command in commands:
            click.echo(shlex.join(command))
        return
    if cluster.placeholders():
        keys = ", ".join(cluster.placeholders())
        raise ValueError(f"{folder / 'cluster.yaml'}: {keys}: replace <...> and generate again")
    make_datasets(folder)
    for path, command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"{path.name}: sbatch: {done.stderr}")
        (path / "job_id").write_text(done.stdout, encoding="utf-8")
        click.echo(f"{path.name}: job {done.stdout.strip()}")


def make_datasets(folder: Path) -> None:
    """Write the datasets that are not there yet."""
    for description in sorted((folder / "datasets").glob("*.yaml")):
        prompts = description.with_suffix(".jsonl")
        if not prompts.is_file():
            dataset = read_dataset(description)
            click.echo(f"writing {dataset.num_requests} prompts to {prompts}")
            write_dataset(dataset, prompts)


@cli.command()
@click.argument("description", metavar="DATASET.yaml", type=FILE)
@click.option("--out", required=True, type=FILE, help="File of prompts.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(get_args(Format)),
    default="benchmark_serving",
    show_default=True,
    help="Whose format.",
)
@one_line_errors
def dataset(description: Path, out: Path, kind: Format) -> None:
    """Write the prompts that a sweep's datasets/NAME.yaml describes."""
    described = read_dataset(description)
    write_dataset(described, out, kind)
    problem = check_dataset(described, out) if kind == "benchmark_serving" else None
    if problem is not None:
        raise ValueError(problem)
    click.echo(f"{described.num_requests} prompts")


@cli.command()
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--json", "json_path", type=FILE, help="Default: DIR/results.json.")
@click.option("--page", "page_path", type=FILE, help="Default: DIR/results.md.")
@one_line_errors
def collect(folder: Path, json_path: Path | None, page_path: Path | None) -> None:
    """Read the results, and write them as JSON and as the paper's tables."""
    results = collect_results(folder)
    json_path = json_path or folder / "results.json"
    page_path = page_path or folder / "results.md"
    json_path.write_text(json.dumps(results.as_json(), indent=1) + "\n", encoding="utf-8")
    text = page(results)
    page_path.write_text(text, encoding="utf-8")
    click.echo(text)
    click.echo(f"wrote {json_path} and {page_path}")


if __name__ == "__main__":
    cli()
