"""Requests of OpenAI's protocol: what is taken, what is refused, and by which name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsNonStreaming as ChatParams,
)
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as TextParams

from dwdp.serving.openai.errors import ApiError
from dwdp.serving.openai.requests import (
    MAX_MESSAGES,
    MAX_METADATA,
    MAX_PARAMETERS,
    MAX_PARTS,
    MAX_PROMPTS,
    MAX_STOPS,
    ChatCompletionRequest,
    CompletionRequest,
    parse,
)

HELLO = {"role": "user", "content": "hello"}


def completion(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"model": "m", "prompt": "a", **fields}).encode())


def chat(**fields: Any) -> ChatCompletionRequest:
    document = {"model": "m", "messages": [HELLO], **fields}
    return parse(ChatCompletionRequest, json.dumps(document).encode())


def refusal(make: Any, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        make(**fields)
    assert caught.value.status == 400
    assert caught.value.type == "invalid_request_error"
    return caught.value


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ([1, 2],)),
        ([[1, 2], [3]], ([1, 2], [3])),
        ([[]], ([],)),
    ],
)
def test_prompts_of_every_form(prompt: Any, prompts: tuple[Any, ...]) -> None:
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize("prompt", [{}, 3, [1, "a"], [-1], [[1, -1]], [[1], "a"], [1.5], [True]])
def test_other_prompts_are_refused_with_the_forms_that_are_not(prompt: Any) -> None:
    error = refusal(completion, prompt=prompt)
    assert error.param == "prompt"
    assert "a list of token ids" in error.message


def test_an_empty_list_of_prompts_is_refused() -> None:
    assert refusal(completion, prompt=[]).message == "prompt is an empty list"


@pytest.mark.parametrize(
    ("make", "fields", "param"),
    [
        (completion, {"temperature": 2.5}, "temperature"),
        (completion, {"temperature": "1"}, "temperature"),
        (completion, {"temperature": float("nan")}, "temperature"),
        (completion, {"top_p": 1.1}, "top_p"),
        (completion, {"top_k": -2}, "top_k"),
        (completion, {"n": 0}, "n"),
        (completion, {"n": 129}, "n"),
        (completion, {"max_tokens": 0}, "max_tokens"),
        (completion, {"max_tokens": 1.5}, "max_tokens"),
        (completion, {"seed": 2**63}, "seed"),
        (completion, {"stream": 1}, "stream"),
        (completion, {"stop": 3}, "stop"),
        (completion, {"stop": [""]}, "stop"),
        (completion, {"stop": ["x"] * (MAX_STOPS + 1)}, "stop"),
        (completion, {"logprobs": 21}, "logprobs"),
        (completion, {"model": ""}, "model"),
        (completion, {"stream_options": {}}, "stream_options"),
        (
            completion,
            {"stream": True, "stream_options": {"include_usage": 1}},
            "stream_options.include_usage",
        ),
        (chat, {"messages": []}, "messages"),
        (chat, {"messages": [{"role": "wizard", "content": "a"}]}, "messages[0].role"),
        (chat, {"messages": [HELLO, {"role": "user"}]}, "messages[1].content"),
        (chat, {"messages": [HELLO, {"role": "user", "content": 1}]}, "messages[1].content"),
        (
            chat,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content",
        ),
        (chat, {"top_logprobs": 2}, "top_logprobs"),
        (chat, {"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ],
)
def test_values_out_of_range_are_refused_with_their_name(
    make: Any, fields: dict[str, Any], param: str
) -> None:
    error = refusal(make, **fields)
    assert error.param == param
    assert param in error.message or param.rpartition(".")[2] in error.message


@pytest.mark.parametrize(
    ("make", "param", "value"),
    [
        (completion, "echo", True),
        (completion, "suffix", "x"),
        (completion, "best_of", 2),
        (completion, "frequency_penalty", 0.5),
        (completion, "presence_penalty", -0.5),
        (completion, "logit_bias", {"1": 5}),
        (chat, "tools", [{"type": "function"}]),
        (chat, "tool_choice", "required"),
        (chat, "response_format", {"type": "json_object"}),
        (chat, "modalities", ["audio"]),
        (chat, "reasoning_effort", "low"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(make: Any, param: str, value: Any) -> None:
    error = refusal(make, **{param: value})
    assert (error.param, error.code) == (param, "unsupported_parameter")
    assert error.message.startswith(f"{param} is not supported")


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (completion, {"echo": False, "suffix": "", "best_of": 1, "logit_bias": {}}),
        (completion, {"frequency_penalty": 0, "presence_penalty": 0.0, "stop": []}),
        (completion, {"n": 2, "best_of": 2}),
        (chat, {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}}),
        (chat, {"modalities": ["text"], "parallel_tool_calls": True}),
        (chat, {"max_tokens": 3, "max_completion_tokens": 3}),
        (chat, {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}),
        (
            chat,
            {
                "messages": [
                    {"role": "assistant", "content": "a", "tool_calls": [], "refusal": None}
                ]
            },
        ),
    ],
)
def test_values_that_ask_for_nothing_are_taken(make: Any, fields: dict[str, Any]) -> None:
    make(**fields)


def test_unknown_options_are_refused_wherever_they_are() -> None:
    error = refusal(completion, temprature=1)
    assert (error.param, error.code) == ("temprature", "unknown_parameter")
    error = refusal(chat, messages=[{**HELLO, "colour": "red"}])
    assert (error.param, error.code) == ("messages[0].colour", "unknown_parameter")
    assert len(refusal(completion, **{"x" * 10_000: 1}).body()["error"]["message"]) < 200


@pytest.mark.parametrize(
    ("make", "param", "item", "limit"),
    [
        (completion, "prompt", "a", MAX_PROMPTS),
        (completion, "prompt", [1], MAX_PROMPTS),
        (completion, "stop", "a", MAX_STOPS),
        (chat, "messages", HELLO, MAX_MESSAGES),
    ],
)
def test_long_lists_are_refused_with_their_limit(
    make: Any, param: str, item: Any, limit: int
) -> None:
    make(**{param: [item] * limit})
    error = refusal(make, **{param: [item] * (limit + 1)})
    assert error.param == param
    assert str(limit) in error.message


def test_too_many_parts_pairs_and_parameters_are_refused() -> None:
    parts = [{"type": "text", "text": "a"}] * MAX_PARTS
    chat(messages=[{"role": "user", "content": parts}])
    error = refusal(chat, messages=[{"role": "user", "content": [*parts, parts[0]]}])
    assert error.param == "messages[0].content"
    pairs = {str(number): "a" for number in range(MAX_METADATA + 1)}
    assert refusal(chat, metadata=pairs).param == "metadata"
    many = {f"p{number}": 1 for number in range(MAX_PARAMETERS)}
    assert f"at most {MAX_PARAMETERS}" in refusal(completion, **many).message


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ApiError) as caught:
        parse(CompletionRequest, b'{"model": "m"}')
    assert (caught.value.param, caught.value.code) == ("prompt", "missing_required_parameter")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"{'model': 1}", b'{"prompt": "\\ud800"}', b'{"prompt": "\xff"}', b"[" * 100_000],
)
def test_what_is_not_json_is_said_to_be_none(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse(CompletionRequest, body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


@pytest.mark.parametrize("body", [b"[]", b"3", b"null", b'"x"'])
def test_other_json_than_an_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError, match="JSON object"):
        parse(CompletionRequest, body)


FIELDS = [
    (kind, name)
    for kind in (CompletionRequest, ChatCompletionRequest)
    for name in (*kind.model_fields, "other")
]
SCALARS = st.sampled_from([None, True, 0, 1, -1, 2**64, 0.5, float("nan"), "", "a", "none", "auto"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["type", "role", "content", "text"]), inner, max_size=3)
    ),
    max_leaves=4,
)


@settings(max_examples=300)
@given(st.sampled_from(FIELDS), VALUES)
def test_any_value_is_either_taken_or_an_api_error(field: tuple[Any, str], value: Any) -> None:
    kind, name = field
    needed = {"prompt": "a"} if kind is CompletionRequest else {"messages": [HELLO]}
    status = 200
    try:
        parse(kind, json.dumps({"model": "m", **needed, name: value}).encode())
    except ApiError as error:
        status = json.loads(json.dumps(error.body())) and error.status
    assert status in (200, 400)


@pytest.mark.parametrize(
    ("params", "kind"), [(TextParams, CompletionRequest), (ChatParams, ChatCompletionRequest)]
)
def test_every_parameter_of_the_official_client_is_known(params: Any, kind: Any) -> None:
    """Known: it has an effect, or is refused by name, or is documented to have none."""
    wanted = {name for base in params.__mro__ for name in getattr(base, "__annotations__", {})}
    assert wanted - set(kind.model_fields) == set()
