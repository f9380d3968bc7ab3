"""A whole model under DWDP against the unsharded model, ranks being processes that share one GPU.

Every rank builds the same random Qwen3-MoE-shaped model in bfloat16, scaled to the GPU's memory, and
keeps it whole beside its attachments in the modes staged, direct and demand. All variants run the same
steps, all ranks at once, in rounds that change the order; the unsharded model is the baseline of each
round. Logits are checked to be bit-identical first.

Processes that share a GPU take turns on it, and their peers' memory is the GPU's own: the ratios show
what fetching costs on one GPU, not what a link between GPUs would make of it.
"""

from __future__ import annotations

import copy
import queue
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import click
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from figures import NONE, Cell, Column, Table
from harness import Budget, benchmark_command, free_bytes
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from dwdp.config import DwdpConfig
from dwdp.engines.transformers import Attachment, attach
from dwdp.group import Group
from dwdp.rendezvous import serve_store
from dwdp.serving.generation import quiet_transformers

WHOLE = "unsharded"
MODES = ("staged", "direct", "demand")
VARIANTS = (WHOLE, *MODES)
STEPS = (8, 512, 8192)
"""Tokens of a step: few, as in decode; some; and many, as in prefill."""
ROUNDS, FORWARDS = 3, 2
MEMORY_SHARE = 0.6
MAX_LAYERS = 12
SET_UP_S = 120.0


@dataclass
class RankFigures:
    """What one rank measured.

    Attributes:
        tokens_per_s: by step, variant and round.
        exposed_ms: compute standing still per forward, by step and mode.
        held_bytes: dense weights, resident experts and slots, by variant.
        device_bytes: what attaching took from the GPU's free memory, all ranks together, by mode.
    """

    tokens_per_s: dict[tuple[int, str], list[float]] = field(default_factory=dict)
    exposed_ms: dict[tuple[int, str], float] = field(default_factory=dict)
    held_bytes: dict[str, int] = field(default_factory=dict)
    device_bytes: dict[str, int] = field(default_factory=dict)


def model_config(num_layers: int) -> Qwen3MoeConfig:
    """Qwen3-30B-A3B with fewer layers and a small vocabulary."""
    return Qwen3MoeConfig(
        hidden_size=2048,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_hidden_layers=num_layers,
        vocab_size=4096,
        tie_word_embeddings=False,
    )


