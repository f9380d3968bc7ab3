"""Requests that the ranks' own server checks: only what routing needs is read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwdp.serving.openai.errors import ApiError
from dwdp.serving.openai.relayed import RelayedChatCompletionRequest, RelayedCompletionRequest
from dwdp.serving.openai.requests import MAX_CHOICES, MAX_MESSAGES, MAX_PROMPTS, parse
from dwdp.serving.router.cost import (
    MOST_NEW_TOKENS,
    UNLIMITED_NEW_TOKENS,
    Cost,
    RelayedRequest,
    estimate_cost,
)
from dwdp.serving.router.openapi import openapi_document

HELLO = {"role": "user", "content": "hello"}


def completion(**fields: Any) -> RelayedCompletionRequest:
    document = {"model": "m", "prompt": "a", **fields}
    return parse(RelayedCompletionRequest, json.dumps(document).encode())


def chat(**fields: Any) -> RelayedChatCompletionRequest:
    document = {"model": "m", "messages": [HELLO], **fields}
    return parse(RelayedChatCompletionRequest, json.dumps(document).encode())


@given(
    st.dictionaries(
        st.sampled_from(["tools", "response_format", "echo", "logit_bias", "top_k", "new"]),
        st.recursive(
            st.none() | st.integers() | st.text(max_size=3), lambda x: st.lists(x, max_size=3)
        ),
    )
)
def test_options_of_the_ranks_are_not_looked_at(options: dict[str, Any]) -> None:
    assert completion(**options) == completion()
    assert chat(**options) == chat()


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda values: (
        st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=3)
    ),
)
NUMBERS = st.dictionaries(
    st.sampled_from(["model", "n", "best_of", "max_tokens", "max_completion_tokens"]), ANYTHING
)


@given(NUMBERS)
def test_whatever_stands_for_a_number_is_the_ranks_to_judge(fields: dict[str, Any]) -> None:
    requests: tuple[RelayedRequest, ...] = (completion(**fields), chat(**fields))
    for request in requests:
        cost = estimate_cost(request)
        assert 1 <= cost.num_sequences <= MAX_CHOICES
        assert 1 <= cost.new_tokens <= MAX_CHOICES * MOST_NEW_TOKENS
        assert cost.prompt_tokens >= cost.num_sequences


@pytest.mark.parametrize(
    ("fields", "new_tokens", "num_sequences"),
    [
        ({"max_tokens": 16.0}, 16, 1),
        ({"max_tokens": "16"}, 16, 1),
        ({"max_tokens": 15.5}, 16, 1),
        ({"max_tokens": 10**300}, MOST_NEW_TOKENS, 1),
        ({"max_tokens": 1e300}, MOST_NEW_TOKENS, 1),
        ({"max_tokens": float("inf")}, UNLIMITED_NEW_TOKENS, 1),
        ({"max_tokens": 0}, UNLIMITED_NEW_TOKENS, 1),
        ({"max_tokens": -1}, UNLIMITED_NEW_TOKENS, 1),
        ({"max_tokens": "many"}, UNLIMITED_NEW_TOKENS, 1),
        ({"max_tokens": "9" * 10_000}, UNLIMITED_NEW_TOKENS, 1),
        ({"max_tokens": [16]}, UNLIMITED_NEW_TOKENS, 1),
        ({"max_tokens": 3, "n": "2"}, 6, 2),
        ({"max_tokens": 3, "n": 0}, 3, 1),
        ({"max_tokens": 3, "n": True}, 3, 1),
        ({"max_tokens": 3, "n": 2.0, "best_of": 3.0}, 9, 3),
        ({"max_tokens": 1, "n": 10**6}, MAX_CHOICES, MAX_CHOICES),
    ],
)
def test_numbers_are_read_as_far_as_they_can_be(
    fields: dict[str, Any], new_tokens: int, num_sequences: int
) -> None:
    requests: tuple[RelayedRequest, ...] = (completion(**fields), chat(**fields))
    for request in requests:
        cost = estimate_cost(request)
        assert (cost.new_tokens, cost.num_sequences) == (new_tokens, num_sequences)


@pytest.mark.parametrize(
    ("prompt", "prompt_tokens", "num_sequences"),
    [
        ([], 0, 1),
        ([[]], 0, 1),
        ([-1, 2.0, "odd"], 3, 1),
        (["x" * 40, [1, 2, 3], None], 14, 3),
        (["x" * 40, ["y"]], 12, 2),
    ],
)
def test_what_is_in_a_prompt_is_the_ranks_to_judge(
    prompt: Any, prompt_tokens: int, num_sequences: int
) -> None:
    cost = estimate_cost(completion(prompt=prompt, max_tokens=1))
    assert cost == Cost(prompt_tokens, num_sequences, num_sequences)


def test_any_number_of_parameters_is_passed_on() -> None:
    options = {f"option_{number}": number for number in range(1000)}
    assert completion(**options) == completion()
    assert parse(RelayedCompletionRequest, b'{"prompt": "a"}').prompts == ("a",)  # no model, even


def test_the_document_does_not_say_what_ranks_take() -> None:
    kinds = (RelayedCompletionRequest, RelayedChatCompletionRequest)
    for model in (None, "m"):
        schemas = openapi_document(model, *kinds, needs_key=False)["components"]["schemas"]
        for kind in kinds:
            properties = schemas[kind.__name__]["properties"]
            assert ("enum" in properties["model"]) == (model is not None)
            assert {"type": "integer"} in properties["max_tokens"]["anyOf"]
        assert "prompt" in schemas["RelayedCompletionRequest"]["required"]


def test_what_a_completion_costs() -> None:
    request = completion(prompt=[[1, 2, 3], [4]], n=2, best_of=5, max_tokens=7)
    assert estimate_cost(request) == Cost(prompt_tokens=20, new_tokens=70, num_sequences=10)
    assert estimate_cost(completion()).new_tokens == UNLIMITED_NEW_TOKENS  # the rank's to limit


def test_what_a_chat_costs() -> None:
    part = {"type": "text", "text": "x" * 100}
    image = {"type": "image_url", "image_url": {"url": "data:..."}}
    messages = [
        {"role": "system", "content": "x" * 100},
        {"role": "user", "content": [part, image, "odd"]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "content": [{"text": 3}]},
    ]
    cost = estimate_cost(chat(messages=messages, max_completion_tokens=9))
    assert (cost.new_tokens, cost.num_sequences) == (9, 1)
    assert 50 <= cost.prompt_tokens <= 50 + 5 * len(messages)


@pytest.mark.parametrize(
    ("make", "fields", "param"),
    [
        (completion, {"prompt": None}, "prompt"),
        (completion, {"prompt": 3}, "prompt"),
        (completion, {"prompt": {"text": "a"}}, "prompt"),
        (completion, {"prompt": [None]}, "prompt"),
        (completion, {"prompt": [{"text": "a"}]}, "prompt"),
        (completion, {"prompt": ["a"] * (MAX_PROMPTS + 1)}, "prompt"),
        (completion, {"prompt": [[1]] * (MAX_PROMPTS + 1)}, "prompt"),
        (chat, {"messages": []}, "messages"),
        (chat, {"messages": ["hello"]}, "messages[0]"),
        (chat, {"messages": [HELLO] * (MAX_MESSAGES + 1)}, "messages"),
    ],
)
def test_what_routing_needs_is_checked(make: Any, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        make(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"prompt"', b"null"])
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    for kind in (RelayedCompletionRequest, RelayedChatCompletionRequest):
        with pytest.raises(ApiError) as caught:
            parse(kind, body)
        assert caught.value.status == 400
