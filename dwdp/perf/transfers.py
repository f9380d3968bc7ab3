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


@dataclass
class _Bundle:
    """The pieces of one reader's fetch that are still under way, by size."""

    sources_by_bytes: list[tuple[float, list[int]]]  # largest first
    bytes_done: float
    started_s: float
    updated_s: float
    load: np.ndarray
    rate: float = 0.0
    version: int = 0


class BundledTransfers:
    """All sources at once; the pieces of a fetch progress alike.

    Each reader shares its own port evenly among its pieces. Where a source is asked for more than its
    port carries, all pieces of the readers that use it slow down by as much. As long as no source is
    overloaded that is max-min fair; where one is, it is an approximation (a few percent).
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
        self._load = np.zeros(num_ranks)
        self._contended = False

    def is_fetching(self, reader: int) -> bool:
        return reader in self._bundles

    def start(self, now_s: float, reader: int, chunks: Sequence[Chunk]) -> None:
        by_bytes: dict[float, list[int]] = {}
        for chunk in chunks:
            by_bytes.setdefault(chunk.num_bytes, []).append(chunk.source)
        bundle = _Bundle(
            sorted(by_bytes.items(), reverse=True), 0.0, now_s, now_s, np.zeros(len(self._load))
        )
        self._bundles[reader] = bundle
        self._set_load(bundle)
        self._share_links(now_s, reader)

    def on_event(self, now_s: float, key: int, version: int) -> list[Finished]:
        bundle = self._bundles.get(key)
        if bundle is None or bundle.version != version:
            return []
        num_bytes, sources = bundle.sources_by_bytes.pop()
        bundle.bytes_done, bundle.updated_s = num_bytes, now_s
        self._set_load(bundle)
        if not bundle.sources_by_bytes:
            del self._bundles[key]
        self._share_links(now_s, key)
        label = _label(sources[0]) if len(sources) == 1 else f"from {len(sources)} peers"
        return [Finished(key, label, bundle.started_s)]

    def _set_load(self, bundle: _Bundle) -> None:
        """What the bundle asks of each source, as a share of a port."""
        self._load -= bundle.load
        bundle.load = np.zeros(len(self._load))
        sources = [source for _, group in bundle.sources_by_bytes for source in group]
        if sources:
            bundle.load[sources] = 1 / len(sources)
        self._load += bundle.load

    def _share_links(self, now_s: float, reader: int) -> None:
        was_contended, self._contended = self._contended, float(self._load.max()) > 1 + 1e-9
        if not (was_contended or self._contended):
            if reader in self._bundles:
                self._set_rate(now_s, reader)
            return
        for other in self._bundles:
            self._set_rate(now_s, other)

    def _set_rate(self, now_s: float, reader: int) -> None:
        bundle = self._bundles[reader]
        share = float(bundle.load.max())  # of the reader's port, one piece
        worst = max(1.0, float(self._load[bundle.load > 0].max())) if self._contended else 1.0
        rate = 1 / (worst / (share * self._capacity) + self._setup_s_per_byte)
        bundle.bytes_done += bundle.rate * (now_s - bundle.updated_s)
        bundle.rate, bundle.updated_s = rate, now_s
        bundle.version += 1
        left = max(0.0, bundle.sources_by_bytes[-1][0] - bundle.bytes_done)
        self._schedule(now_s + left / rate, reader, bundle.version)


def _label(source: int) -> str:
    return "host" if source == HOST else f"from {source}"
