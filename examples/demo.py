"""The demo: a small trained model on 4 ranks, staged and direct, against the same model unsharded.

``make demo`` runs it. Everything it shows comes from two runs of ``dwdp generate`` and from
Transformers' own ``generate`` on the whole model.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

MODEL_DIR = Path(__file__).parent / "tiny_moe" / "model"
PROMPTS = Path(__file__).parent / "prompts.jsonl"
MODES = ("staged", "direct")


def run_dwdp(
    folder: Path, model_dir: Path, mode: str, num_ranks: int, max_new_tokens: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Completions and report of one ``dwdp generate``."""
    output, report = folder / f"{mode}.out", folder / f"{mode}.report"
    command = [os.path.relpath(sys.executable), "-m", "dwdp", "generate"]
    command += [os.path.relpath(model_dir), "--dwdp-size", str(num_ranks), "--fetch-mode", mode]
    command += ["--prompts", os.path.relpath(PROMPTS), "--max-new-tokens", str(max_new_tokens)]
    print(f"\n$ {shlex.join(command)}", flush=True)
    subprocess.run([*command, "--output", str(output), "--report", str(report)], check=True)
    completions = [json.loads(line) for line in output.read_text().splitlines()]
    return completions, json.loads(report.read_text())


def run_whole_model(
    model_dir: Path, completions: list[dict[str, Any]], max_new_tokens: int
) -> tuple[list[list[int]], int, int]:
    """Greedy tokens of the unsharded model for the same prompts, its dense and its expert bytes."""
    import torch
    from transformers import AutoModelForCausalLM

    from dwdp.engines.transformers.experts import find_expert_layers
    from dwdp.serving.generation import quiet_transformers

    quiet_transformers()
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    expert_bytes = sum(layer.num_bytes for layer in find_expert_layers(model))
    total_bytes = sum(parameter.nbytes for parameter in model.parameters())
    tokens = []
    for completion in completions:
        prompt = torch.tensor([completion["prompt_token_ids"]])
        output = model.generate(prompt, max_new_tokens=max_new_tokens, do_sample=False)
        tokens.append(output[0, prompt.shape[1] :].tolist())
    return tokens, total_bytes - expert_bytes, expert_bytes


def show_completions(console: Console, completions: list[dict[str, Any]]) -> None:
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    prompts = {record["id"]: record["prompt"] for record in map(json.loads, lines)}
    for completion in completions:
        prompt = Text(prompts[completion["id"]], style="bold")
        console.print(prompt.append(completion["text"], style="not bold green"))
        console.rule(style="dim")


def show_equality(
    console: Console, whole: list[list[int]], runs: dict[str, list[dict[str, Any]]]
) -> bool:
    equal = True
    for mode, completions in runs.items():
        same = sum(c["token_ids"] == tokens for c, tokens in zip(completions, whole, strict=True))
        num_tokens = sum(map(len, whole))
        equal &= same == len(whole)
        verdict = "[green]equal[/]" if same == len(whole) else "[red]DIFFERENT[/]"
        console.print(
            f"{mode:>6}: {same} of {len(whole)} completions ({num_tokens} tokens) equal the unsharded "
            f"model's token for token: {verdict}"
        )
    return equal


def show_memory(
    console: Console, dense_bytes: int, expert_bytes: int, reports: dict[str, dict[str, Any]]
) -> None:
    table = Table(title="Weights in memory, and what moved")
    table.add_column("rank")
    for name in ("dense", "experts", "staging", "all", "of a replica", "fetched", "exposed wait"):
        table.add_column(name, justify="right")
    replica = dense_bytes + expert_bytes
    table.add_row("full replica", *_mib(dense_bytes, expert_bytes, 0, replica), "100 %", "-", "-")
    for mode, report in reports.items():
        table.add_section()
        for rank in report["ranks"]:
            parts = (rank["dense_bytes"], rank["resident_expert_bytes"], rank["staging_bytes"])
            table.add_row(
                f"{mode}, rank {rank['rank']}",
                *_mib(*parts, sum(parts)),
                f"{100 * sum(parts) / replica:.0f} %",
                *_mib(rank["fetched_bytes"]),
                f"{1000 * rank['exposed_wait_s']:.1f} ms of {rank['wall_s']:.1f} s",
            )
    console.print(table)


def _mib(*sizes: int) -> list[str]:
    return [f"{size / 2**20:.2f} MiB" for size in sizes]


@click.command(context_settings={"show_default": True})
@click.option("--model", "model_dir", type=click.Path(path_type=Path), default=MODEL_DIR)
@click.option("--ranks", default=4, help="Ranks that share the experts.")
@click.option("--max-new-tokens", default=48)
def main(model_dir: Path, ranks: int, max_new_tokens: int) -> None:
    """Run the example model under DWDP and compare it with the whole model."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    runs, reports = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for mode in MODES:
            runs[mode], reports[mode] = run_dwdp(
                Path(folder), model_dir, mode, ranks, max_new_tokens
            )
    whole, dense_bytes, expert_bytes = run_whole_model(model_dir, runs["staged"], max_new_tokens)
    console.print()
    show_completions(console, runs["staged"])
    equal = show_equality(console, whole, runs)
    console.print()
    show_memory(console, dense_bytes, expert_bytes, reports)
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
