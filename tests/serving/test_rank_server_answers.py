"""What a rank's server answers, as the official OpenAI client reads it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from rank_servers import MODEL, MODEL_DIR, PROMPT, TOKEN, Rank
from transformers import AutoTokenizer

CHAT = [{"role": "user", "content": "class A:"}]


def test_models(rank: Rank) -> None:
    assert [model.id for model in rank.client.models.list()] == [MODEL]
    assert rank.client.models.retrieve(MODEL).owned_by == "dwdp"
    with pytest.raises(openai.NotFoundError) as caught:
        rank.client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_a_completion_is_the_unsharded_models(
    rank: Rank, greedy: Callable[[str, int], str]
) -> None:
    answer = rank.client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=40, temperature=0
    )
    Completion.model_validate(answer.model_dump())
    [choice] = answer.choices
    assert choice.text == greedy(PROMPT, 40)
    assert (choice.finish_reason, choice.logprobs) == ("length", None)
    assert answer.id.startswith("cmpl-")
    assert answer.usage is not None
    num_prompt_tokens = len(AutoTokenizer.from_pretrained(MODEL_DIR)(PROMPT)["input_ids"])
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (num_prompt_tokens, 40)


def test_prompts_of_every_form_and_several_answers(rank: Rank) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    prompts = [PROMPT, "import os"]
    token_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    create = rank.client.completions.create
    common: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "temperature": 0}
    by_text = create(prompt=prompts, n=2, **common)
    texts = [choice.text for choice in by_text.choices]
    assert [choice.index for choice in by_text.choices] == [0, 1, 2, 3]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert [choice.text for choice in create(prompt=token_ids, **common).choices] == texts[::2]
    assert create(prompt=token_ids[1], **common).choices[0].text == texts[2]


def test_a_stream_brings_what_the_whole_answer_has(rank: Rank) -> None:
    common: dict[str, Any] = {
        "model": MODEL,
        "prompt": [PROMPT, "import "],
        "max_tokens": 20,
        "temperature": 1.2,
        "seed": 5,
        "logprobs": 2,
        "stop": ["name", "zzz"],
    }
    whole = rank.client.completions.create(**common)
    texts = ["", ""]
    offsets: list[list[int]] = [[], []]
    reasons: list[Any] = [None, None]
    usage = None
    events = rank.client.completions.create(
        **common, stream=True, stream_options={"include_usage": True}
    )
    for event in events:
        assert usage is None
        usage = event.usage
        for choice in event.choices:
            assert reasons[choice.index] is None
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
            assert choice.logprobs is not None and choice.logprobs.text_offset is not None
            offsets[choice.index] += choice.logprobs.text_offset
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    for choice, streamed in zip(whole.choices, offsets, strict=True):
        assert choice.logprobs is not None
        assert choice.logprobs.text_offset == streamed


def test_log_probabilities_of_a_completion(rank: Rank) -> None:
    answer = rank.client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=10, temperature=0, logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens and logprobs.token_logprobs and logprobs.top_logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text
    for token, value, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert len(top) == 3
        assert top[token] == value == max(top.values())


def test_a_chat_answer_with_log_probabilities(rank: Rank) -> None:
    answer = rank.client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "developer", "content": "Write Python."}, *CHAT],  # type: ignore[list-item]
        max_completion_tokens=12,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    ChatCompletion.model_validate(answer.model_dump())
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.logprobs is not None and choice.logprobs.content is not None
    joined = b"".join(bytes(token.bytes or ()) for token in choice.logprobs.content)
    assert joined.decode() == choice.message.content
    for token in choice.logprobs.content:
        assert token.top_logprobs[0].logprob == token.logprob
        assert len(token.top_logprobs) == 2


def test_a_chat_stream(rank: Rank) -> None:
    common: dict[str, Any] = {
        "model": MODEL,
        "messages": CHAT,
        "max_tokens": 15,
        "temperature": 0,
        "n": 2,
    }
    whole = rank.client.chat.completions.create(**common)
    texts = ["", ""]
    roles: list[Any] = []
    for event in rank.client.chat.completions.create(**common, stream=True):
        ChatCompletionChunk.model_validate(event.model_dump())
        [choice] = event.choices
        roles += [(choice.index, choice.delta.role)] if choice.delta.role else []
        texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert sorted(roles) == [(0, "assistant"), (1, "assistant")]


def test_seeds_give_the_same_answers_again_and_different_ones_differ(rank: Rank) -> None:
    def texts(seed: int | None) -> list[str]:
        answer = rank.client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=12, temperature=1, n=3, seed=seed
        )
        return [choice.text for choice in answer.choices]

    first = texts(1)
    assert texts(1) == first
    assert len(set(first)) == 3
    assert texts(50) != first
    assert texts(None) != texts(None)


def test_many_at_once_with_the_asynchronous_client(
    rank: Rank, greedy: Callable[[str, int], str]
) -> None:
    prompts = [f"def f{number}(" for number in range(24)]

    async def ask() -> list[str]:
        transport = httpx.AsyncHTTPTransport(uds=f"\0{rank.name}")
        async with httpx.AsyncClient(transport=transport, timeout=60) as http:
            client = openai.AsyncOpenAI(
                api_key=TOKEN, base_url="http://rank/v1", http_client=http, max_retries=0
            )

            async def one(number: int, prompt: str) -> str:
                if number % 2:
                    answer = await client.completions.create(
                        model=MODEL, prompt=prompt, max_tokens=10, temperature=0
                    )
                    return answer.choices[0].text
                stream = await client.completions.create(
                    model=MODEL, prompt=prompt, max_tokens=10, temperature=0, stream=True
                )
                return "".join([event.choices[0].text async for event in stream])

            return await asyncio.gather(*(one(*item) for item in enumerate(prompts)))

    assert asyncio.run(ask()) == [greedy(prompt, 10) for prompt in prompts]


def test_the_end_token_can_be_ignored(rank: Rank) -> None:
    answer = rank.client.completions.create(
        model=MODEL,
        prompt=[0],
        max_tokens=300,
        temperature=2,
        seed=1,
        extra_body={"ignore_eos": True},
    )
    assert answer.usage is not None and answer.usage.completion_tokens == 300
