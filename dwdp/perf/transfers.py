"""Pieces of fetches on their way: which run at once, and how fast each is.

:class:`FairTransfers` follows every piece and shares the links max-min fair. :class:`BundledTransfers` is
for large groups that read all sources at once; it keeps the equal pieces of one fetch together.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from dwdp.perf.fetches import HOST, Chunk, FetchPolicy
from dwdp.perf.links import Port, max_min_rates

Schedule = Callable[[float, int, int], None]
"""Takes the time of an event, the key and the version of what ends then."""

_SHARE_LINKS, _ARRIVAL = 0, 1
"""Keys of :class:`BundledTransfers`' events."""


class Finished(NamedTuple):
    """A piece (or several equal ones) that arrived."""

    reader: int
    label: str
    started_s: float


class Transfers(Protocol):
    """What the simulation of a group needs to know of copies."""

    def start(self, now_s: float, reader: int, chunks: Sequence[Chunk]) -> None:
        """Start a fetch of ``reader``, which has none under way."""

    def on_event(self, now_s: float, key: int, version: int) -> list[Finished]:
        """Handle a scheduled event: what arrived, nothing if the event is outdated."""

    def is_fetching(self, reader: int) -> bool:
        """Whether pieces of the reader's fetch are still missing."""


@dataclass
class _Copy:
    reader: int
    source: int
    bytes_left: float
    ports: tuple[Port, ...]
    started_s: float
    updated_s: float
    rate: float = 0.0
    version: int = 0


class FairTransfers:
    """Every piece by itself, rates max-min fair.

    Args:
        num_ranks: of the group.
        policy: how many pieces of a reader run at once, at most one per source.
        capacity: bytes/s of the kinds of port ``out``, ``in`` and ``host``.
        setup_s_per_byte: time in which a lane moves nothing, per byte.
        schedule: where events are announced.
    """

    def __init__(
        self,
        num_ranks: int,
        policy: FetchPolicy,
        capacity: dict[str, float],
        setup_s_per_byte: float,
        schedule: Schedule,
    ) -> None:
        self._num_ranks = num_ranks
        self._num_lanes = policy.num_lanes or num_ranks
        self._capacity = capacity
        self._setup_s_per_byte = setup_s_per_byte
        self._schedule = schedule
        self._copies: dict[int, _Copy] = {}
        self._next_key = 0
        self._contended = False
        self._pending: list[deque[Chunk]] = [deque() for _ in range(num_ranks)]
        self._busy_sources: list[set[int]] = [set() for _ in range(num_ranks)]

    def start(self, now_s: float, reader: int, chunks: Sequence[Chunk]) -> None:
        self._pending[reader].extend(chunks)
        self._fill_lanes(now_s, reader)
        self._share_links(now_s, reader)

    def is_fetching(self, reader: int) -> bool:
        return bool(self._busy_sources[reader])

    def on_event(self, now_s: float, key: int, version: int) -> list[Finished]:
        ended = self._copies.get(key)
        if ended is None or ended.version != version:
            return []
        finished = []
        for other, copy in list(self._copies.items()):
            if copy.reader != ended.reader:
                continue
            left_s = copy.bytes_left / copy.rate - (now_s - copy.updated_s)
            # Equal pieces end together: one event for all spares sharing the links again for each.
            if other == key or left_s <= 1e-12:
                del self._copies[other]
                self._busy_sources[copy.reader].discard(copy.source)
                finished.append(Finished(copy.reader, _label(copy.source), copy.started_s))
        self._fill_lanes(now_s, ended.reader)
        self._share_links(now_s, ended.reader)
        return finished

    def _fill_lanes(self, now_s: float, reader: int) -> None:
        """Start pieces in order, as lanes are free."""
        busy, pending = self._busy_sources[reader], self._pending[reader]
        held_back: list[Chunk] = []
        while pending:
            chunk = pending.popleft()
            is_host = chunk.source == HOST
            if chunk.source in busy or (not is_host and len(busy - {HOST}) >= self._num_lanes):
                held_back.append(chunk)
                continue
            busy.add(chunk.source)
            ports: tuple[Port, ...] = (("out", chunk.source), ("in", reader))
            if is_host:
                ports = (("host", reader),)
            self._copies[self._next_key] = _Copy(
                reader, chunk.source, chunk.num_bytes, ports, now_s, now_s
            )
            self._next_key += 1
        pending.extend(held_back)

    def _share_links(self, now_s: float, reader: int) -> None:
        """Give every copy its rate, after those of ``reader`` changed.

        Where each reader's pieces, evenly shared at its own port, fill no source's port, that is the
        max-min rate, and other readers' rates do not change.
        """
        lanes = Counter(copy.reader for copy in self._copies.values() if copy.source != HOST)
        load = [0.0] * self._num_ranks
        for copy in self._copies.values():
            if copy.source != HOST:
                load[copy.source] += 1 / lanes[copy.reader]
        was_contended, self._contended = self._contended, max(load) > 1 + 1e-9
        if self._contended:
            flows = {key: copy.ports for key, copy in self._copies.items()}
            for key, rate in max_min_rates(flows, self._capacity).items():
                self._set_rate(now_s, key, rate)
            return
        for key, copy in self._copies.items():
            if was_contended or copy.reader == reader:
                if copy.source == HOST:
                    self._set_rate(now_s, key, self._capacity["host"])
                else:
                    self._set_rate(now_s, key, self._capacity["in"] / lanes[copy.reader])

    def _set_rate(self, now_s: float, key: int, link_rate: float) -> None:
        copy = self._copies[key]
        rate = 1 / (1 / link_rate + self._setup_s_per_byte)
        if copy.rate:
            if abs(rate - copy.rate) <= 1e-12 * rate:
                return
            copy.bytes_left = max(0.0, copy.bytes_left - copy.rate * (now_s - copy.updated_s))
        copy.rate, copy.updated_s = rate, now_s
        copy.version += 1
        self._schedule(now_s + copy.bytes_left / rate, key, copy.version)