def scaled_layers(available_bytes: int, num_ranks: int) -> int:
    """Layers, an even number, for which all variants of all ranks fit."""
    config = model_config(1)
    layer = 3 * config.num_experts * config.hidden_size * config.moe_intermediate_size * 2
    remote = layer * (num_ranks - 1) / num_ranks
    slots = num_ranks * remote * (2 + 1)  # Two in mode staged, one in mode demand.
    # A whole copy per rank, one per mode, and one rank's own experts at a time while it attaches.
    per_layer = layer * (num_ranks + len(MODES))
    return max(2, min(MAX_LAYERS, int((available_bytes - slots) / per_layer) // 2 * 2))


def build(num_layers: int) -> PreTrainedModel:
    """The same random model on every rank."""
    torch.manual_seed(0)
    with torch.device("cuda", torch.cuda.current_device()):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            model_config(num_layers), dtype=torch.bfloat16
        )
    return model.eval()


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own that shares the other's weights."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


class Rank:
    """One process: the whole model, and its attachments."""

    def __init__(self, rank: int, num_ranks: int, num_layers: int, port: int) -> None:
        self.figures = RankFigures()
        self._store = dist.TCPStore("127.0.0.1", port, is_master=False)
        self._rank, self._num_ranks = rank, num_ranks
        whole = build(num_layers)
        self.models = {WHOLE: whole}
        self.attachments: dict[str, Attachment] = {}
        total_bytes = sum(parameter.nbytes for parameter in whole.parameters())
        expert_bytes = sum(p.nbytes for n, p in whole.named_parameters() if ".experts." in n)
        self.figures.held_bytes[WHOLE] = total_bytes
        for mode in MODES:
            self._attach(mode, total_bytes - expert_bytes)

    def check(self) -> None:
        """Bit-identical logits, or an error."""
        for num_tokens in (5, 300):
            tokens = self._tokens(num_tokens)
            expected = self.models[WHOLE](tokens, use_cache=False).logits
            for mode in MODES:
                if not torch.equal(self.models[mode](tokens, use_cache=False).logits, expected):
                    raise RuntimeError(f"logits of {mode} differ from the unsharded model's")

    def run(self, num_tokens: int, variant: str) -> None:
        """A timed run of one variant; the same on all ranks at once."""
        tokens = self._tokens(num_tokens)
        model = self.models[variant]
        exposed_s = self._exposed_s(variant)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(FORWARDS):
            model(tokens, use_cache=False, logits_to_keep=1)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        rates = self.figures.tokens_per_s.setdefault((num_tokens, variant), [])
        rates.append(FORWARDS * num_tokens / seconds)
        exposed_ms = (self._exposed_s(variant) - exposed_s) * 1e3 / FORWARDS
        self.figures.exposed_ms[num_tokens, variant] = exposed_ms

    def forget_warm_up(self) -> None:
        self.figures.tokens_per_s.clear()

    def detach(self) -> None:
        self.models.clear()
        for attachment in self.attachments.values():
            attachment.runtime.detach()

    def _attach(self, mode: str, dense_bytes: int) -> None:
        store = dist.PrefixStore(mode, self._store)
        group = Group(self._rank, self._num_ranks, store, timeout_s=SET_UP_S)
        config = DwdpConfig(dwdp_size=self._num_ranks, fetch_mode=mode)
        group.barrier("before")
        free_before = free_bytes()
        group.barrier("attach")
        attachment = attach(twin(self.models[WHOLE]), group, config)
        group.barrier("after")
        self.figures.device_bytes[mode] = free_before - free_bytes()
        group.barrier("measured")
        stats = attachment.runtime.stats()
        self.figures.held_bytes[mode] = (
            dense_bytes + stats.resident_expert_bytes + stats.staging_bytes
        )
        self.attachments[mode] = attachment
        self.models[mode] = attachment.model

    def _exposed_s(self, variant: str) -> float:
        if variant == WHOLE:
            return 0.0
        return self.attachments[variant].runtime.stats().exposed_wait_s

    @staticmethod
    def _tokens(num_tokens: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(num_tokens)
        return torch.randint(3, 4096, (1, num_tokens), generator=generator).cuda()


@torch.inference_mode()
def run_rank(
    rank: int,
    num_ranks: int,
    num_layers: int,
    port: int,
    meet: Any,
    is_over: Any,
    end: float,
    results: Any,
) -> None:
    """A rank process: rounds until they are all done or the time is up, which rank 0 decides."""
    quiet_transformers()
    this = Rank(rank, num_ranks, num_layers, port)
    this.check()
    for round_ in range(ROUNDS + 1):
        by = round_ % len(VARIANTS)
        for num_tokens, variant in product(STEPS, VARIANTS[by:] + VARIANTS[:by]):
            meet.wait(SET_UP_S)
            this.run(num_tokens, variant)
        if round_ == 0:
            this.forget_warm_up()
        if rank == 0 and round_ > 0 and time.time() >= end:
            is_over.set()
        if round_ > 0:
            # A copy, for it is sent while the next round changes the figures.
            results.put((rank, round_, copy.deepcopy(this.figures)))
        meet.wait(SET_UP_S)
        if is_over.is_set():
            break
    results.put((rank, 0, None))
    meet.wait(SET_UP_S)
    this.detach()


def measure(num_ranks: int, num_layers: int, budget: Budget) -> Iterator[list[RankFigures]]:
    """The figures of every rank, after each round that all of them finish in time."""
    store = serve_store("127.0.0.1", 0, num_ranks)
    context = mp.get_context("spawn")
    results, meet, is_over = context.Queue(), context.Barrier(num_ranks), context.Event()
    end = time.time() + budget.left_s * 0.8
    settings = (num_ranks, num_layers, store.port, meet, is_over, end, results)
    processes = [
        context.Process(target=run_rank, args=(rank, *settings), daemon=True)
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    rounds: dict[int, dict[int, RankFigures]] = {}
    num_ended = 0
    try:
        while num_ended < num_ranks and not budget.is_spent:
            try:
                rank, round_, figures = results.get(timeout=0.2)
            except queue.Empty:
                failed = [number for number, process in enumerate(processes) if process.exitcode]
                if failed:
                    raise SystemExit(
                        f"error: rank {failed[0]} of {num_ranks} failed; its traceback is above"
                    ) from None
                continue
            if figures is None:
                num_ended += 1
                continue
            by_rank = rounds.setdefault(round_, {})
            by_rank[rank] = figures
            if len(by_rank) == num_ranks:
                yield [by_rank[rank] for rank in range(num_ranks)]
        for process in processes:
            process.join(min(20.0, budget.left_s))
    finally:
        for process in processes:
            process.kill()


def rows_of(num_ranks: int, ranks: list[RankFigures]) -> list[tuple[Cell, ...]]:
    """One row per step and variant; without figures if there are none."""

    def rate(key: tuple[int, str]) -> list[float]:
        """Of all ranks together, by round."""
        return [sum(rates) for rates in zip(*(r.tokens_per_s[key] for r in ranks), strict=True)]

    def mean(pick: Callable[[RankFigures], float]) -> float:
        return statistics.mean(map(pick, ranks))

    rows: list[tuple[Cell, ...]] = []
    for num_tokens, variant in product(STEPS, VARIANTS):
        key = (num_tokens, variant)
        if not ranks:
            rows.append((num_ranks, num_tokens, variant, *[None] * 5))
            continue
        rates, whole = rate(key), rate((num_tokens, WHOLE))
        ratio = statistics.median(a / b for a, b in zip(rates, whole, strict=True))
        is_whole = variant == WHOLE
        rows.append(
            (
                num_ranks,
                num_tokens,
                variant,
                statistics.median(rates),
                ratio,
                mean(lambda r, v=variant: r.held_bytes[v]) / 1e9,
                NONE if is_whole else ranks[0].device_bytes[variant] / num_ranks / 1e9,
                NONE if is_whole else mean(lambda r, k=key: r.exposed_ms[k]),
            )
        )
    return rows


def table_of(by_size: dict[int, list[RankFigures]], num_layers: dict[int, int]) -> Table:
    """All group sizes in one table."""
    layers = ", ".join(f"{count} with {size} ranks" for size, count in num_layers.items())
    return Table(
        "A model: Qwen3-30B-A3B shape in bf16, fewer layers",
        (
            Column("ranks"),
            Column("tokens per step"),
            Column("variant"),
            Column("tokens/s, all ranks", ".0f"),
            Column("ratio to unsharded", ".3f"),
            Column("weights and slots GB per rank", ".2f"),
            Column("taken by attaching GB per rank", ".2f"),
            Column("exposed wait ms per step", ".2f"),
        ),
        tuple(row for size, ranks in by_size.items() for row in rows_of(size, ranks)),
        (
            f"Layers: {layers}. All ranks are processes on one GPU and run at once, the unsharded ones "
            "too. Logits of every mode are bit-identical to the unsharded model's.",
        ),
    )


@benchmark_command
@click.option("--ranks", "sizes", multiple=True, default=(2, 4), help="Group sizes; repeatable.")
def main(budget: Budget, sizes: tuple[int, ...]) -> Iterator[list[Table]]:
    """Measure a Qwen3-MoE-shaped model under DWDP against the unsharded model."""
    by_size: dict[int, list[RankFigures]] = {size: [] for size in sizes}
    num_layers: dict[int, int] = {}
    for index, size in enumerate(sizes):
        num_layers[size] = scaled_layers(int(free_bytes() * MEMORY_SHARE), size)
        share = Budget(budget.left_s / (len(sizes) - index))
        for ranks in measure(size, num_layers[size], share):
            by_size[size] = ranks
            yield [table_of(by_size, num_layers)]
    yield [table_of(by_size, num_layers)]


if __name__ == "__main__":
    main()
