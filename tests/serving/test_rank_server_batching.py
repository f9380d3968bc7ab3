"""Both ways of batching: the tokens of ``generate``, by themselves and together, and what ends early."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from checkpoints import VOCAB_SIZE, make_model
from transformers import PreTrainedModel

from dwdp.serving.rank_server.backend import Backend, SequenceRequest, Step, UnsupportedModel
from dwdp.serving.rank_server.batching import create_backend, planned_kv_cache_bytes
from dwdp.serving.rank_server.continuous import ContinuousBackend
from dwdp.serving.rank_server.options import RankOptions
from dwdp.serving.rank_server.sampling import SamplingParams, TokenLogprobs

CONTINUOUS = ("qwen3_moe", "mixtral", "gpt_oss", "glm4_moe", "granitemoe", "mellum", "qwen2_moe")
PLAIN_ONLY = ("deepseek_v3", "qwen3_next", "jamba", "kimi_linear")
WAIT_S = 120.0


def sampling(temperature: float = 0.0, seed: int = 0, **changes: Any) -> SamplingParams:
    values = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "num_logprobs": None, **changes}
    return SamplingParams(temperature=temperature, seed=seed, **values)


def prompt(number: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(number)
    return tuple(torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist())


def sequence(
    number: int,
    length: int = 20,
    new: int = 12,
    params: SamplingParams | None = None,
    end_tokens: frozenset[int] = frozenset(),
) -> SequenceRequest:
    params = params if params is not None else sampling()
    return SequenceRequest(str(number), prompt(number, length), new, end_tokens, params)


def generate(model: PreTrainedModel, request: SequenceRequest) -> tuple[int, ...]:
    ids = torch.tensor([request.prompt])
    runner: Any = model
    output = runner.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=request.max_new_tokens,
        eos_token_id=sorted(request.end_tokens) or -1,
        pad_token_id=0,
    )
    return tuple(output[0, ids.shape[1] :].tolist())


class Collector:
    """Gathers what a backend delivers."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[TokenLogprobs]] = {}
        self.last: dict[str, Step] = {}
        self.failures: list[str] = []
        self._changed = threading.Condition()

    def deliver(self, steps: Sequence[Step]) -> None:
        with self._changed:
            for step in steps:
                assert step.sequence_id not in self.last
                self.tokens.setdefault(step.sequence_id, []).extend(step.token_ids)
                self.logprobs.setdefault(step.sequence_id, []).extend(step.logprobs)
                if step.is_last:
                    self.last[step.sequence_id] = step
            self._changed.notify_all()

    def fail(self, reason: str) -> None:
        with self._changed:
            self.failures.append(reason)
            self._changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, WAIT_S)

    def run(self, backend: Backend, requests: Sequence[SequenceRequest]) -> list[tuple[int, ...]]:
        for request in requests:
            backend.add(request)
        ids = [request.id for request in requests]
        self.wait(lambda: all(one in self.last for one in ids))
        assert all(self.last[one].error is None for one in ids)
        return [tuple(self.tokens[one]) for one in ids]


@contextmanager
def running(
    model: PreTrainedModel, batching: str, **options: Any
) -> Iterator[tuple[Backend, Collector]]:
    backend = create_backend(model, RankOptions(batching=batching, **options))
    collector = Collector()
    backend.start(collector.deliver, collector.fail)
    try:
        yield backend, collector
    finally:
        backend.stop()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("qwen3_moe")


REQUESTS = [sequence(number, length, 12) for number, length in enumerate((3, 70, 33, 1, 40, 8))]


@pytest.mark.parametrize("arch", CONTINUOUS)
def test_continuous_batches_give_the_tokens_of_generate(arch: str) -> None:
    model = make_model(arch)
    expected = [generate(model, request) for request in REQUESTS]
    attention = model.config._attn_implementation
    # Prompts are longer than a forward has room for, so that they are read in pieces among running ones.
    with running(model, "continuous", max_batch_tokens=32) as (backend, collector):
        assert isinstance(backend, ContinuousBackend)
        assert collector.run(backend, REQUESTS) == expected
        cache = backend._manager.batch_processor.cache
        taken = sum(tensor.nbytes for tensor in (*cache.key_cache, *cache.value_cache))
        planned = planned_kv_cache_bytes(
            model.config, model.dtype, RankOptions(max_batch_tokens=32)
        )
        assert backend.kv_cache_bytes == taken == planned
    assert model.config._attn_implementation == attention
    assert generate(model, REQUESTS[0]) == expected[0]


