"""What ``/metrics`` says, in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from dwdp.serving.router.balancer import Balancer
from dwdp.serving.supervisor.ranks import Rank, RankState, RankTable

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

# Name of the metric, where it is in a rank's statistics, what it is.
_RANK_COUNTERS = (
    ("dwdp_rank_prompt_tokens", ("tokens", "prompt"), "Prompt tokens that the process has taken."),
    ("dwdp_rank_generated_tokens", ("tokens", "generated"), "Tokens that the process generated."),
    ("dwdp_rank_fetched_bytes", ("runtime", "fetched_bytes"), "Expert bytes copied from peers."),
    (
        "dwdp_rank_exposed_wait_seconds",
        ("runtime", "exposed_wait_s"),
        "Time that compute stood still because a fetch had not finished.",
    ),
)
_RANK_GAUGES = (
    ("dwdp_rank_running_sequences", ("requests", "running"), "Sequences being generated."),
    ("dwdp_rank_waiting_sequences", ("requests", "waiting"), "Sequences that wait in the rank."),
    ("dwdp_rank_rss_bytes", ("memory", "rss_bytes"), "Resident memory of the process."),
    (
        "dwdp_rank_resident_expert_bytes",
        ("runtime", "resident_expert_bytes"),
        "Expert memory that the rank stores.",
    ),
    ("dwdp_rank_staging_bytes", ("runtime", "staging_bytes"), "Staging slots of the rank."),
)


class RouterMetrics:
    """Counts what the router does. One per router: nothing is global."""

    def __init__(self, table: RankTable, balancer: Balancer) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "dwdp_requests",
            "Requests answered; status 499: the client left before.",
            ["endpoint", "status"],
            registry=self._registry,
        )
        self.retries = Counter(
            "dwdp_retries",
            "Requests given to another rank because the first one died or refused.",
            registry=self._registry,
        )
        self.cut_streams = Counter(
            "dwdp_cut_streams",
            "Streams that ended with an error event.",
            registry=self._registry,
        )
        self.refused_connections = Counter(
            "dwdp_refused_connections",
            "Connections closed by the router: too many, too slow, headers too long or malformed.",
            ["reason"],
            registry=self._registry,
        )
        self.first_byte_s = Histogram(
            "dwdp_first_byte_seconds",
            "From a request's arrival to the first byte of its answer.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.duration_s = Histogram(
            "dwdp_request_seconds",
            "From a request's arrival to the end of its answer.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_GroupCollector(table, balancer))

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self._registry)


class _GroupCollector:
    """The state of the group and what its ranks report, read when somebody asks."""

    def __init__(self, table: RankTable, balancer: Balancer) -> None:
        self._table = table
        self._balancer = balancer

    def collect(self) -> Iterator[Metric]:
        ranks = self._table.ranks
        yield GaugeMetricFamily(
            "dwdp_queued_requests", "Requests that wait for a rank.", self._balancer.num_queued
        )
        yield GaugeMetricFamily(
            "dwdp_expert_memory_holders",
            "Processes that have the experts' memory; when the last one ends, it is gone.",
            len(self._table.holders()),
        )
        yield GaugeMetricFamily(
            "dwdp_expert_memory_at_risk",
            "1: one more loss takes the experts' memory with it, and every rank has to load again.",
            int(self._table.is_memory_at_risk()),
        )
        yield _gauge(
            "dwdp_rank_ready",
            "1: the rank takes requests.",
            [(rank, int(rank.state is RankState.READY)) for rank in ranks],
        )
        yield _gauge(
            "dwdp_rank_outstanding_tokens",
            "Tokens of requests that the router gave to the rank and that are not finished.",
            [(rank, self._balancer.load_of(rank.rank).outstanding_tokens) for rank in ranks],
        )
        yield _gauge(
            "dwdp_rank_recovery_seconds",
            "From the last loss of the rank to its return.",
            [(rank, rank.recovery_s) for rank in ranks if rank.recovery_s is not None],
        )
        restarts = CounterMetricFamily(
            "dwdp_rank_restarts", "Processes started in place of one that ended.", labels=["rank"]
        )
        for rank in ranks:
            restarts.add_metric([str(rank.rank)], rank.num_restarts)
        yield restarts
        for name, path, text in _RANK_GAUGES:
            yield _gauge(name, text, _reported(ranks, path))
        for name, path, text in _RANK_COUNTERS:
            counter = CounterMetricFamily(name, text, labels=["rank"])
            for rank, value in _reported(ranks, path):
                counter.add_metric([str(rank.rank)], value)
            yield counter


def reported(rank: Rank, path: tuple[str, ...]) -> float | None:
    """The number at ``path`` in what ``rank`` reported last; None where it reports none, or has ended."""
    value: Any = rank.stats if rank.pid is not None else None
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _reported(ranks: tuple[Rank, ...], path: tuple[str, ...]) -> list[tuple[Rank, float]]:
    found = [(rank, reported(rank, path)) for rank in ranks]
    return [(rank, value) for rank, value in found if value is not None]


def _gauge(name: str, text: str, values: list[tuple[Rank, float]]) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(name, text, labels=["rank"])
    for rank, value in values:
        gauge.add_metric([str(rank.rank)], value)
    return gauge
