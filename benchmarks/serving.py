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
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import psutil
import torch
from rich.console import Console
from serving_load import Answer, Target, ask, ask_all
from transformers import AutoModelForCausalLM, AutoTokenizer

from dwdp.config import DwdpConfig
from dwdp.serving.generation import quiet_transformers
from dwdp.serving.rank_server.options import RankOptions
from dwdp.serving.supervisor.transformers_ranks import TransformersRanks

ROOT = Path(__file__).parents[1]
DTYPE = "float32"
MODEL = "model"
START_S = 300.0
MIN_THROUGHPUT_RATIO = 0.95
MAX_ADDED_S = 0.002
MAX_GROWTH = 0.02
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


@dataclass(frozen=True)
class Survival:
    """``recoveries_s``: from each loss that was made good to the rank being ready again."""

    requests: int
    kills: int
    lost: int
    cut_streams: int
    completed: int
    wrong: int
    wall_s: float
    recoveries_s: list[float]


@dataclass(frozen=True)
class Throughput:
    """Generated tokens per second, by round."""

    router: list[float]
    direct: list[float]

    @property
    def ratios(self) -> list[float]:
        return [router / direct for router, direct in zip(self.router, self.direct, strict=True)]


@dataclass(frozen=True)
class Latency:
    """Medians in seconds of the same requests, one at a time."""

    router_s: float
    direct_s: float

    @property
    def added_s(self) -> float:
        return self.router_s - self.direct_s


@dataclass(frozen=True)
class SoakedProcess:
    """A process when the soak had settled, and at its end."""

    name: str
    settled_rss_bytes: int
    final_rss_bytes: int
    settled_descriptors: int
    final_descriptors: int

    @property
    def growth(self) -> float:
        return self.final_rss_bytes / self.settled_rss_bytes - 1


@dataclass(frozen=True)
class Soak:
    seconds: float
    requests: int
    failed: int
    processes: list[SoakedProcess]


class Served:
    """A running ``dwdp serve``."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

    @property
    def target(self) -> Target:
        return Target(self.url, MODEL)

    def rank_pids(self) -> dict[int, int]:
        """Processes of the ranks that are ready."""
        from urllib.request import urlopen

        with urlopen(f"{self.url}/page/events", timeout=30) as events:
            document = json.loads(events.readline().removeprefix(b"data: "))
        return {rank["rank"]: rank["pid"] for rank in document["ranks"] if rank["state"] == "ready"}

    def recoveries_s(self) -> dict[str, float]:
        from urllib.request import urlopen

        with urlopen(f"{self.url}/metrics", timeout=30) as response:
            text = response.read().decode()
        found = re.findall(
            r'^dwdp_rank_recovery_seconds\{rank="(\d+)"\} (\S+)$', text, re.MULTILINE
        )
        return {rank: float(value) for rank, value in found}


@contextmanager
def dwdp_serve(settings: Settings, num_ranks: int) -> Iterator[Served]:
    """``dwdp serve`` on a free port, one compute thread per rank."""
    command = [sys.executable, "-m", "dwdp", "serve", settings.model_dir, "--port", "0"]
    options = ["--dwdp-size", str(num_ranks), "--dtype", DTYPE, "--threads-per-rank", "1"]
    process = subprocess.Popen(
        [*command, *options, "--served-model-name", MODEL],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        found = re.search(r"ready at (\S+)", process.stdout.readline())
        if found is None:
            raise RuntimeError("dwdp serve did not start; run it by hand to see why")
        yield Served(process, found.group(1))
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def independent_server(settings: Settings) -> Iterator[Target]:
    """One server with the whole model and no router in front."""
    launcher = TransformersRanks(
        Path(settings.model_dir), MODEL, DwdpConfig(), RankOptions(), dtype=DTYPE, num_threads=1
    )
    launcher.new_group()
    start = launcher.start(0, 0)
    process = subprocess.Popen(
        start.arguments, env=start.environment, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdin is not None and start.endpoint.socket is not None
        process.stdin.write(start.stdin)
        process.stdin.close()
        target = Target(
            "http://rank", MODEL, socket=start.endpoint.socket, headers=start.endpoint.headers
        )
        asyncio.run(_until_ready(target, process))
        yield target
    finally:
        process.terminate()
        process.wait(60)


async def _until_ready(target: Target, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    async with target.session() as session:
        while time.monotonic() < deadline and process.poll() is None:
            try:
                async with session.get("/health/ready") as response:
                    if response.status == 200:
                        return
            except OSError:
                await asyncio.sleep(0.1)
    raise RuntimeError("an independent server did not start")


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
    with dwdp_serve(settings, settings.survival_ranks) as served:
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
        served = stack.enter_context(dwdp_serve(settings, 2))
        servers = [stack.enter_context(independent_server(settings)) for _ in range(2)]
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
    with dwdp_serve(settings, 1) as served, independent_server(settings) as server:
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
    with dwdp_serve(settings, 2) as served:
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


@dataclass(frozen=True)
class Verdict:
    """One line of the report."""

    what: str
    figures: str
    is_kept: bool

    def __str__(self) -> str:
        return f"{'ok  ' if self.is_kept else 'FAIL'} {self.what}: {self.figures}"


def judge_survival(survival: Survival) -> list[Verdict]:
    recoveries = survival.recoveries_s or [float("nan")]
    what = (
        f"survival, {survival.requests} requests, {survival.kills} kills, {survival.wall_s:.0f} s"
    )
    figures = (
        f"{survival.lost} lost without a token, {survival.cut_streams} streams cut with an error, "
        f"{survival.wrong} of {survival.completed} answers differ; a rank is back after "
        f"{statistics.median(recoveries):.1f} s (at most {max(recoveries):.1f})"
    )
    return [Verdict(what, figures, survival.lost == 0 and survival.wrong == 0)]


def judge_throughput(throughput: Throughput) -> list[Verdict]:
    ratio = statistics.median(throughput.ratios)
    figures = (
        f"{statistics.median(throughput.router):.0f} / {statistics.median(throughput.direct):.0f} "
        f"tokens/s, ratio of the same round {ratio:.2f} (limit {MIN_THROUGHPUT_RATIO})"
    )
    what = "throughput, 2 ranks through the router / 2 servers driven directly"
    return [Verdict(what, figures, ratio >= MIN_THROUGHPUT_RATIO)]


def judge_latency(latency: Latency) -> list[Verdict]:
    figures = (
        f"{latency.added_s * 1e3:.2f} ms on {latency.direct_s * 1e3:.2f} ms "
        f"(limit {MAX_ADDED_S * 1e3:.0f} ms)"
    )
    return [Verdict("latency, median added by the router", figures, latency.added_s < MAX_ADDED_S)]


def judge_soak(soak: Soak) -> list[Verdict]:
    return [
        Verdict(
            f"soak, {soak.seconds:.0f} s, {soak.requests} requests, {process.name}",
            f"{process.settled_rss_bytes >> 20} -> {process.final_rss_bytes >> 20} MiB "
            f"({process.growth:+.1%}, limit {MAX_GROWTH:.0%}), descriptors "
            f"{process.settled_descriptors} -> {process.final_descriptors}",
            process.growth <= MAX_GROWTH
            and process.final_descriptors <= process.settled_descriptors
            and soak.failed == 0,
        )
        for process in soak.processes
    ]


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
@click.option("--rounds", default=7, help="Measured rounds of throughput, after one to warm up.")
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
