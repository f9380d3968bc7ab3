"""What is measured of ``dwdp serve``, and whether it keeps its limits."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

MIN_THROUGHPUT_RATIO = 0.95
MAX_ADDED_S = 0.002
MAX_GROWTH = 0.02


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
    errors_of_lost: list[str]


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


@dataclass(frozen=True)
class Verdict:
    """One line of the report."""

    what: str
    figures: str
    is_kept: bool

    def __str__(self) -> str:
        return f"{'ok  ' if self.is_kept else 'FAIL'} {self.what}: {self.figures}"


def judge_survival(survival: Survival) -> list[Verdict]:
    recoveries = survival.recoveries_s
    back = "no rank was back before the end"
    if recoveries:
        median_s, longest_s = statistics.median(recoveries), max(recoveries)
        back = f"a rank is back after {median_s:.1f} s (at most {longest_s:.1f})"
    what = (
        f"survival, {survival.requests} requests, {survival.kills} kills, {survival.wall_s:.0f} s"
    )
    figures = (
        f"{survival.lost} lost without a token, {survival.cut_streams} streams cut with an error, "
        f"{survival.wrong} of {survival.completed} answers differ; {back}"
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
