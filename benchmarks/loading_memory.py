"""Memory of a group: one copy of the experts, and no second one while loading.

Makes a random checkpoint with at least 1 GiB of experts, loads it on N ranks in direct mode, and
measures, in every rank's process:

* peak resident memory while it loads (the kernel's own high-water mark, reset before), against its
  dense weights and its resident experts;
* after a forward has touched every expert on every rank: the proportional set size (PSS) of expert
  memory, in which a page mapped by n processes counts 1/n, summed over the group, against one copy.
"""

from __future__ import annotations

import json
import queue
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from dwdp.config import DwdpConfig
from dwdp.engines.transformers import load
from dwdp.engines.transformers.make_model import write_checkpoint
from dwdp.group import Group
from dwdp.rendezvous import serve_store
from dwdp.serving.generation import quiet_transformers

MIB = 1 << 20
GROUP_PSS_LIMIT = 1.05
LOADING_SLACK, LOADING_BASE_BYTES = 0.10, 200 * MIB


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank. ``rss_before_bytes``: the interpreter with torch and Transformers imported."""

    rank: int
    dense_bytes: int
    resident_expert_bytes: int
    rss_before_bytes: int
    peak_rss_bytes: int
    expert_pss_bytes: int
    one_copy_bytes: int

    @property
    def loading_bytes(self) -> int:
        """What loading added to the process at its peak."""
        return self.peak_rss_bytes - self.rss_before_bytes

    @property
    def loading_limit_bytes(self) -> int:
        held = self.dense_bytes + self.resident_expert_bytes
        return int(held * (1 + LOADING_SLACK)) + LOADING_BASE_BYTES


def expert_pss_bytes() -> int:
    """PSS of this process's mappings of shared expert memory."""
    total, is_expert = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split(":")[0].isalpha() and "-" in line.split(" ")[0]:
            is_expert = "memfd:dwdp" in line
        elif is_expert and line.startswith("Pss:"):
            total += int(line.split()[1]) * 1024
    return total


@torch.inference_mode()
def run_rank(rank: int, model_dir: str, num_ranks: int, port: int, results: Any) -> None:
    quiet_transformers()
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    group = Group(rank, num_ranks, store, timeout_s=600)
    with load(model_dir, group, DwdpConfig(dwdp_size=num_ranks, fetch_mode="direct")) as attached:
        report = attached.load_report
        assert report is not None
        one_copy = 0
        for parameter in attached.model.parameters():
            if parameter.ndim == 3:  # What a kernel would read: every expert of every layer.
                one_copy += parameter.nbytes
                parameter.view(torch.uint8)[..., ::2048].sum()
        group.barrier("touched")
        pss = expert_pss_bytes()
        group.barrier("measured")
        results.put(
            RankMemory(
                rank,
                report.dense_bytes,
                attached.runtime.stats().resident_expert_bytes,
                report.rss_before_bytes,
                report.peak_rss_bytes,
                pss,
                one_copy,
            )
        )


def measure(model_dir: str, num_ranks: int) -> list[RankMemory]:
    store = serve_store("127.0.0.1", 0, num_ranks)
    context = mp.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=run_rank, args=(rank, model_dir, num_ranks, store.port, results))
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    ranks: list[RankMemory] = []
    while len(ranks) < num_ranks:
        try:
            ranks.append(results.get(timeout=1))
        except queue.Empty:
            if any(process.exitcode for process in processes):
                for process in processes:
                    process.kill()
                raise SystemExit("a rank failed; its traceback is above") from None
    for process in processes:
        process.join()
    return sorted(ranks, key=lambda memory: memory.rank)


def show(console: Console, ranks: list[RankMemory]) -> bool:
    table = Table(title=f"{len(ranks)} ranks, direct, MiB")
    for name in ("rank", "dense", "resident experts", "peak RSS", "before loading"):
        table.add_column(name, justify="right")
    table.add_column("added by loading", justify="right", style="bold")
    table.add_column("limit", justify="right")
    for memory in ranks:
        figures = (
            memory.dense_bytes,
            memory.resident_expert_bytes,
            memory.peak_rss_bytes,
            memory.rss_before_bytes,
            memory.loading_bytes,
            memory.loading_limit_bytes,
        )
        table.add_row(str(memory.rank), *(f"{figure / MIB:.0f}" for figure in figures))
    console.print(table)
    pss, one_copy = sum(memory.expert_pss_bytes for memory in ranks), ranks[0].one_copy_bytes
    console.print(
        f"experts in memory, whole group: {pss / MIB:.0f} MiB (PSS) for one copy of "
        f"{one_copy / MIB:.0f} MiB: ratio {pss / one_copy:.3f} (limit {GROUP_PSS_LIMIT})"
    )
    return pss <= GROUP_PSS_LIMIT * one_copy and all(
        memory.loading_bytes <= memory.loading_limit_bytes for memory in ranks
    )


@click.command(context_settings={"show_default": True})
@click.option("--ranks", default=4)
@click.option("--gib", default=1.0, help="GiB of experts in the checkpoint.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the figures as JSON.")
def main(ranks: int, gib: float, output: Path | None) -> None:
    """Measure a group's memory; exit code 1 if it is over the limits."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    with tempfile.TemporaryDirectory() as scratch:
        model_dir = str(Path(scratch) / "model")
        write_checkpoint(
            Path(model_dir), "qwen3_moe", preset="small", expert_bytes=int(gib * 2**30)
        )
        measured = measure(model_dir, ranks)
    within = show(console, measured)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps([asdict(memory) for memory in measured], indent=2) + "\n")
    sys.exit(0 if within else 1)


if __name__ == "__main__":
    main()