@pytest.mark.parametrize("arch", PLAIN_ONLY)
def test_other_models_are_run_plainly_and_it_is_said_why(
    arch: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(arch)
    expected = [generate(model, request) for request in REQUESTS[:3]]
    with pytest.raises(UnsupportedModel, match=f"cannot batch {arch} continuously"):
        create_backend(model, RankOptions(batching="continuous"))
    with pytest.raises(UnsupportedModel, match=f"cannot batch {arch} continuously"):
        planned_kv_cache_bytes(model.config, model.dtype, RankOptions(batching="continuous"))
    assert planned_kv_cache_bytes(model.config, model.dtype, RankOptions()) == 0
    with running(model, "auto") as (backend, collector):
        assert backend.name == "plain"
        assert collector.run(backend, REQUESTS[:3]) == expected
    assert any(f"cannot run {arch}" in record.getMessage() for record in caplog.records)


def test_plain_can_be_asked_for(model: PreTrainedModel) -> None:
    with running(model, "plain") as (backend, collector):
        assert (backend.name, backend.kv_cache_bytes) == ("plain", 0)
        expected = [generate(model, request) for request in REQUESTS]
        assert collector.run(backend, REQUESTS) == expected


def test_penalties_of_the_checkpoint_hold_for_every_request(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = sequence(1, 40, 20)
    without = generate(model, request)
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 1.5)
    expected = generate(model, request)
    assert expected != without
    with running(model, "auto") as (backend, collector):
        assert backend.name == "plain"  # penalties look at the whole sequence
        assert collector.run(backend, [request]) == [expected]


@pytest.mark.parametrize("batching", ["continuous", "plain"])
def test_the_end_token_and_the_limit_end_a_sequence(model: PreTrainedModel, batching: str) -> None:
    tokens = generate(model, sequence(4))
    end = tokens[5]
    ended = sequence(4, end_tokens=frozenset({end, VOCAB_SIZE - 1}))
    other = sequence(5, new=1)
    expected = generate(model, other)
    with running(model, batching) as (backend, collector):
        [cut] = collector.run(backend, [ended])
        assert cut == tokens[: tokens.index(end) + 1]
        assert collector.last[ended.id].finish_reason == "stop"
        assert collector.run(backend, [other]) == [expected]
        assert collector.last[other.id].finish_reason == "length"


def drawn(number: int, **changes: Any) -> SequenceRequest:
    return sequence(number, 10 + number, 16, sampling(1.5, seed=number, top_k=60, **changes))


def test_draws_do_not_depend_on_who_else_is_served_nor_how(model: PreTrainedModel) -> None:
    requests = [drawn(number) for number in range(6)]
    with running(model, "plain") as (backend, collector):
        expected = collector.run(backend, requests)
    assert len(set(expected)) == len(expected)
    with running(model, "continuous") as (backend, collector):
        assert collector.run(backend, requests) == expected
    with running(model, "continuous", max_running=2, max_batch_tokens=16) as (backend, collector):
        assert collector.run(backend, list(reversed(requests))) == expected[::-1]


def test_log_probabilities_are_the_same_either_way(model: PreTrainedModel) -> None:
    requests = [
        sequence(0, params=sampling(num_logprobs=3)),
        drawn(1, num_logprobs=2),
        sequence(2),
        drawn(3, num_logprobs=0),
    ]
    reports = []
    for batching in ("plain", "continuous"):
        with running(model, batching) as (backend, collector):
            collector.run(backend, requests)
            reports.append(collector.logprobs)
    plain, continuous = reports
    assert plain["2"] == continuous["2"] == []
    for request in (requests[0], requests[1], requests[3]):
        assert len(plain[request.id]) == request.max_new_tokens
        for one, other in zip(plain[request.id], continuous[request.id], strict=True):
            assert one.chosen == pytest.approx(other.chosen, abs=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
            assert len(one.top) == request.sampling.num_logprobs


def test_sequences_that_do_not_fit_into_the_cache_together_are_all_finished(
    model: PreTrainedModel,
) -> None:
    requests = [sequence(number, 60, 90, sampling(num_logprobs=0)) for number in range(4)]
    requests += [drawn(number, num_logprobs=1) for number in range(4, 6)]
    expected = [generate(model, request) for request in requests[:4]]
    with running(
        model, "continuous", max_sequence_length=160, kv_cache_tokens=288, max_batch_tokens=64
    ) as (backend, collector):
        got = collector.run(backend, requests)
        assert got[:4] == expected
        assert all(
            len(collector.logprobs[request.id]) == request.max_new_tokens for request in requests
        )
    with running(model, "plain") as (backend, collector):
        assert collector.run(backend, requests[4:]) == got[4:]


@pytest.mark.parametrize("batching", ["continuous", "plain"])
def test_a_cancelled_sequence_ends_and_leaves_nothing(
    model: PreTrainedModel, batching: str
) -> None:
    endless = [sequence(number, 5, 480, sampling(num_logprobs=1)) for number in range(3)]
    after = sequence(9)
    expected = generate(model, after)
    with running(model, batching) as (backend, collector):
        for request in endless:
            backend.add(request)
        collector.wait(lambda: bool(collector.tokens))
        for request in endless:
            backend.cancel(request.id)
            backend.cancel(request.id)
        assert collector.run(backend, [after]) == [expected]
        deadline = time.monotonic() + WAIT_S
        while backend.num_running() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert backend.num_running() == 0
        assert set(collector.last) == {after.id}
        if isinstance(backend, ContinuousBackend):
            assert not backend._sampler._logprobs
            assert not backend._requests and not backend._delivered


def test_a_sequence_that_is_cancelled_in_a_forward_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model("qwen3_moe")
    forward = model.forward
    is_held, is_inside, may_go_on = threading.Event(), threading.Event(), threading.Event()

    def hold(*args: Any, **kwargs: Any) -> Any:
        if is_held.is_set():
            is_inside.set()
            assert may_go_on.wait(WAIT_S)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", hold)
    request = sequence(0, 5, 400, sampling(num_logprobs=1))
    with running(model, "continuous") as (backend, collector):
        assert isinstance(backend, ContinuousBackend)
        backend.add(request)
        collector.wait(lambda: bool(collector.logprobs.get("0")))
        is_held.set()
        assert is_inside.wait(WAIT_S)
        backend.cancel("0")
        left = dict(backend._sampler._logprobs)
        is_held.clear()
        may_go_on.set()
        assert not left
        collector.run(backend, [sequence(1, new=2)])
        assert not backend._sampler._logprobs
        assert set(collector.last) == {"1"}


def test_suppressed_tokens_have_log_probabilities_that_are_numbers(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    suppressed = [token for token in range(VOCAB_SIZE) if token != 9]
    monkeypatch.setattr(model.generation_config, "suppress_tokens", suppressed)
    request = sequence(0, new=1, params=sampling(num_logprobs=2))
    with running(model, "auto") as (backend, collector):
        assert collector.run(backend, [request]) == [(9,)]
        [report] = collector.logprobs["0"]
        assert (report.chosen, report.top[0], report.top[1][1]) == (0.0, (9, 0.0), -9999.0)


def break_model(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(model, "forward", fail)


def test_a_forward_that_fails_ends_continuous_batching(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("qwen3_moe")
    with running(model, "continuous") as (backend, collector):
        backend.add(sequence(0, 5, 400))
        collector.wait(lambda: bool(collector.tokens))
        break_model(model, monkeypatch)
        collector.wait(lambda: bool(collector.failures))
        assert collector.failures == ["RuntimeError: broken on purpose"]
        assert not collector.last


def test_tokens_that_cannot_be_read_end_their_sequence_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The log-probabilities of one sequence are lost."""
    model = make_model("qwen3_moe")
    expected = generate(model, sequence(1))
    with running(model, "continuous") as (backend, collector):
        assert isinstance(backend, ContinuousBackend)
        take = backend._sampler.take

        def lose(sequence_id: str, positions: range) -> tuple[TokenLogprobs, ...]:
            backend._sampler.forget(sequence_id)
            return take(sequence_id, positions)

        monkeypatch.setattr(backend._sampler, "take", lose)
        backend.add(sequence(0, 5, 400, sampling(num_logprobs=1)))
        collector.wait(lambda: "0" in collector.last)
        assert collector.last["0"].error == "KeyError: '0'"
        assert collector.run(backend, [sequence(1)]) == [expected]
        collector.wait(lambda: backend.num_running() == 0)
        assert not collector.failures and not backend._requests and not backend._delivered


def test_a_forward_that_fails_ends_one_plain_sequence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = make_model("qwen3_moe")
    with running(model, "plain") as (backend, collector):
        with monkeypatch.context() as patch:
            break_model(model, patch)
            backend.add(sequence(0))
            collector.wait(lambda: "0" in collector.last)
        assert collector.last["0"].error == "RuntimeError: broken on purpose"
        assert collector.run(backend, [sequence(1)]) == [generate(model, sequence(1))]
    assert "broken on purpose" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_sequence_length": 513}, "max_sequence_length is 513, but the model has 512"),
        (
            {"max_sequence_length": 400, "kv_cache_tokens": 400},
            "one sequence of 400 tokens needs 464",
        ),
        ({"kv_cache_tokens": 10**12}, "does not fit into memory: choose a smaller"),
    ],
)
def test_limits_that_cannot_be_had_are_refused(
    model: PreTrainedModel, options: dict[str, Any], message: str
) -> None:
    attention = model.config._attn_implementation
    with pytest.raises(ValueError, match=message) as caught:
        create_backend(model, RankOptions(**options))
    assert not isinstance(caught.value, UnsupportedModel)
    assert model.config._attn_implementation == attention


def test_limits_by_default(model: PreTrainedModel) -> None:
    with running(model, "auto", max_running=4) as (backend, _):
        assert backend.max_sequence_length == 512
        assert backend.max_running == 4
        assert backend.kv_cache_tokens == 4 * (512 + 64)
        assert backend.kv_cache_bytes >= backend.kv_cache_tokens * 4 * 2 * 2 * 16 * 4
