"""Requests that the ranks' own server checks: only what routing needs is read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwdp.serving.openai.errors import ApiError
from dwdp.serving.openai.relayed import RelayedChatCompletionRequest, RelayedCompletionRequest
from dwdp.serving.openai.requests import MAX_MESSAGES, MAX_PROMPTS, parse
from dwdp.serving.router.cost import UNLIMITED_NEW_TOKENS, Cost, estimate_cost

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
        (completion, {"prompt": [-1]}, "prompt"),
        (completion, {"prompt": ["a"] * (MAX_PROMPTS + 1)}, "prompt"),
        (completion, {"model": 3}, "model"),
        (completion, {"n": 0}, "n"),
        (completion, {"best_of": 10**6}, "best_of"),
        (completion, {"max_tokens": "7"}, "max_tokens"),
        (chat, {"messages": []}, "messages"),
        (chat, {"messages": ["hello"]}, "messages[0]"),
        (chat, {"messages": [HELLO] * (MAX_MESSAGES + 1)}, "messages"),
        (chat, {"max_completion_tokens": 0}, "max_completion_tokens"),
    ],
)
def test_what_routing_needs_is_checked(make: Any, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        make(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
