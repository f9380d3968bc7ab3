"""Who stores which experts, and who is the source of each remote expert.

A placement is arithmetic on three or four small numbers, so every rank computes it alone and all
arrive at the same one. It counts experts; bytes begin in ``dwdp/layout.py``.

With 8 experts on 3 ranks, nothing else given::

    rank 0 stores 0 1 2        and reads 3 4 5 from rank 1, 6 7 from rank 2
    rank 1 stores 3 4 5        and reads 0 1 2 from rank 0, 6 7 from rank 2
    rank 2 stores 6 7          and reads 0 1 2 from rank 0, 3 4 5 from rank 1

Ranks 0 and 1 serve 6 experts each, rank 2 serves 4: with one copy of every expert there is no
choice. ``num_experts_per_worker=4`` makes copies, and with them choices::

    rank 0 stores 0 1 2 3      and reads 4 5 from rank 1, 6 7 from rank 2
    rank 1 stores 2 3 4 5      and reads 0 1 from rank 0, 6 7 from rank 2
    rank 2 stores 5 6 7 and 0  and reads 1 2 from rank 0, 3 4 from rank 1

Now every rank serves 4 experts, and reads 2 from each peer.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, repeat
from typing import NamedTuple

from dwdp.config import MAX_RANKS


class ExpertRange(NamedTuple):
    """Experts ``start <= expert < stop``."""

    start: int
    stop: int


@dataclass(frozen=True)
class Placement:
    """Where every expert of a layer is stored, and where every rank reads it.

    Attributes:
        num_experts: experts of one MoE layer.
        num_ranks: ranks of the group.
        resident: ``resident[rank]`` are the experts that ``rank`` stores, as one range, or as two
            when they wrap around the last expert. Sorted; two ranges never touch.
        sources: ``sources[rank][expert]`` is the rank that ``rank`` reads ``expert`` from: itself
            where the expert is resident, else one of the ranks that store it.
    """

    num_experts: int
    num_ranks: int
    resident: tuple[tuple[ExpertRange, ...], ...]
    sources: tuple[tuple[int, ...], ...]

    def is_resident(self, rank: int, expert: int) -> bool:
        """Whether ``rank`` stores ``expert``."""
        return self.sources[rank][expert] == rank

    def resident_experts(self, rank: int) -> tuple[int, ...]:
        """The experts that ``rank`` stores, ascending."""
        return tuple(e for e, source in enumerate(self.sources[rank]) if source == rank)

    def remote_experts(self, rank: int) -> tuple[int, ...]:
        """The experts that ``rank`` reads from peers, ascending."""
        return tuple(e for e, source in enumerate(self.sources[rank]) if source != rank)

    def num_served(self, rank: int) -> int:
        """How many (peer, expert) pairs have ``rank`` as their source."""
        return self._num_served[rank]

    @cached_property
    def _num_served(self) -> tuple[int, ...]:
        served = Counter(
            source
            for rank, sources in enumerate(self.sources)
            for source in sources
            if source != rank
        )
        return tuple(served[rank] for rank in range(self.num_ranks))


def build_placement(
    num_experts: int,
    num_ranks: int,
    *,
    num_experts_per_worker: int | None = None,
    num_prefetch_experts: int | None = None,
) -> Placement:
    """Place ``num_experts`` (E) on ``num_ranks`` (N) ranks.

    * By default the experts are split evenly in rank order. Where N does not divide E, the first
      ``E % N`` ranks store one more.
    * ``num_experts_per_worker`` (L) alone: rank r stores L experts from ``floor(r * E / N)`` on and
      goes on at expert 0 after the last, so that every expert has about ``N * L / E`` copies.
    * ``num_prefetch_experts`` (P): rank r stores ``[r * P, min(r * P + L, E))``, as TensorRT-LLM
      and SGLang place them. L is P where it is not given.

    The source of each remote expert is one of the ranks that store it, chosen so that the number
    of experts served differs as little as possible between the ranks: by at most one wherever any
    choice achieves that. Within that, each rank spreads its reads over its sources.

    Raises:
        ValueError: no such placement. The text names the value to change.
    """
    _check_counts(num_experts, num_ranks, num_experts_per_worker, num_prefetch_experts)
    if num_prefetch_experts is not None:
        resident = _strided(
            num_experts,
            num_ranks,
            num_prefetch_experts,
            num_prefetch_experts if num_experts_per_worker is None else num_experts_per_worker,
        )
    elif num_experts_per_worker is not None:
        resident = _wrapped(num_experts, num_ranks, num_experts_per_worker)
    else:
        resident = _even(num_experts, num_ranks)
    sources = _choose_sources(num_experts, num_ranks, resident)
    return Placement(num_experts, num_ranks, resident, sources)


def _check_counts(
    num_experts: int,
    num_ranks: int,
    num_experts_per_worker: int | None,
    num_prefetch_experts: int | None,
) -> None:
    if num_experts < 1:
        raise ValueError(f"num_experts is {num_experts}: a layer to distribute has at least one.")
    if num_ranks < 1:
        raise ValueError(f"The group has {num_ranks} ranks (dwdp_size): use at least 1.")
    if num_ranks > MAX_RANKS:
        raise ValueError(
            f"The group has {num_ranks} ranks (dwdp_size): use at most {MAX_RANKS}, "
            "or several groups."
        )
    if num_ranks > num_experts:
        raise ValueError(
            f"{num_ranks} ranks cannot share {num_experts} experts: every rank must hold at least "
            f"one. Use a group of at most {num_experts}."
        )
    for name, value in (
        ("num_experts_per_worker", num_experts_per_worker),
        ("num_prefetch_experts", num_prefetch_experts),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: use at least 1, or leave it out.")


def _even(num_experts: int, num_ranks: int) -> tuple[tuple[ExpertRange, ...], ...]:
    share, rest = divmod(num_experts, num_ranks)
    starts = [rank * share + min(rank, rest) for rank in range(num_ranks + 1)]
    return tuple((ExpertRange(starts[r], starts[r + 1]),) for r in range(num_ranks))


def _wrapped(
    num_experts: int, num_ranks: int, num_stored: int
) -> tuple[tuple[ExpertRange, ...], ...]:
    share = -(-num_experts // num_ranks)
    if num_stored < share:
        raise ValueError(
            f"num_experts_per_worker is {num_stored}: {num_ranks} ranks then store at most "
            f"{num_ranks * num_stored} of {num_experts} experts. Use at least {share}."
        )
    if num_stored > num_experts:
        raise ValueError(
            f"num_experts_per_worker is {num_stored}, but the layer has {num_experts} experts. "
            f"Use at most {num_experts}."
        )
    if num_stored == num_experts:
        return ((ExpertRange(0, num_experts),),) * num_ranks
    resident: list[tuple[ExpertRange, ...]] = []
    for rank in range(num_ranks):
        start = rank * num_experts // num_ranks
        stop = start + num_stored
        if stop <= num_experts:
            resident.append((ExpertRange(start, stop),))
        else:
            resident.append((ExpertRange(0, stop - num_experts), ExpertRange(start, num_experts)))
    return tuple(resident)


def _strided(
    num_experts: int, num_ranks: int, stride: int, num_stored: int
) -> tuple[tuple[ExpertRange, ...], ...]:
    if stride > num_stored:
        raise ValueError(
            f"num_prefetch_experts ({stride}) is larger than num_experts_per_worker "
            f"({num_stored}): the experts between two ranks would be stored nowhere. "
            f"Use at most {num_stored}."
        )
    last = (num_ranks - 1) * stride
    if last >= num_experts:
        first_empty = -(-num_experts // stride)
        raise ValueError(
            f"num_prefetch_experts is {stride}: rank {first_empty} would start at expert "
            f"{first_empty * stride} of {num_experts} and hold none. Use a group of at most "
            f"{first_empty}, or num_prefetch_experts of at most "
            f"{(num_experts - 1) // (num_ranks - 1)}."
        )
    if last + num_stored < num_experts:
        raise ValueError(
            f"num_prefetch_experts {stride} and num_experts_per_worker {num_stored}: {num_ranks} "
            f"ranks cover {last + num_stored} of {num_experts} experts. Raise "
            f"num_experts_per_worker to {num_experts - last} or more, or raise "
            "num_prefetch_experts."
        )
    return tuple(
        (ExpertRange(start, min(start + num_stored, num_experts)),)
        for start in range(0, last + 1, stride)
    )


def _holders_of(
    num_experts: int, resident: Sequence[Sequence[ExpertRange]]
) -> tuple[tuple[int, ...], ...]:
    holders: list[list[int]] = [[] for _ in range(num_experts)]
    for rank, ranges in enumerate(resident):
        for start, stop in ranges:
            for expert in range(start, stop):
                holders[expert].append(rank)
    return tuple(map(tuple, holders))


class _ReplicaSet:
    """Experts with the same holders. To balance what ranks serve, these need no telling apart.

    Attributes:
        holders: the ranks that store these experts, ascending.
        readers: the ranks that do not, and so read all of them.
        experts: ascending.
        served: of the ``len(readers) * len(experts)`` reads, how many go to each holder.
        dealt: ``dealt[reader][holder]``, the same by reader.
    """

    def __init__(self, holders: tuple[int, ...], num_ranks: int) -> None:
        self.holders = holders
        self.readers = sorted(set(range(num_ranks)).difference(holders))
        self.experts: list[int] = []
        self.served = dict.fromkeys(holders, 0)
        self.dealt: dict[int, dict[int, int]] = {}


class _Shift(NamedTuple):
    """Reads of a replica set that can go to ``taker`` instead of ``giver``, both holders."""

    replicas: _ReplicaSet
    giver: int
    taker: int


def _choose_sources(
    num_experts: int, num_ranks: int, resident: Sequence[Sequence[ExpertRange]]
) -> tuple[tuple[int, ...], ...]:
    by_holders: dict[tuple[int, ...], _ReplicaSet] = {}
    for expert, holders in enumerate(_holders_of(num_experts, resident)):
        if holders not in by_holders:
            by_holders[holders] = _ReplicaSet(holders, num_ranks)
        by_holders[holders].experts.append(expert)
    # The fewer holders, the earlier: who has more choice can make up for who has less.
    replica_sets = sorted(by_holders.values(), key=lambda replicas: len(replicas.holders))

    _balance(replica_sets, num_ranks)

    num_reads = [[0] * num_ranks for _ in range(num_ranks)]  # [reader][source]
    for replicas in replica_sets:
        if len(replicas.holders) == 1:
            source, count = replicas.holders[0], len(replicas.experts)
            for reader in replicas.readers:
                replicas.dealt[reader] = {source: count}
                num_reads[reader][source] += count
    for _ in range(2):  # The second time, the rest of each reader's choices is known.
        for replicas in replica_sets:
            if len(replicas.holders) > 1:
                _deal(replicas, num_ranks, num_reads)

    sources = [[rank] * num_experts for rank in range(num_ranks)]
    for replicas in replica_sets:
        for reader, dealt in replicas.dealt.items():
            # Neighbouring experts come from one source where they can: their bytes make one copy.
            runs = (repeat(source, count) for source, count in dealt.items())
            for expert, source in zip(replicas.experts, chain.from_iterable(runs), strict=True):
                sources[reader][expert] = source
    return tuple(map(tuple, sources))


def _balance(replica_sets: Sequence[_ReplicaSet], num_ranks: int) -> None:
    """Fill in ``served`` of every replica set so that the ranks' totals are as even as can be.

    From an even split of every replica set, reads are shifted along paths of ranks, each of which
    shares a replica set with the next, from a rank to one that serves at least two fewer. When no
    such path is left the sum of squares of the totals is minimal (an optimal semi-matching: Harvey,
    Ladner, Lovasz and Tamir, 2003), so their spread is at most one if any choice has that.
    """
    totals = [0] * num_ranks
    sets_of: list[list[_ReplicaSet]] = [[] for _ in range(num_ranks)]
    for replicas in replica_sets:
        share, rest = divmod(len(replicas.experts) * len(replicas.readers), len(replicas.holders))
        lightest_first = sorted(replicas.holders, key=lambda rank: (totals[rank], rank))
        for place, rank in enumerate(lightest_first):
            replicas.served[rank] = share + (place < rest)
            totals[rank] += replicas.served[rank]
            if len(replicas.holders) > 1:
                sets_of[rank].append(replicas)

    unsettled = set(range(num_ranks))
    while unsettled:
        heaviest = min(unsettled, key=lambda rank: (-totals[rank], rank))
        path, reached = _lightening_path(heaviest, totals, sets_of)
        if not path:
            # These serve at most one fewer, and the rest serve no more: no later path that
            # lightens a rank leads through them.
            unsettled -= reached
            continue
        lightest = path[0].taker
        amount = min(
            (totals[heaviest] - totals[lightest]) // 2,
            min(shift.replicas.served[shift.giver] for shift in path),
        )
        for replicas, giver, taker in path:
            replicas.served[giver] -= amount
            replicas.served[taker] += amount
        totals[heaviest] -= amount
        totals[lightest] += amount


def _lightening_path(
    start: int, totals: Sequence[int], sets_of: Sequence[Sequence[_ReplicaSet]]
) -> tuple[list[_Shift], set[int]]:
    """The shortest path from ``start`` to the lightest rank within reach, last shift first, and the
    ranks seen on the way. The path is empty when none within reach serves at least two fewer; then
    the same holds for each of the ranks seen."""
    came_by: dict[int, _Shift] = {}
    reached = {start}
    used: set[_ReplicaSet] = set()
    queue = deque([start])
    lightest, floor = start, min(totals)
    while queue and totals[lightest] > floor:
        giver = queue.popleft()
        for replicas in sets_of[giver]:
            if replicas in used or not replicas.served[giver]:
                continue
            used.add(replicas)
            for taker in sorted(replicas.served.keys() - reached):
                reached.add(taker)
                queue.append(taker)
                came_by[taker] = _Shift(replicas, giver, taker)
                if totals[taker] < totals[lightest]:
                    lightest = taker
    if totals[start] - totals[lightest] < 2:
        return [], reached
    path = [came_by[lightest]]
    while path[-1].giver != start:
        path.append(came_by[path[-1].giver])
    return path, reached


def _deal(replicas: _ReplicaSet, num_ranks: int, num_reads: Sequence[list[int]]) -> None:
    """Fill in ``dealt`` of a replica set: what its holders serve, spread over its readers.

    One expert after the other, each reader takes the source that it reads least from so far
    (``num_reads[reader][source]``, kept up to date), among those with reads left to serve.
    """
    for reader, dealt in replicas.dealt.items():
        for source, count in dealt.items():
            num_reads[reader][source] -= count
    left = dict(replicas.served)
    rotated = {
        reader: sorted(replicas.holders, key=lambda holder: (holder - reader) % num_ranks)
        for reader in replicas.readers
    }
    replicas.dealt = {reader: dict.fromkeys(order, 0) for reader, order in rotated.items()}
    for _ in replicas.experts:
        for reader, order in rotated.items():
            reads = num_reads[reader]
            source = min(
                (holder for holder in order if left[holder]),
                key=lambda holder: (reads[holder], -left[holder]),
            )
            left[source] -= 1
            reads[source] += 1
            replicas.dealt[reader][source] += 1
