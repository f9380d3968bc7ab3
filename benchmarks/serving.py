"""What serving has to hold: survival, throughput, latency and steady memory, measured over real HTTP.

* **survival**: requests at a high concurrency while a rank is killed every few seconds. None may be lost that
  had not streamed a token, and every completed answer equals the unsharded model's.
* **throughput**: two ranks behind the router against two independent servers driven directly, in
  alternating rounds of one run.
* **latency**: what the router adds to a request of one token, request by request beside a server driven
  directly.
* **soak**: resident memory and descriptors of the router and the ranks under load.

Exits with 1 if a limit is broken. Weights are in float32: in bfloat16 the other sequences of a batch can
tip the scales between two nearly equal tokens, with or without DWDP.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import psutil
import torch
from rich.console import Console
from serving_figures import (
    Latency,
    Soak,
    SoakedProcess,
    Survival,
    Throughput,
    Verdict,
    judge_latency,
    judge_soak,
    judge_survival,
    judge_throughput,
)
from serving_load import Answer, Target, ask, ask_all
from serving_servers import MODEL, Served, dwdp_serve, independent_server
from transformers import AutoModelForCausalLM, AutoTokenizer

from dwdp.serving.generation import quiet_transformers

ROOT = Path(__file__).parents[1]
SETTLED_SHARE = 0.25
"""Share of the soak after which memory has to be flat."""

NUM_DISTINCT = 20
"""Different prompts under fire."""

WORDS = ("def", "class", "return", "self", "import", "for", "while", "if", "not", "value", "list")


@dataclass(frozen=True)
class Settings:
    """What is measured; see the command's options."""

    model_dir: str
    survival_ranks: int
    requests: int
    concurrency: int
    kill_every_s: float
    num_tokens: int
    rounds: int
    requests_per_round: int
    latency_requests: int
    soak_s: float


def make_prompts(count: int) -> list[str]:
    """Different beginnings, the same in every run."""
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(2, 8))) for _ in range(count)]


