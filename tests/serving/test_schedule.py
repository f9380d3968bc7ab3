"""Who gets which prompt."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from dwdp.serving.schedule import MAX_IN_FLIGHT, Schedule


def test_prompts_go_to_the_rank_with_the_fewest_outstanding_tokens() -> None:
    schedule = Schedule([100, 10, 10, 10, 5], ranks=[0, 1])
    assert schedule.assign() == [(0, 0), (1, 1), (1, 2), (0, 3)]
    assert schedule.outstanding_tokens(0) == 110
    assert schedule.outstanding_tokens(1) == 20
    schedule.finish(1, 1)
    assert schedule.assign() == [(1, 4)]


def test_a_rank_holds_only_so_many() -> None:
    schedule = Schedule([1] * 10, ranks=[0, 1, 2])
    assert len(schedule.assign()) == 3 * MAX_IN_FLIGHT
    assert schedule.assign() == []


def test_a_silent_rank_keeps_only_what_it_holds() -> None:
    schedule = Schedule([1] * 50, ranks=[0, 1])
    working = []
    for rank, prompt in schedule.assign():
        if rank == 1:
            working.append(prompt)
    while working:
        schedule.finish(1, working.pop(0))
        working += [prompt for rank, prompt in schedule.assign() if rank == 1]
    assert schedule.num_finished == 50 - MAX_IN_FLIGHT


def test_the_prompts_of_a_lost_rank_are_next_in_line() -> None:
    schedule = Schedule([1] * 6, ranks=[0, 1])
    assert schedule.assign() == [(0, 0), (1, 1), (0, 2), (1, 3)]
    assert schedule.lose(0) == (0, 2)
    assert schedule.ranks == (1,)
    schedule.finish(1, 1)
    assert schedule.assign() == [(1, 0)]


@given(
    st.lists(st.integers(1, 1000), max_size=30),
    st.integers(1, 5),
    st.integers(0, 4),
    st.randoms(use_true_random=False),
)
def test_every_prompt_is_finished_once_whoever_dies(
    costs: list[int], num_ranks: int, num_deaths: int, chance: random.Random
) -> None:
    schedule = Schedule(costs, range(num_ranks))
    deaths = min(num_deaths, num_ranks - 1)
    held: dict[int, list[int]] = {rank: [] for rank in range(num_ranks)}
    finished = []
    while not schedule.is_finished:
        for rank, prompt in schedule.assign():
            held[rank].append(prompt)
            assert len(held[rank]) <= MAX_IN_FLIGHT
        rank = chance.choice([rank for rank, prompts in held.items() if prompts])
        if deaths and chance.random() < 0.3:
            deaths -= 1
            assert list(schedule.lose(rank)) == held.pop(rank)
        else:
            finished.append(held[rank].pop(0))
            schedule.finish(rank, finished[-1])
    assert sorted(finished) == list(range(len(costs)))
