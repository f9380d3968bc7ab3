"""Discrete events of a DWDP group: ranks that compute, lanes that copy, links that are shared.

Every rank goes through its layers alone. A layer's window runs first; then its experts wait until
the layer's fetch is there; when they are done the slot is free for a later fetch. Fetches follow each
other in order, as early as their slot allows (``FetchPolicy.wrap_around``: across the end of a forward).

* The pieces of a fetch share the links with those of all ranks (``dwdp/perf/transfers.py``).
* Each copy command takes ``copy_setup_s`` during which its lane moves nothing. With several lanes these
  gaps fall together, so a piece with rate r on the link progresses at
  ``1 / (1 / r + setup / (slice * depth))``.
* While a rank's fetch runs, its compute takes ``copy_slowdown`` times as long: power and memory traffic.

Nothing else couples ranks. Time is exact between events. Noise per rank and layer is drawn from a seeded
generator, so equal arguments give equal results.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from dwdp.perf.fetches import ALL_AT_ONCE, Chunk, FetchPolicy, order_chunks, source_bytes
from dwdp.perf.hardware import Hardware
from dwdp.perf.transfers import BundledTransfers, FairTransfers, Transfers
from dwdp.perf.work import PARTS, Part, RankWork
from dwdp.placement import Placement

EXACT_RANKS = 16
"""Up to this group size every piece is followed by itself, whatever the policy."""


@dataclass(frozen=True)
class Interconnect:
    """What copies run over.

    Attributes:
        link_bytes_per_s: what a rank can send, and what it can receive, at the same time.
        host_bytes_per_s: from the host's memory to a rank.
        copy_setup_s: per copy command.
        copy_slowdown: how many times longer compute takes beside a copy.
    """

    link_bytes_per_s: float
    host_bytes_per_s: float = 0.0
    copy_setup_s: float = 0.0
    copy_slowdown: float = 1.0

    @classmethod
    def of(cls, hardware: Hardware) -> Interconnect:
        """As a hardware description has it."""
        return cls(
            hardware.link.gbs * 1e9 * hardware.achieved.link,
            hardware.host_gbs * 1e9,
            hardware.link.copy_setup_s,
            hardware.achieved.copy_slowdown,
        )


@dataclass(frozen=True)
class Forward:
    """One forward of one rank, as it went.

    Attributes:
        start_s, end_s: when.
        parts: seconds per part; ``wait`` is the exposed wait for fetches.
        fetch_s: the mean time of its fetches, from their start to their last byte.
    """

    start_s: float
    end_s: float
    parts: dict[Part, float]
    fetch_s: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s


@dataclass(frozen=True)
class Span:
    """Something that one rank did from ``start_s`` to ``end_s``, for lane pictures."""

    rank: int
    lane: str
    label: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class GroupRun:
    """What a simulation gives: ``forwards[rank][iteration]``, and spans where they were asked for."""

    forwards: tuple[tuple[Forward, ...], ...]
    spans: tuple[Span, ...] = ()

    def mean_s(self, skip: int = 0) -> float:
        """Mean time of a forward over ranks and iterations, without the first ``skip``."""
        times = [forward.seconds for rank in self.forwards for forward in rank[skip:]]
        return sum(times) / len(times)

    def mean_part_s(self, part: Part, skip: int = 0) -> float:
        """Mean time of one part per forward."""
        times = [forward.parts[part] for rank in self.forwards for forward in rank[skip:]]
        return sum(times) / len(times)

    def mean_fetch_s(self, skip: int = 0) -> float:
        """Mean time of one fetch."""
        times = [forward.fetch_s for rank in self.forwards for forward in rank[skip:]]
        return sum(times) / len(times)


def simulate_group(
    work: Sequence[Sequence[RankWork]],
    placement: Placement,
    expert_bytes: float,
    interconnect: Interconnect,
    policy: FetchPolicy = ALL_AT_ONCE,
    num_slots: int = 2,
    noise_cv: float = 0.0,
    seed: int = 0,
    with_spans: bool = False,
) -> GroupRun:
    """Run ``work[rank][iteration]`` on the ranks of one group.

    Args:
        work: what every rank computes, iteration by iteration; all ranks and iterations have the same
            layers with experts.
        placement: who stores what, the same for every layer.
        expert_bytes: of one expert.
        interconnect: see there.
        policy: how fetches are made.
        num_slots: staging slots.
        noise_cv: standard deviation of a factor around 1 on each rank's time per layer.
        seed: of that noise.
        with_spans: also return what every lane did when.

    Raises:
        ValueError: fewer than two slots, or ``work`` does not fit ``placement``.
    """
    if num_slots < 2:
        raise ValueError(f"num_slots is {num_slots}: use at least 2.")
    if len(work) != placement.num_ranks:
        raise ValueError(f"work of {len(work)} ranks for a group of {placement.num_ranks}.")
    return _Simulation(
        work, placement, expert_bytes, interconnect, policy, num_slots, noise_cv, seed, with_spans
    ).run()


@dataclass
class _Rank:
    """The state of one rank."""

    index: int
    iterations: Sequence[RankWork]
    chunks: Sequence[Chunk]
    random_numbers: random.Random
    iteration: int = 0
    layer: int = 0
    segments: deque[tuple[Part, float]] = field(default_factory=deque)
    in_experts: bool = False
    waiting_since_s: float | None = None
    updated_s: float = 0.0
    version: int = 0
    noise: float = 1.0
    started_s: float = 0.0
    parts: dict[Part, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    forwards: list[Forward] = field(default_factory=list)
    # Fetches are counted over all iterations: fetch f is for the f-th MoE layer that is executed.
    experts_done: int = 0
    experts_wanted: int = 0
    fetches_done: int = 0
    fetch_started_s: float | None = None
    fetch_s: list[float] = field(default_factory=list)


class _Simulation:
    def __init__(
        self,
        work: Sequence[Sequence[RankWork]],
        placement: Placement,
        expert_bytes: float,
        interconnect: Interconnect,
        policy: FetchPolicy,
        num_slots: int,
        noise_cv: float,
        seed: int,
        with_spans: bool,
    ) -> None:
        self.policy, self.num_slots, self.noise_cv = policy, num_slots, noise_cv
        self.interconnect = interconnect
        self.num_ranks = placement.num_ranks
        self.ranks = [
            _Rank(
                rank,
                iterations,
                order_chunks(
                    rank,
                    self.num_ranks,
                    source_bytes(placement, rank, expert_bytes),
                    policy,
                ),
                random.Random(seed * 1_000_003 + rank),
            )
            for rank, iterations in enumerate(work)
        ]
        self.moe_per_forward = sum(layer.experts_s is not None for layer in work[0][0].layers)
        self.queue: list[tuple[float, int, str, int, int]] = []
        self.counter = 0
        self.now = 0.0
        self.spans: list[Span] | None = [] if with_spans else None
        self.transfers = self._build_transfers(policy, interconnect)

    def _build_transfers(self, policy: FetchPolicy, interconnect: Interconnect) -> Transfers:
        capacity = {
            "out": interconnect.link_bytes_per_s,
            "in": interconnect.link_bytes_per_s,
            "host": interconnect.host_bytes_per_s or interconnect.link_bytes_per_s,
        }
        setup_s_per_byte = interconnect.copy_setup_s / (policy.slice_bytes * policy.lane_depth)

        def schedule(time_s: float, key: int, version: int) -> None:
            self._push(time_s, "copy", key, version)

        all_at_once = policy.num_lanes is None and policy.chunks_per_source == 1
        if all_at_once and not policy.host_share and self.num_ranks > EXACT_RANKS:
            return BundledTransfers(self.num_ranks, capacity, setup_s_per_byte, schedule)
        return FairTransfers(self.num_ranks, policy, capacity, setup_s_per_byte, schedule)

    def run(self) -> GroupRun:
        for rank in self.ranks:
            self._begin_forward(rank)
        while self.queue:
            time_s, _, kind, key, version = heapq.heappop(self.queue)
            self.now = time_s
            if kind == "compute":
                if self.ranks[key].version == version:
                    self._finish_compute(self.ranks[key])
            else:
                self._finish_copies(key, version)
        return GroupRun(tuple(tuple(rank.forwards) for rank in self.ranks), tuple(self.spans or ()))

    # Compute

    def _begin_forward(self, rank: _Rank) -> None:
        rank.started_s = self.now
        rank.layer = 0
        rank.parts = dict.fromkeys(PARTS, 0.0)
        rank.fetch_s = []
        overhead_s = rank.iterations[rank.iteration].overhead_s
        self._begin_layer(rank, overhead_s)
        self._start_fetch(rank)

    def _begin_layer(self, rank: _Rank, overhead_s: float = 0.0) -> None:
        layer = rank.iterations[rank.iteration].layers[rank.layer]
        if self.noise_cv:
            rank.noise = max(0.0, rank.random_numbers.gauss(1.0, self.noise_cv))
        rank.segments = deque((part, s * rank.noise) for part, s in layer.window)
        if overhead_s:
            rank.segments.appendleft(("other", overhead_s))
        rank.in_experts = False
        self._schedule_compute(rank)

    def _schedule_compute(self, rank: _Rank) -> None:
        rank.version += 1
        rank.updated_s = self.now
        left_s = sum(seconds for _, seconds in rank.segments) * self._slowdown(rank)
        self._push(self.now + left_s, "compute", rank.index, rank.version)

    def _slowdown(self, rank: _Rank) -> float:
        return self.interconnect.copy_slowdown if rank.fetch_started_s is not None else 1.0

    def _advance_compute(self, rank: _Rank) -> None:
        """Book the time since the last update to the segments that ran in it."""
        if rank.waiting_since_s is not None:
            return
        elapsed, slowdown = self.now - rank.updated_s, self._slowdown(rank)
        rank.updated_s = self.now
        while rank.segments and elapsed > 0:
            part, seconds = rank.segments[0]
            needed = seconds * slowdown
            if needed > elapsed:
                rank.segments[0] = (part, seconds - elapsed / slowdown)
                rank.parts[part] += elapsed
                return
            rank.parts[part] += needed
            elapsed -= needed
            rank.segments.popleft()

    def _finish_compute(self, rank: _Rank) -> None:
        self._advance_compute(rank)
        rank.segments.clear()
        work = rank.iterations[rank.iteration]
        layer = work.layers[rank.layer]
        if layer.experts_s is not None and not rank.in_experts:
            rank.experts_wanted = rank.experts_done + 1
            if rank.chunks and rank.fetches_done < rank.experts_wanted:
                rank.waiting_since_s = self.now
            else:
                self._begin_experts(rank)
            return
        if rank.in_experts:
            rank.experts_done += 1
            self._start_fetch(rank)
        rank.layer += 1
        if rank.layer < len(work.layers):
            self._begin_layer(rank)
            return
        fetch_s = sum(rank.fetch_s) / len(rank.fetch_s) if rank.fetch_s else 0.0
        rank.forwards.append(Forward(rank.started_s, self.now, rank.parts, fetch_s))
        rank.iteration += 1
        if rank.iteration < len(rank.iterations):
            self._begin_forward(rank)

    def _begin_experts(self, rank: _Rank) -> None:
        if rank.waiting_since_s is not None:
            rank.parts["wait"] += self.now - rank.waiting_since_s
            self._span(rank.index, "compute", "wait", rank.waiting_since_s)
            rank.waiting_since_s = None
        experts_s = rank.iterations[rank.iteration].layers[rank.layer].experts_s
        assert experts_s is not None
        rank.in_experts = True
        rank.segments = deque([("grouped_gemm", experts_s * rank.noise)])
        self._schedule_compute(rank)

    # Copies

    def _start_fetch(self, rank: _Rank) -> None:
        """Start the next fetch if none runs, its slot is free, and it may start yet."""
        fetch = rank.fetches_done
        if not rank.chunks or rank.fetch_started_s is not None:
            return
        if fetch >= len(rank.iterations) * self.moe_per_forward:
            return
        if fetch >= rank.experts_done + self.num_slots:
            return
        if not self.policy.wrap_around and fetch >= (rank.iteration + 1) * self.moe_per_forward:
            return
        self._advance_compute(rank)
        rank.fetch_started_s = self.now
        if rank.segments:
            self._schedule_compute(rank)
        self.transfers.start(self.now, rank.index, rank.chunks)

    def _finish_copies(self, key: int, version: int) -> None:
        finished = self.transfers.on_event(self.now, key, version)
        for piece in finished:
            self._span(piece.reader, piece.label, piece.label, piece.started_s)
        for reader in dict.fromkeys(piece.reader for piece in finished):
            if not self.transfers.is_fetching(reader):
                self._finish_fetch(self.ranks[reader])

    def _finish_fetch(self, rank: _Rank) -> None:
        self._advance_compute(rank)
        assert rank.fetch_started_s is not None
        rank.fetch_s.append(self.now - rank.fetch_started_s)
        rank.fetch_started_s = None
        rank.fetches_done += 1
        if rank.segments:
            self._schedule_compute(rank)
        if rank.waiting_since_s is not None and rank.fetches_done >= rank.experts_wanted:
            self._begin_experts(rank)
        self._start_fetch(rank)

    def _span(self, rank: int, lane: str, label: str, start_s: float) -> None:
        if self.spans is not None and self.now > start_s:
            self.spans.append(Span(rank, lane, label, start_s, self.now))

    def _push(self, time_s: float, kind: str, key: int, version: int) -> None:
        self.counter += 1
        heapq.heappush(self.queue, (time_s, self.counter, kind, key, version))