class _Stage(NamedTuple):
    """A fetch from the arrival of its pieces of one size to that of the next larger ones.

    Attributes:
        num_bytes: of each piece in this stage.
        sources: 1 for every source that is still read, else 0.
        share: of the reader's port that each piece gets.
        label: of the pieces that arrive at its end.
    """

    num_bytes: float
    sources: np.ndarray
    share: float
    label: str


def _stages(chunks: Sequence[Chunk], num_ranks: int) -> tuple[_Stage, ...]:
    by_bytes: dict[float, list[int]] = {}
    for chunk in chunks:
        by_bytes.setdefault(chunk.num_bytes, []).append(chunk.source)
    stages, before = [], 0.0
    sources = np.zeros(num_ranks)
    sources[[chunk.source for chunk in chunks]] = 1.0
    for num_bytes, arriving in sorted(by_bytes.items()):
        label = _label(arriving[0]) if len(arriving) == 1 else f"from {len(arriving)} peers"
        stages.append(_Stage(num_bytes - before, sources.copy(), 1 / float(sources.sum()), label))
        sources[arriving] = 0.0
        before = num_bytes
    return tuple(stages)


@dataclass
class _Bundle:
    """A fetch that is under way."""

    stages: tuple[_Stage, ...]
    started_s: float
    stage: int = 0


class BundledTransfers:
    """All sources at once; the pieces of a fetch progress alike.

    Each reader shares its own port evenly among its pieces. Where a source is asked for more than its
    port carries, all pieces of the readers that use it slow down by as much. As long as no source is
    overloaded that is max-min fair; where one is, it is an approximation (a few percent).

    Only the next arrival is announced, for all readers together, and links are shared once after all
    that happens at one time: ranks that run in step cost no more than one.
    """

    def __init__(
        self,
        num_ranks: int,
        capacity: dict[str, float],
        setup_s_per_byte: float,
        schedule: Schedule,
    ) -> None:
        self._capacity = capacity["in"]
        self._setup_s_per_byte = setup_s_per_byte
        self._schedule = schedule
        self._bundles: dict[int, _Bundle] = {}
        self._stages: dict[int, tuple[Sequence[Chunk], tuple[_Stage, ...]]] = {}
        self._version = 0
        self._updated_s = 0.0
        # Per reader: one piece's share of its port, bytes of it that are left, its rate.
        self._share = np.zeros(num_ranks)
        self._bytes_left = np.full(num_ranks, np.inf)
        self._rate = np.zeros(num_ranks)
        self._reads = np.zeros((num_ranks, num_ranks))  # [reader, source]: 1 or 0

    def is_fetching(self, reader: int) -> bool:
        return reader in self._bundles

    def start(self, now_s: float, reader: int, chunks: Sequence[Chunk]) -> None:
        known = self._stages.get(reader)
        if known is None or known[0] is not chunks:  # fetches of a reader are alike
            known = self._stages[reader] = (chunks, _stages(chunks, len(self._share)))
        self._advance(now_s)
        self._bundles[reader] = _Bundle(known[1], now_s)
        self._begin(reader, known[1][0])
        self._announce(now_s, _SHARE_LINKS)

    def on_event(self, now_s: float, key: int, version: int) -> list[Finished]:
        if version != self._version:
            return []
        if key == _SHARE_LINKS:
            self._share_links(now_s)
            return []
        self._advance(now_s)
        # What is within rounding of its end has arrived: equal pieces end together.
        rounding_s = 1e-12 * max(1.0, now_s)
        arrived = np.flatnonzero(self._bytes_left <= self._rate * rounding_s)
        finished = [self._end_stage(reader) for reader in arrived.tolist()]
        self._announce(now_s, _SHARE_LINKS)
        return finished

    def _end_stage(self, reader: int) -> Finished:
        bundle = self._bundles[reader]
        label = bundle.stages[bundle.stage].label
        bundle.stage += 1
        if bundle.stage < len(bundle.stages):
            self._begin(reader, bundle.stages[bundle.stage])
        else:
            del self._bundles[reader]
            self._bytes_left[reader], self._share[reader] = np.inf, 0.0
            self._rate[reader] = 0.0
            self._reads[reader] = 0.0
        return Finished(reader, label, bundle.started_s)

    def _begin(self, reader: int, stage: _Stage) -> None:
        self._bytes_left[reader], self._share[reader] = stage.num_bytes, stage.share
        self._rate[reader] = 0.0  # until links are shared
        self._reads[reader] = stage.sources

    def _advance(self, now_s: float) -> None:
        """Book what was copied since the last time."""
        self._bytes_left -= self._rate * (now_s - self._updated_s)
        self._updated_s = now_s

    def _share_links(self, now_s: float) -> None:
        """Give every piece its rate, and announce the next arrival."""
        self._advance(now_s)
        link_rate = self._share * self._capacity
        load = self._share @ self._reads  # of every source, as a share of its port
        if load.max() > 1 + 1e-9:
            link_rate /= np.maximum(1.0, (self._reads * load).max(axis=1))
        self._rate = link_rate / (1 + link_rate * self._setup_s_per_byte)
        if self._bundles:
            left_s = float((self._bytes_left / self._rate).min())  # infinite for who reads nothing
            self._announce(now_s + max(0.0, left_s), _ARRIVAL)

    def _announce(self, time_s: float, key: int) -> None:
        """The next event; whatever was announced before is outdated."""
        self._version += 1
        self._schedule(time_s, key, self._version)


def _label(source: int) -> str:
    return "host" if source == HOST else f"from {source}"
