"""DWDP on CPU ranks, side by side with full replicas and with expert parallelism.

Every rank process holds all variants at once and runs them in turn, so that they share one machine
state; the order changes from round to round and medians over the rounds are compared. Each variant
works through the same prompts: forwards of whole prompts (prefill) whose lengths vary with the given
coefficient of variation (CV), and greedy generation.

    replicas   every rank loads the whole model
    direct     DWDP, experts read in the peers' memory
    staged     DWDP, experts copied ahead into slots
    DEP        every rank computes its experts for all ranks' tokens; collectives in every layer (gloo)

tokens/s is the sum of the ranks' rates. Logits of every DWDP variant are checked to be bit-identical
to the replica's before anything is timed.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from expert_parallel import shard_experts
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from dwdp.config import DwdpConfig
from dwdp.engines.transformers import load
from dwdp.engines.transformers.make_model import write_checkpoint
from dwdp.group import Group
from dwdp.rendezvous import serve_store
from dwdp.serving.generation import quiet_transformers

MIN_DIRECT_RATIO = 0.95
VARIANTS = ("replicas", "direct", "staged", "DEP")


@dataclass(frozen=True)
class Settings:
    model_dir: str
    num_ranks: int
    threads_per_rank: int
    num_rounds: int
    prompts_per_round: int
    mean_length: int
    cvs: tuple[float, ...]
    new_tokens: int


@dataclass(frozen=True)
class Row:
    """One workload: tokens/s of every variant that ran it, a list of one figure per round."""

    workload: str
    tokens_per_s: dict[str, list[float]]

    def median(self, variant: str) -> float:
        return statistics.median(self.tokens_per_s[variant])

    def ratios(self, variant: str) -> list[float]:
        """Per round, this variant's rate over the replicas'."""
        pairs = zip(self.tokens_per_s[variant], self.tokens_per_s["replicas"], strict=True)
        return [ours / replicas for ours, replicas in pairs]


def prompt_lengths(settings: Settings, cv: float, round_: int, rank: int) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * round_ + rank)
    lengths = settings.mean_length * (
        1 + cv * torch.randn(settings.prompts_per_round, generator=generator)
    )
    return lengths.clamp(min=8).round().int().tolist()


def prompts(lengths: list[int], vocab_size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(3, vocab_size, (1, length), generator=generator) for length in lengths]


def load_variants(settings: Settings, store: Any, rank: int) -> dict[str, PreTrainedModel]:
    models: dict[str, PreTrainedModel] = {}
    for variant in ("replicas", "DEP"):
        models[variant] = AutoModelForCausalLM.from_pretrained(settings.model_dir).eval()
    shard_experts(models["DEP"])
    for mode in ("direct", "staged"):
        group = Group(rank, settings.num_ranks, dist.PrefixStore(mode, store), timeout_s=120)
        config = DwdpConfig(dwdp_size=settings.num_ranks, fetch_mode=mode)
        models[mode] = load(settings.model_dir, group, config).model
    return models


@torch.inference_mode()
def run_rank(rank: int, settings: Settings, port: int, results: Any) -> None:
    warnings.filterwarnings("ignore")
    quiet_transformers()
    torch.set_num_threads(settings.threads_per_rank)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore("gloo", store),
        rank=rank,
        world_size=settings.num_ranks,
        timeout=timedelta(minutes=10),
    )
    models = load_variants(settings, store, rank)
    vocab_size = models["replicas"].config.vocab_size
    check_exactness(models, vocab_size)

    for round_ in range(settings.num_rounds + 1):
        for cv in settings.cvs:
            batch = prompts(prompt_lengths(settings, cv, round_, rank), vocab_size)
            for variant in rotated(VARIANTS, round_):
                seconds = timed(prefill, models[variant], batch)
                num_tokens = sum(prompt.shape[1] for prompt in batch)
                if round_:  # The first round warms up.
                    results.put((f"prefill, CV {cv:g}", variant, round_, num_tokens / seconds))
        batch = prompts([settings.mean_length // 2], vocab_size)
        for variant in rotated(("replicas", "direct", "staged"), round_):
            seconds = timed(generate, models[variant], batch, settings.new_tokens)
            if round_:
                results.put(("generate", variant, round_, settings.new_tokens / seconds))
    dist.destroy_process_group()


def rotated(variants: tuple[str, ...], by: int) -> tuple[str, ...]:
    by %= len(variants)
    return variants[by:] + variants[:by]


def timed(work: Any, *args: Any) -> float:
    dist.barrier()
    start = time.perf_counter()
    work(*args)
    return time.perf_counter() - start


def prefill(model: PreTrainedModel, batch: list[torch.Tensor]) -> None:
    for prompt in batch:
        model(prompt, use_cache=False, logits_to_keep=1)


def generate(model: PreTrainedModel, batch: list[torch.Tensor], new_tokens: int) -> None:
    for prompt in batch:
        model.generate(
            prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
        )


def check_exactness(models: dict[str, PreTrainedModel], vocab_size: int) -> None:
    for prompt in prompts([40, 7], vocab_size):
        expected = models["replicas"](prompt, use_cache=False).logits
        for variant in ("direct", "staged"):
            actual = models[variant](prompt, use_cache=False).logits
            if not torch.equal(actual, expected):
                raise SystemExit(f"logits of {variant} differ from the replica's")
        close = models["DEP"](prompt, use_cache=False).logits
        torch.testing.assert_close(close, expected, rtol=1e-3, atol=1e-3)


def measure(settings: Settings) -> list[Row]:
    store = serve_store("127.0.0.1", 0, settings.num_ranks)
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=run_rank, args=(rank, settings, store.port, results))
        for rank in range(settings.num_ranks)
    ]
    for process in processes:
        process.start()
    num_measured = settings.num_rounds * (len(settings.cvs) * len(VARIANTS) + 3)
    rates: dict[str, dict[str, dict[int, float]]] = {}
    with Console(stderr=True).status("measuring"):
        for _ in range(num_measured * settings.num_ranks):
            while results.empty():
                if any(process.exitcode for process in processes):
                    for process in processes:
                        process.kill()
                    raise SystemExit("a rank failed; its traceback is above")
                time.sleep(0.05)
            workload, variant, round_, rate = results.get()
            by_round = rates.setdefault(workload, {}).setdefault(variant, {})
            by_round[round_] = by_round.get(round_, 0.0) + rate
    for process in processes:
        process.join()
    return [
        Row(workload, {v: [r[k] for k in sorted(r)] for v, r in variants.items()})
        for workload, variants in rates.items()
    ]


def table(rows: list[Row], settings: Settings) -> Table:
    table = Table(title=f"{settings.num_ranks} ranks, {settings.threads_per_rank} thread(s) each")
    table.add_column("workload")
    for variant in VARIANTS:
        table.add_column(f"{variant} tokens/s", justify="right")
        if variant != "replicas":
            table.add_column("ratio", justify="right", style="bold")
    for row in rows:
        cells = [row.workload]
        for variant in VARIANTS:
            measured = variant in row.tokens_per_s
            cells.append(f"{row.median(variant):.0f}" if measured else "-")
            if variant != "replicas":
                cells.append(quartiles(row.ratios(variant)) if measured else "-")
        table.add_row(*cells)
    return table


def quartiles(ratios: list[float]) -> str:
    """``median (lower-upper quartile)``."""
    if len(ratios) < 2:
        return f"{ratios[0]:.2f}"
    lower, median, upper = statistics.quantiles(ratios, n=4)
    return f"{median:.2f} ({lower:.2f}-{upper:.2f})"


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@click.command(context_settings={"show_default": True})
@click.option(
    "--model",
    "model_dir",
    help="Checkpoint to measure. Default: a random Qwen3-MoE.",
)
@click.option("--ranks", default=2)
@click.option("--threads-per-rank", default=max(1, (os.cpu_count() or 2) // 2))
@click.option("--rounds", default=11, help="Measured rounds, after one to warm up.")
@click.option("--prompts", "prompts_per_round", default=4, help="Prompts per rank and round.")
@click.option("--mean-length", default=256, help="Mean tokens of a prompt.")
@click.option("--cv", "cvs", multiple=True, default=(0.0, 0.2, 0.4), help="Length CV; repeatable.")
@click.option("--new-tokens", default=24, help="Tokens generated per prompt.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the figures as JSON.")
def main(
    model_dir: str | None,
    ranks: int,
    threads_per_rank: int,
    rounds: int,
    prompts_per_round: int,
    mean_length: int,
    cvs: tuple[float, ...],
    new_tokens: int,
    output: Path | None,
) -> None:
    """Measure DWDP on CPU ranks against full replicas and expert parallelism."""
    with tempfile.TemporaryDirectory() as scratch:
        if model_dir is None:
            model_dir = str(Path(scratch) / "model")
            write_checkpoint(
                Path(model_dir),
                "qwen3_moe",
                preset="small",
                overrides={"num_experts": 64, "hidden_size": 512, "num_experts_per_tok": 8},
            )
        settings = Settings(
            model_dir,
            ranks,
            threads_per_rank,
            rounds,
            prompts_per_round,
            mean_length,
            tuple(cvs),
            new_tokens,
        )
        rows = measure(settings)
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(table(rows, settings))
    direct = [ratio for row in rows for ratio in row.ratios("direct")]
    console.print(
        "ratio: tokens/s over the replicas' of the same round, median (quartiles). "
        "DWDP logits are bit-identical to the replica's.\n"
        f"direct over replicas, all {len(direct)} pairs: {quartiles(direct)}; at least "
        f"{MIN_DIRECT_RATIO} is wanted"
    )
    if output is not None:
        figures = {
            "settings": {**asdict(settings), "model_dir": Path(model_dir).name},
            "cpu": cpu_name(),
            "torch": torch.__version__,
            "rows": [asdict(row) for row in rows],
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(0 if statistics.median(direct) >= MIN_DIRECT_RATIO else 1)


if __name__ == "__main__":
    main()
