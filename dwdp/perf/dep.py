"""Data plus expert parallelism, simulated beside DWDP: collectives in every layer, and who waits for whom.

Every layer with experts exchanges tokens twice, and each exchange starts when the last rank arrives::

    arrival(r)  = time(r) + window(r)
    dispatch    = max over r of arrival(r), then exchange / 2
    combine     = max over r of (dispatch + experts(r)), then exchange / 2

Experts take the same on every rank (tokens of all ranks are shared out evenly) unless ``expert_skew``
says that routing is uneven.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from dwdp.perf.simulator import Forward, GroupRun
from dwdp.perf.work import PARTS, Part, RankWork


def simulate_dep(
    work: Sequence[Sequence[RankWork]],
    noise_cv: float = 0.0,
    expert_skew: float = 1.0,
    seed: int = 0,
) -> GroupRun:
    """Run ``work[rank][iteration]`` under expert parallelism.

    Args:
        work: what every rank computes; all ranks and iterations have the same layers with experts.
        noise_cv: standard deviation of a factor around 1 on each rank's time per layer.
        expert_skew: expert time of the most loaded rank over the mean; which rank that is varies by layer.
        seed: of noise and skew.

    Raises:
        ValueError: ``expert_skew`` is below 1 or above the number of ranks.
    """
    num_ranks = len(work)
    if not 1 <= expert_skew <= num_ranks:
        raise ValueError(
            f"expert_skew is {expert_skew}: use 1 to the number of ranks ({num_ranks})."
        )
    random_numbers = random.Random(seed)
    now = [0.0] * num_ranks
    forwards: list[list[Forward]] = [[] for _ in range(num_ranks)]
    for iteration in range(len(work[0])):
        start, parts = list(now), [dict.fromkeys(PARTS, 0.0) for _ in range(num_ranks)]
        for rank in range(num_ranks):
            _book(now, parts, rank, "other", work[rank][iteration].overhead_s)
        for index in range(len(work[0][iteration].layers)):
            layers = [ranks[iteration].layers[index] for ranks in work]
            for rank, layer in enumerate(layers):
                noise = max(0.0, random_numbers.gauss(1.0, noise_cv)) if noise_cv else 1.0
                for part, seconds in layer.window:
                    _book(now, parts, rank, part, seconds * noise)
            if layers[0].experts_s is None:
                continue
            exchange_s = sum(layer.exchange_s for layer in layers) / num_ranks
            experts_s = sum(layer.dep_experts_s for layer in layers) / num_ranks
            hot = random_numbers.randrange(num_ranks)
            cold_share = (num_ranks - expert_skew) / max(1, num_ranks - 1)
            _synchronise(now, parts)
            for rank in range(num_ranks):
                share = expert_skew if rank == hot else cold_share
                _book(now, parts, rank, "exchange", exchange_s / 2)
                _book(now, parts, rank, "grouped_gemm", experts_s * share)
            _synchronise(now, parts)
            for rank in range(num_ranks):
                _book(now, parts, rank, "exchange", exchange_s / 2)
        for rank in range(num_ranks):
            forwards[rank].append(Forward(start[rank], now[rank], parts[rank], 0.0))
    return GroupRun(tuple(map(tuple, forwards)))


def _book(
    now: list[float], parts: list[dict[Part, float]], rank: int, part: Part, seconds: float
) -> None:
    now[rank] += seconds
    parts[rank][part] += seconds


def _synchronise(now: list[float], parts: list[dict[Part, float]]) -> None:
    last = max(now)
    for rank, time_s in enumerate(now):
        parts[rank]["wait"] += last - time_s
        now[rank] = last