def unsharded_answers(settings: Settings, prompts: Sequence[str]) -> dict[str, str]:
    """What Transformers' own ``generate`` answers with the whole model, prompt by prompt."""
    quiet_transformers()
    torch.set_num_threads(1)
    tokenizer: Any = AutoTokenizer.from_pretrained(settings.model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(settings.model_dir, dtype=torch.float32)
    answers = {}
    for prompt in dict.fromkeys(prompts):
        tokens = torch.tensor([tokenizer(prompt).input_ids])
        generated = model.generate(tokens, do_sample=False, max_new_tokens=settings.num_tokens)
        new = generated[0, tokens.shape[1] :]
        answers[prompt] = tokenizer.decode(new, skip_special_tokens=True)
    return answers


def measure_survival(settings: Settings) -> Survival:
    """Requests under fire."""
    distinct = make_prompts(NUM_DISTINCT)
    expected = unsharded_answers(settings, distinct)
    prompts = [distinct[number % len(distinct)] for number in range(settings.requests)]
    with dwdp_serve(settings.model_dir, settings.survival_ranks) as served:
        started_s = time.monotonic()
        answers, kills, recoveries_s = asyncio.run(_under_fire(settings, served, prompts))
        wall_s = time.monotonic() - started_s
    complete = [answer for answer in answers if answer.is_complete]
    return Survival(
        requests=len(answers),
        kills=kills,
        lost=sum(answer.is_lost for answer in answers),
        cut_streams=sum(not answer.is_complete and not answer.is_lost for answer in answers),
        completed=len(complete),
        wrong=sum(answer.text != expected[answer.prompt] for answer in complete),
        wall_s=wall_s,
        recoveries_s=recoveries_s,
        errors_of_lost=[str(answer.error) for answer in answers if answer.is_lost],
    )


async def _under_fire(
    settings: Settings, served: Served, prompts: Sequence[str]
) -> tuple[list[Answer], int, list[float]]:
    """Ask everything, and kill a rank that is ready every few seconds meanwhile."""
    draw = random.Random(0)
    kills, recoveries_s = 0, {}
    work = asyncio.ensure_future(
        ask_all([served.target], prompts, settings.num_tokens, concurrency=settings.concurrency)
    )
    while not (await asyncio.wait({work}, timeout=settings.kill_every_s))[0]:
        ready = await asyncio.to_thread(served.rank_pids)
        for rank, seconds in (await asyncio.to_thread(served.recoveries_s)).items():
            recoveries_s[rank, seconds] = seconds
        if ready:
            os.kill(ready[draw.choice(sorted(ready))], signal.SIGKILL)
            kills += 1
    return work.result(), kills, list(recoveries_s.values())


def measure_throughput(settings: Settings) -> Throughput:
    """The same prompts, in turns, through the router and to two servers directly."""
    result = Throughput([], [])
    prompts = make_prompts(settings.requests_per_round)
    with ExitStack() as stack:
        served = stack.enter_context(dwdp_serve(settings.model_dir, 2))
        servers = [stack.enter_context(independent_server(settings.model_dir)) for _ in range(2)]
        for round_ in range(settings.rounds + 1):
            ways = [(result.router, [served.target]), (result.direct, servers)]
            for rates, targets in ways if round_ % 2 else reversed(ways):
                started_s = time.monotonic()
                answers = asyncio.run(
                    ask_all(targets, prompts, settings.num_tokens, concurrency=32)
                )
                seconds = time.monotonic() - started_s
                assert all(answer.is_complete for answer in answers)
                if round_ > 0:  # the first round warms up
                    rates.append(len(prompts) * settings.num_tokens / seconds)
    return result


def measure_latency(settings: Settings) -> Latency:
    """Requests of one token, alternately through the router and directly."""
    with (
        dwdp_serve(settings.model_dir, 1) as served,
        independent_server(settings.model_dir) as server,
    ):
        router_s, direct_s = asyncio.run(_alternate(settings, served.target, server))
    return Latency(statistics.median(router_s), statistics.median(direct_s))


async def _alternate(
    settings: Settings, router: Target, server: Target
) -> tuple[list[float], list[float]]:
    seconds: tuple[list[float], list[float]] = ([], [])
    async with router.session() as through, server.session() as directly:
        for number in range(settings.latency_requests + 20):
            for session, walls in zip((through, directly), seconds, strict=True):
                answer = await ask(session, MODEL, "def f(", 1, is_stream=False)
                assert answer.is_complete, answer.error
                if number >= 20:
                    walls.append(answer.wall_s)
    return seconds


def measure_soak(settings: Settings) -> Soak:
    """Load for a long time."""
    with dwdp_serve(settings.model_dir, 2) as served:
        processes = {"router": psutil.Process(served.process.pid)}
        processes |= {
            f"rank {rank}": psutil.Process(pid) for rank, pid in sorted(served.rank_pids().items())
        }
        settled: dict[str, tuple[int, int]] = {}
        started_s, count, failed = time.monotonic(), 0, 0
        while (elapsed_s := time.monotonic() - started_s) < settings.soak_s:
            if not settled and elapsed_s > SETTLED_SHARE * settings.soak_s:
                settled = {name: _usage(process) for name, process in processes.items()}
            answers = asyncio.run(
                ask_all([served.target], make_prompts(100), settings.num_tokens, concurrency=16)
            )
            count += len(answers)
            failed += sum(not answer.is_complete for answer in answers)
        time.sleep(5)  # idle connections are closed after 3 s
        rows = []
        for name, process in processes.items():
            (rss, descriptors), (last_rss, last_descriptors) = settled[name], _usage(process)
            rows.append(SoakedProcess(name, rss, last_rss, descriptors, last_descriptors))
    return Soak(settings.soak_s, count, failed, rows)


def _usage(process: psutil.Process) -> tuple[int, int]:
    """Resident bytes and open descriptors, when nothing runs."""
    time.sleep(5)
    return process.memory_info().rss, process.num_fds()


MEASUREMENTS: dict[str, tuple[Callable[[Settings], Any], Callable[[Any], list[Verdict]]]] = {
    "survival": (measure_survival, judge_survival),
    "throughput": (measure_throughput, judge_throughput),
    "latency": (measure_latency, judge_latency),
    "soak": (measure_soak, judge_soak),
}


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@click.command(context_settings={"show_default": True})
@click.option("--model", "model_dir", default=str(ROOT / "examples" / "tiny_moe" / "model"))
@click.option("--survival-ranks", default=4, help="Ranks of the group that is under fire.")
@click.option("--requests", default=2000, help="Requests under fire.")
@click.option("--concurrency", default=64, help="Requests at a time, under fire.")
@click.option("--kill-every-s", default=5.0)
@click.option("--num-tokens", default=24, help="Tokens per answer.")
@click.option("--rounds", default=31, help="Measured rounds of throughput, after one to warm up.")
@click.option("--requests-per-round", default=200)
@click.option("--latency-requests", default=500)
@click.option("--soak-s", default=600.0)
@click.option(
    "--only", multiple=True, type=click.Choice(list(MEASUREMENTS)), help="Repeatable. Default: all."
)
@click.option("--output", type=click.Path(path_type=Path), help="Write the figures as JSON.")
def main(only: tuple[str, ...], output: Path | None, **values: Any) -> None:
    """Measure dwdp serve against its limits."""
    settings = Settings(**values)
    console = Console(width=None if sys.stdout.isatty() else 180)
    measured: dict[str, Any] = {}
    verdicts: list[Verdict] = []
    for name in only or MEASUREMENTS:
        measure, judge = MEASUREMENTS[name]
        measured[name] = measure(settings)
        verdicts += (new := judge(measured[name]))
        for verdict in new:
            console.print(str(verdict), soft_wrap=True, highlight=False, markup=False)
    if output is not None:
        figures = {
            "settings": {**asdict(settings), "model_dir": Path(settings.model_dir).name},
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            **{name: asdict(result) for name, result in measured.items()},
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(0 if all(verdict.is_kept for verdict in verdicts) else 1)


if __name__ == "__main__":
    main()
