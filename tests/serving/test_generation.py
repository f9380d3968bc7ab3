"""Generation on one rank: greedy equals Transformers, draws depend on the seed alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoints import make_model
from transformers import PreTrainedModel

from dwdp.serving.generation import Generator
from dwdp.serving.messages import Request

PROMPT = (5, 9, 40, 7)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("qwen3_moe")


def request(**changes: Any) -> Request:
    values = {"index": 0, "token_ids": PROMPT, "max_new_tokens": 8, "temperature": 0.0, "seed": 0}
    return Request(**{**values, **changes})


def test_greedy_equals_transformers_own(model: PreTrainedModel) -> None:
    ids = torch.tensor([PROMPT])
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8
    )
    assert Generator(model).generate(request())[0] == tuple(expected[0, len(PROMPT) :].tolist())


def test_draws_depend_on_the_seed_alone(model: PreTrainedModel) -> None:
    generator = Generator(model)
    first = generator.generate(request(temperature=2.0, seed=1))
    assert generator.generate(request(temperature=2.0, seed=2)) != first
    assert generator.generate(request()) != first
    assert generator.generate(request(temperature=2.0, seed=1)) == first


def test_draws_reach_below_the_50_likeliest(model: PreTrainedModel) -> None:
    generator = Generator(model)
    with torch.no_grad():
        likeliest = set(model(torch.tensor([PROMPT])).logits[0, -1].topk(50).indices.tolist())
    drawn = {
        generator.generate(request(temperature=50.0, seed=seed, max_new_tokens=1))[0][0]
        for seed in range(40)
    }
    assert drawn - likeliest


@pytest.mark.parametrize("as_list", [False, True])
def test_an_end_token_ends_the_text_and_is_part_of_it(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, as_list: bool
) -> None:
    tokens, reason = Generator(model).generate(request(max_new_tokens=4))
    assert (len(tokens), reason) == (4, "length")
    end = tokens[1]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end, 3] if as_list else end)
    shortened, reason = Generator(model).generate(request(max_new_tokens=4))
    assert shortened == tokens[: tokens.index(end) + 1]
    assert reason == "stop"


def test_a_model_without_an_end_token_goes_on(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    monkeypatch.setattr(model.generation_config, "pad_token_id", None)
    tokens, reason = Generator(model).generate(request(max_new_tokens=20))
    assert (len(tokens), reason) == (20, "length")


def test_the_checkpoints_own_sampling_settings_are_kept(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = Generator(model).generate(request())
    monkeypatch.setattr(model.generation_config, "top_k", 1)
    monkeypatch.setattr(model.generation_config, "do_sample", True)
    monkeypatch.setattr(model.generation_config, "num_beams", 4)
    generator = Generator(model)
    assert generator.generate(request(temperature=5.0)) == greedy
    assert generator.generate(request()) == greedy
