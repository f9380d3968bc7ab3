"""The engine between server and model: all of a request or nothing, and a word to everybody when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dwdp.serving.openai.errors import ApiError, unavailable
from dwdp.serving.rank_server.backend import Step
from dwdp.serving.rank_server.batching import create_backend
from dwdp.serving.rank_server.continuous import ContinuousBackend
from dwdp.serving.rank_server.engine import AnswerRequest, Engine, Generation
from dwdp.serving.rank_server.options import RankOptions
from dwdp.serving.rank_server.sampling import SamplingParams
from dwdp.serving.rank_server.text import AnswerText, TextDelta

MODEL_DIR = Path(__file__).resolve().parents[2] / "examples" / "tiny_moe" / "model"
TOKENIZER = AutoTokenizer.from_pretrained(MODEL_DIR)
WAIT_S = 120.0


@pytest.fixture
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="float32").eval()


def request(num_tokens: int, *stops: str) -> AnswerRequest:
    return AnswerRequest(
        prompt=tuple(TOKENIZER("def main(")["input_ids"]),
        max_new_tokens=num_tokens,
        end_tokens=frozenset(),
        sampling=SamplingParams(0.0, 0, 1.0, 0.0, seed=0, num_logprobs=None),
        stops=stops,
        continues=True,
    )


def run(
    model: PreTrainedModel,
    body: Callable[[Engine, list[str]], Awaitable[None]],
    **options: Any,
) -> None:
    """Run ``body`` with an engine and the list of failures that it reports."""

    async def main() -> None:
        failures: list[str] = []
        backend = create_backend(model, RankOptions(**options))
        max_waiting = options.get("max_waiting", 8)
        engine = Engine(backend, TOKENIZER, max_waiting=max_waiting, on_failure=failures.append)
        engine.start(asyncio.get_running_loop())
        try:
            await asyncio.wait_for(body(engine, failures), WAIT_S)
        finally:
            backend.stop()

    asyncio.run(main())


async def text_of(generation: Generation) -> str:
    return "".join([delta.text async for delta in generation])


@pytest.mark.parametrize("batching", ["continuous", "plain"])
def test_a_stop_string_ends_the_work_too(model: PreTrainedModel, batching: str) -> None:
    async def body(engine: Engine, failures: list[str]) -> None:
        with engine.submit([request(40)]) as generation:
            whole = await text_of(generation)
        stop = whole[10:14]
        with engine.submit([request(2000, stop)]) as generation:
            assert await text_of(generation) == whole[: whole.index(stop)]
        assert engine.num_unfinished == 0
        while engine.num_running:
            await asyncio.sleep(0.01)
        assert engine.counters.finished == 2
        assert engine.counters.cancelled == 0
        assert engine.counters.generated_tokens < 80

    run(model, body, batching=batching)


def test_answers_are_admitted_together_or_not_at_all(model: PreTrainedModel) -> None:
    async def body(engine: Engine, failures: list[str]) -> None:
        with engine.submit([request(1500)] * 3) as first:
            with pytest.raises(ApiError) as caught:
                engine.submit([request(1)] * 3)
            assert caught.value.status == 429
            assert engine.num_unfinished == 3
            with pytest.raises(ApiError) as caught:
                engine.submit([request(1)] * 6)
            assert caught.value.status == 400
            with engine.submit([request(1)] * 2) as second:
                await anext(aiter(first))
            assert engine.num_unfinished == 3
            del second
        assert engine.num_unfinished == 0
        assert engine.outstanding_tokens == 0
        with engine.submit([request(2)] * 5) as third:
            assert len([delta async for delta in third if delta.finish_reason]) == 5

    run(model, body, batching="continuous", max_running=2, max_waiting=3)


def test_a_model_that_fails_ends_every_answer_and_takes_no_more(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken on purpose")

    async def body(engine: Engine, failures: list[str]) -> None:
        with engine.submit([request(2000)] * 2) as generation:
            deltas = aiter(generation)
            await anext(deltas)
            monkeypatch.setattr(model, "forward", fail)
            with pytest.raises(ApiError) as caught:
                await text_of(generation)
        assert (caught.value.status, caught.value.code) == (503, "engine_failed")
        assert failures == ["RuntimeError: broken on purpose"]
        assert engine.state == "failed"
        assert (engine.num_unfinished, engine.counters.failed) == (0, 2)
        with pytest.raises(ApiError) as caught:
            engine.submit([request(1)])
        assert caught.value.code == "engine_failed"

    run(model, body, batching="continuous")


def test_a_text_that_cannot_be_made_ends_its_answer_alone(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = AnswerText.add

    def fail_for_one(text: AnswerText, step: Step) -> TextDelta:
        if step.sequence_id == "0":
            raise RuntimeError("broken on purpose")
        return add(text, step)

    async def body(engine: Engine, failures: list[str]) -> None:
        with engine.submit([request(60)]) as broken, engine.submit([request(60)]) as fine:
            with pytest.raises(ApiError, match="broken on purpose") as caught:
                await text_of(broken)
            assert caught.value.status == 500
            assert len(await text_of(fine)) > 60
        assert (engine.state, failures) == ("ready", [])
        assert (engine.counters.failed, engine.counters.finished) == (1, 1)

    monkeypatch.setattr(AnswerText, "add", fail_for_one)
    run(model, body, batching="continuous")


def test_an_engine_whose_tokens_are_not_read_any_more_has_failed(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(engine: Engine, failures: list[str]) -> None:
        assert isinstance(engine.backend, ContinuousBackend)

        def fail(timeout: float) -> None:
            raise OSError("broken on purpose")

        with engine.submit([request(2000)]) as generation:
            deltas = aiter(generation)
            await anext(deltas)
            monkeypatch.setattr(engine.backend._manager, "get_result", fail)
            with pytest.raises(ApiError) as caught:
                await text_of(generation)
        assert caught.value.code == "engine_failed"
        assert (engine.state, failures) == ("failed", ["OSError: broken on purpose"])

    run(model, body, batching="continuous")


def test_an_engine_that_drains_finishes_what_it_has(model: PreTrainedModel) -> None:
    async def body(engine: Engine, failures: list[str]) -> None:
        with engine.submit([request(20)]) as generation:
            engine.is_draining = True
            with pytest.raises(ApiError) as caught:
                engine.submit([request(1)])
            assert (caught.value.status, caught.value.code) == (503, "draining")
            assert len(await text_of(generation)) > 20
        engine.is_draining = False
        with engine.submit([request(2000)]) as generation:
            engine.give_up(unavailable("the end", "draining", 1.0))
            with pytest.raises(ApiError, match="the end"):
                await text_of(generation)

    run(model, body, batching="plain")
