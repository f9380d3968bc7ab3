"""Waiting for a layer's experts and releasing them, around TensorRT-LLM's own MoE modules."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dwdp import DwdpConfig, Group
from dwdp.engines.tensorrt_llm import forward, sharding
from dwdp.fabric import create_fabric

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

import moe_models
from moe_models import HIDDEN, TOP_K, Case
from pretend_cuda import pretend_gpu
from ranks import run_ranks

pytestmark = pytest.mark.trtllm

NUM_EXPERTS, NUM_LAYERS, CHUNK_TOKENS = 8, 4, 16


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(moe_models, "NUM_LAYERS", NUM_LAYERS)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # Ranks are threads themselves.
    with pretend_gpu(90):
        yield
    torch.set_num_threads(num_threads)


def make_model(backend: str) -> nn.ModuleList:
    case = Case(backend, None, 90, moe_models.plain)
    checkpoint = moe_models.make_checkpoint(case, NUM_EXPERTS)
    layers = moe_models.load_model(case, checkpoint, NUM_EXPERTS).layers
    for layer in layers:
        layer.moe_max_num_tokens = CHUNK_TOKENS
    return layers


def make_layer(backend: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(moe_models, "NUM_LAYERS", 1)
    return make_model(backend)[0]


def share(
    model: Callable[[], nn.Module], group: Group, config: DwdpConfig
) -> tuple[nn.Module, Any]:
    from dwdp.engines.tensorrt_llm.sharing import share_experts

    with sharding.resident_experts_only(sharding.placed_experts(config, group.rank)):
        made = model()
    return made, share_experts(made, group, config, create_fabric("host"))


def step(num_tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and router logits of a step."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, HIDDEN, generator=generator).bfloat16()
    return x, torch.randn(num_tokens, NUM_EXPERTS, generator=generator).bfloat16()


@pytest.mark.parametrize("backend", ["CUTLASS", "VANILLA"])
@pytest.mark.parametrize("fetch_mode", ["staged", "demand", "auto"])
def test_a_sharded_model_computes_what_the_whole_one_does(backend: str, fetch_mode: str) -> None:
    """In order, with repeated and skipped layers, one part or several, ranks out of step."""
    orders = [[0, 1, 2, 3], [0, 1, 2, 3, 3, 3], [0, 1, 2, 3], [2, 0, 3], [0, 1, 2, 3]]
    sizes = [3, CHUNK_TOKENS, 2 * CHUNK_TOKENS + 5, 1, 40]
    whole = make_model(backend)
    inputs = [step(num_tokens, seed) for seed, num_tokens in enumerate(sizes)]
    expected = [
        [whole[layer](*values) for layer in order]
        for order, values in zip(orders, inputs, strict=True)
    ]
    config = DwdpConfig(dwdp_size=2, fetch_mode=fetch_mode, demand_max_tokens=4, slice_bytes=4096)

    def rank(group: Group) -> None:
        model, shared = share(lambda: make_model(backend), group, config)
        forward.wrap(shared)
        pause = random.Random(group.rank)
        for order, values, outputs in zip(orders, inputs, expected, strict=True):
            for layer, output in zip(order, outputs, strict=True):
                time.sleep(pause.choice((0, 0, 0.002)))
                assert torch.equal(model[layer](*values), output)
        shared.close()

    run_ranks(2, rank)


def test_without_the_wrappers_the_outputs_are_wrong() -> None:
    """So the test above would see a layer that does not wait: slots hold the first two layers only."""
    values = step(5, seed=0)
    expected = [layer(*values) for layer in make_model("CUTLASS")]
    config = DwdpConfig(dwdp_size=2, fetch_mode="staged", num_slots=2)

    def rank(group: Group) -> list[bool]:
        model, shared = share(lambda: make_model("CUTLASS"), group, config)
        for layer in range(2):
            shared.runtime.begin(layer)
        equal = [
            torch.equal(layer(*values), output)
            for layer, output in zip(model, expected, strict=True)
        ]
        shared.close()
        return equal

    assert run_ranks(2, rank) == [[True, True, False, False]] * 2


class Recorder:
    """Stands where the runtime does, and writes down what it is asked for."""

    is_staged = True

    def __init__(self, fetch_mode: str = "auto") -> None:
        self.fetch_mode = fetch_mode
        self.calls: list[tuple[Any, ...]] = []

    def begin(self, layer: int, indices: torch.Tensor | None) -> None:
        self.calls.append(("begin", layer, None if indices is None else tuple(indices.shape)))

    def end(self, layer: int) -> None:
        self.calls.append(("end", layer))


def wrap(moe: Any, backend: Any, runtime: Recorder) -> Recorder:
    layer = SimpleNamespace(index=7, moe=moe, backend=backend)
    forward.wrap(SimpleNamespace(runtime=runtime, layers=[layer]))  # type: ignore[arg-type]
    return runtime


def test_a_step_of_one_part_gives_the_choice_of_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = make_layer("CUTLASS", monkeypatch)
    recorder = wrap(moe, moe.backend, Recorder())
    moe(*step(CHUNK_TOKENS, 0))
    assert recorder.calls == [("begin", 7, (CHUNK_TOKENS, TOP_K)), ("end", 7)]


def test_parts_of_a_step_all_wait_and_are_released_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moe = make_layer("CUTLASS", monkeypatch)
    recorder = wrap(moe, moe.backend, Recorder())
    moe(*step(3 * CHUNK_TOKENS, 0))
    assert recorder.calls == [("begin", 7, None)] * 3 + [("end", 7)]


@pytest.mark.parametrize("backend", ["CUTLASS", "VANILLA"])
def test_a_layer_is_released_when_its_kernel_fails(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = make_layer(backend, monkeypatch)
    recorder = wrap(moe, getattr(moe, "backend", moe), Recorder())

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the kernel failed")

    with monkeypatch.context() as broken:
        broken.setattr(torch.ops.trtllm, "fused_moe", fail)
        broken.setattr(torch.ops.trtllm, "silu_and_mul", fail)
        with pytest.raises(RuntimeError, match="the kernel failed"):
            moe(*step(2, 0))
    assert recorder.calls == [("begin", 7, (2, TOP_K)), ("end", 7)]
    moe(*step(2, 0))
    assert recorder.calls[2:] == [("begin", 7, (2, TOP_K)), ("end", 7)]


def test_a_step_that_fails_before_its_kernel_leaves_the_ring_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moe = make_layer("CUTLASS", monkeypatch)
    recorder = wrap(moe, moe.backend, Recorder())
    x, _ = step(2, 0)
    with pytest.raises(AttributeError):
        moe(x, None)
    assert recorder.calls == []


def test_a_kernel_that_is_run_by_itself_is_bracketed(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = make_layer("CUTLASS", monkeypatch)
    recorder = wrap(moe, moe.backend, Recorder())
    x, logits = step(3, 0)
    experts, scales = moe.routing_method.apply(logits)
    moe.backend.run_moe(x, experts, scales, output_dtype=x.dtype)
    assert recorder.calls == [("begin", 7, (3, TOP_K)), ("end", 7)]


def test_the_operator_of_a_compiled_model_runs_through_the_wrappers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tensorrt_llm._torch.modules.fused_moe import interface
    from tensorrt_llm._torch.utils import model_extra_attrs

    moe = make_layer("CUTLASS", monkeypatch)
    expected = moe(*step(3, 0))
    recorder = wrap(moe, moe.backend, Recorder())
    with model_extra_attrs(moe.model_config.extra_attrs):
        x, logits = step(3, 0)
        out = interface.moe_custom_op("0", x, None, False, logits, True, None, None, None)
    assert torch.equal(out[0], expected)
    assert recorder.calls == [("begin", 7, (3, TOP_K)), ("end", 7)]


def test_triton_waits_before_it_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = make_layer("TRITON", monkeypatch)
    recorder = wrap(moe, moe, Recorder())
    during: list[list[Any]] = []

    def apply(_: Any, x: torch.Tensor, __: torch.Tensor) -> torch.Tensor:
        during.append(list(recorder.calls))
        return x

    monkeypatch.setattr(moe.quant_method, "apply", apply)
    moe(*step(3, 0))
    assert during == [[("begin", 7, None)]]
    assert recorder.calls == [("begin", 7, None), ("end", 7)]


def test_a_kernel_that_routes_is_given_the_choice_where_fetches_need_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TRTLLM-Gen routes inside its kernel; what is fetched has to be what the kernel reads."""
    monkeypatch.setattr(moe_models, "NUM_LAYERS", 1)
    given: list[tuple[Any, Any]] = []

    def kernel(logits: Any, _bias: Any, x: torch.Tensor, *_: Any, **choice: Any) -> torch.Tensor:
        given.append((logits, choice["topk_ids"]))
        return x

    monkeypatch.setattr(torch.ops.trtllm, "fp8_block_scale_moe_runner", kernel, raising=False)
    monkeypatch.setattr(torch.ops.trtllm, "fp8_quantize_1x128", lambda x: (x, None), raising=False)
    case = Case("TRTLLM", "FP8_BLOCK_SCALES", 100, moe_models.fp8_blocks)
    x, logits = step(3, 0)
    chosen = {}
    with pretend_gpu(100):
        for fetch_mode in ("staged", "auto", "demand"):
            checkpoint = moe_models.make_checkpoint(case, NUM_EXPERTS)
            moe = moe_models.load_model(case, checkpoint, NUM_EXPERTS).layers[0]
            recorder = wrap(moe, moe.backend, Recorder(fetch_mode))
            moe(x, logits)
            chosen[fetch_mode] = recorder.calls[0]
        expected, _ = moe.routing_method.apply(logits)
    assert chosen["staged"] == ("begin", 7, None)
    assert chosen["auto"] == chosen["demand"] == ("begin", 7, (3, TOP_K))
    assert given[0][0] is logits and given[0][1] is None
    for kernel_logits, kernel_choice in given[1:]:
        assert kernel_logits is None
        assert torch.equal(kernel_choice, expected.to(torch.int32))


def test_nothing_is_wrapped_where_experts_are_read_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moe = make_layer("CUTLASS", monkeypatch)
    recorder = Recorder("direct")
    recorder.is_staged = False
    wrap(moe, moe.backend, recorder)
    assert "forward_impl" not in vars(moe) and "run_moe" not in vars(moe.backend)
