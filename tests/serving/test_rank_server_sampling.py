"""The choice of tokens: by each sequence's own parameters and seed, whoever shares its batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dwdp.serving.rank_server.sampling import SamplingParams, choose

GREEDY = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, num_logprobs=None)
DRAWN = dataclasses.replace(GREEDY, temperature=1.0)
VOCAB_SIZE = 50


def scores(num_rows: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn((num_rows, VOCAB_SIZE), generator=generator)


def with_(params: SamplingParams, **changes: Any) -> SamplingParams:
    return dataclasses.replace(params, **changes)


def draws(row: torch.Tensor, params: SamplingParams, count: int) -> torch.Tensor:
    """Tokens drawn at ``count`` positions, as frequencies ``[VOCAB_SIZE]``."""
    chosen, _ = choose(row.expand(count, -1), [params] * count, range(count))
    return torch.bincount(chosen.argmax(dim=-1), minlength=VOCAB_SIZE) / count


def test_greedy_scores_are_left_as_they_are() -> None:
    rows = scores(3)
    chosen, logprobs = choose(rows, [GREEDY] * 3, [5, 6, 7])
    assert chosen is rows
    assert logprobs == [None] * 3


def test_a_greedy_row_is_the_same_beside_drawn_ones() -> None:
    rows = scores(3)
    chosen, _ = choose(rows, [DRAWN, GREEDY, DRAWN], [1, 2, 3])
    assert torch.equal(chosen[1], rows[1])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_have_the_distribution_of_the_scores(temperature: float) -> None:
    row = scores()[0]
    expected = torch.softmax(row / temperature, dim=-1)
    got = draws(row, with_(DRAWN, temperature=temperature), 20_000)
    # Standard deviation of a frequency is at most 0.0036 here.
    assert (got - expected).abs().max() < 0.02


def test_a_draw_depends_on_seed_position_and_scores_alone() -> None:
    rows = scores(4)
    params = with_(DRAWN, temperature=2.0, seed=7)
    alone, _ = choose(rows[2:3], [params], [31])
    others = [with_(DRAWN, seed=seed, top_k=seed) for seed in (1, 2, 3)]
    together, _ = choose(rows, [*others[:2], params, others[2]], [3, 1, 31, 4])
    assert torch.equal(alone[0], together[2])


def test_seeds_and_positions_draw_differently() -> None:
    row = torch.zeros(VOCAB_SIZE)
    by_position = draws(row, DRAWN, 40)
    assert by_position.count_nonzero() > 10
    tokens = {
        int(choose(row[None], [with_(DRAWN, seed=seed)], [0])[0].argmax()) for seed in range(40)
    }
    assert len(tokens) > 10
    # Neighbouring seeds at neighbouring positions are not the same draw.
    first, _ = choose(row[None], [with_(DRAWN, seed=1)], [2])
    second, _ = choose(row[None], [with_(DRAWN, seed=2)], [1])
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("changes", "warpers"),
    [
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_k": VOCAB_SIZE + 10}, []),
        ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        ({"top_k": 10, "top_p": 0.8}, [TopKLogitsWarper(10), TopPLogitsWarper(0.8)]),
        (
            {"top_k": 20, "top_p": 0.9, "min_p": 0.05},
            [TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)],
        ),
    ],
)
def test_filters_keep_the_tokens_that_transformers_keeps(
    changes: dict[str, Any], warpers: list[Any]
) -> None:
    rows = scores(8, seed=3)
    chosen, _ = choose(rows, [with_(DRAWN, **changes)] * 8, range(8))
    kept = rows.clone()
    for warper in warpers:
        kept = warper(None, kept)
    assert torch.equal(chosen > 0, kept > -torch.inf)


def test_the_narrowest_filters_leave_the_likeliest_token() -> None:
    rows = scores(6)
    for changes in ({"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-9}, {"min_p": 1.0}):
        params = [with_(DRAWN, **changes, temperature=1.9)] * 6
        chosen, _ = choose(rows, params, range(6))
        assert torch.equal(chosen.argmax(dim=-1), rows.argmax(dim=-1))


def test_the_smallest_temperature_takes_the_likeliest_token() -> None:
    rows = scores(6)
    chosen, _ = choose(rows, [with_(DRAWN, temperature=1e-5)] * 6, range(6))
    assert torch.equal(chosen.argmax(dim=-1), rows.argmax(dim=-1))


@pytest.mark.parametrize("params", [GREEDY, with_(DRAWN, temperature=2.0, top_k=20)])
def test_log_probabilities_are_the_models_own(params: SamplingParams) -> None:
    rows = scores(3)
    params = with_(params, num_logprobs=4)
    chosen, [report, *_] = choose(rows, [params] * 3, [9, 10, 11])
    expected = torch.log_softmax(rows[0], dim=-1)
    assert report is not None
    assert report.chosen == pytest.approx(float(expected[chosen[0].argmax()]))
    values, ids = expected.topk(4)
    assert [token for token, _ in report.top] == ids.tolist()
    assert [value for _, value in report.top] == pytest.approx(values.tolist())
    without, _ = choose(rows, [with_(params, num_logprobs=None)] * 3, [9, 10, 11])
    assert torch.equal(without.argmax(dim=-1), chosen.argmax(dim=-1))


def test_impossible_tokens_are_reported_with_a_number() -> None:
    rows = scores(2)
    rows[0] = -torch.inf
    rows[0, 7] = 1.0
    rows[1] = torch.nan
    _, reports = choose(rows, [with_(GREEDY, num_logprobs=3)] * 2, [0, 1])
    forced, broken = reports
    assert forced is not None and broken is not None
    assert (forced.chosen, forced.top[0]) == (0.0, (7, 0.0))
    assert [value for _, value in forced.top[1:]] == [-9999.0] * 2
    assert (broken.chosen, [value for _, value in broken.top]) == (-9999.0, [-9999.0] * 3)


def test_a_report_of_the_chosen_token_alone() -> None:
    _, [report] = choose(scores(), [with_(GREEDY, num_logprobs=0)], [0])
    assert report is not None
    assert report.top == ()
