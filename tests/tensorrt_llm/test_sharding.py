"""Backends create and load the resident experts alone, and refuse what cannot be shared."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from moe_models import CASES, Case, load_model, make_checkpoint, mxfp4, plain
from pretend_cuda import pretend_gpu

from dwdp import DwdpConfig
from dwdp.engines.tensorrt_llm import formats, sharding

NUM_EXPERTS = 6
PLAIN = CASES[0]


@pytest.fixture
def hopper() -> Iterator[None]:
    with pretend_gpu(90):
        yield


def load_share(case: Case, resident_of: sharding.ResidentOf) -> list[Any]:
    with sharding.resident_experts_only(resident_of):
        model = load_model(case, make_checkpoint(case, NUM_EXPERTS), NUM_EXPERTS)
    return list(model.layers)


def case_named(name: str) -> Case:
    return next(case for case in CASES if str(case) == name)


@pytest.mark.trtllm
@pytest.mark.usefixtures("hopper")
def test_a_share_takes_the_memory_of_its_experts_alone() -> None:
    full = load_model(PLAIN, make_checkpoint(PLAIN, NUM_EXPERTS), NUM_EXPERTS)
    for layer, whole in zip(load_share(PLAIN, lambda _: (0, 4, 5)), full.layers, strict=True):
        backend = layer.backend
        assert sharding.resident_experts(backend) == (0, 4, 5)
        for name, parameter in backend.named_parameters():
            expected = whole.backend.get_parameter(name)
            assert torch.equal(parameter, expected[[0, 4, 5]])
            assert parameter.untyped_storage().nbytes() == expected[:3].nbytes
        # Routing, and the kernels' idea of the group, are those of one rank with all experts.
        assert (layer.num_experts, layer.num_slots, layer.ep_size) == (NUM_EXPERTS, NUM_EXPERTS, 1)
        assert layer.expert_size_per_partition == NUM_EXPERTS
        sharding.widen(backend)
        assert backend.expert_size_per_partition == NUM_EXPERTS
        assert backend.initial_local_expert_ids == whole.backend.initial_local_expert_ids


@pytest.mark.trtllm
@pytest.mark.usefixtures("hopper")
def test_vanilla_experts_of_other_ranks_are_not_created() -> None:
    for layer in load_share(case_named("VANILLA-none"), lambda _: (0, 4, 5)):
        created = [bool(list(layer[expert].parameters())) for expert in range(NUM_EXPERTS)]
        assert created == [True, False, False, False, True, True]


@pytest.mark.trtllm
@pytest.mark.usefixtures("hopper")
def test_nothing_changes_outside_of_the_context() -> None:
    load_share(PLAIN, lambda _: (1,))
    for case in (PLAIN, case_named("VANILLA-none")):
        model = load_model(case, make_checkpoint(case, NUM_EXPERTS), NUM_EXPERTS)
        for layer in model.layers:
            backend = getattr(layer, "backend", layer)
            assert sharding.resident_experts(backend) is None
            assert backend.expert_size_per_partition == NUM_EXPERTS
    # TensorRT-LLM looks for this argument before it loads a part of the weights.
    assert "allow_partial_loading" in inspect.getfullargspec(backend.load_weights).args


@pytest.mark.trtllm
@pytest.mark.usefixtures("hopper")
def test_other_threads_are_outside_of_the_context() -> None:
    from concurrent.futures import ThreadPoolExecutor

    def load() -> int:
        model = load_model(PLAIN, make_checkpoint(PLAIN, NUM_EXPERTS), NUM_EXPERTS)
        return len(model.layers[0].backend.w2_weight)

    with sharding.resident_experts_only(lambda _: (1,)), ThreadPoolExecutor(1) as pool:
        assert pool.submit(load).result() == NUM_EXPERTS


@pytest.mark.trtllm
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case("TRITON", "W4A16_MXFP4", 90, mxfp4), "TritonMXFP4FusedMoEMethod: loading replaces"),
        (Case("VANILLA", "W8A16", 90, plain), "VanillaMoE with WeightOnlyQuantLinearMethod"),
        (Case("WIDEEP", None, 90, plain), "WideEPMoE: the WIDEEP backend sends tokens"),
    ],
    ids=lambda value: str(value) if isinstance(value, Case) else "",
)
def test_unsupported_formats_are_refused_before_weights_are_loaded(case: Case, reason: str) -> None:
    with pretend_gpu(case.sm_version), sharding.resident_experts_only(lambda _: (0, 1)):
        # Without a single tensor: none is asked for.
        with pytest.raises(ValueError, match=reason):
            load_model(case, [{}, {}], NUM_EXPERTS)


def _min_latency(backend: Any) -> None:
    from tensorrt_llm._torch.models.modeling_llama_min_latency import Llama4MinLatencyFusedMoE

    backend.__class__ = Llama4MinLatencyFusedMoE


def _unknown_class(backend: Any) -> None:
    backend.__class__ = type("NewFusedMoE", (type(backend),), {"__module__": __name__})


def _balanced(backend: Any) -> None:
    backend.layer_load_balancer = object()


def _expert_parallel(backend: Any) -> None:
    backend.ep_size = 2


@pytest.mark.trtllm
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_min_latency, "set enable_min_latency to false"),
        (_unknown_class, "does not know the MoE backend NewFusedMoE"),
        (_balanced, "remove moe_config.load_balancer"),
        (_expert_parallel, "ep_size 2"),
    ],
)
def test_backends_that_cannot_be_shared_are_refused(
    change: Callable[[Any], None], reason: str
) -> None:
    backend = load_share(PLAIN, lambda _: (0,))[0].backend
    change(backend)
    with pytest.raises(ValueError, match=reason):
        formats.check_backend(backend)


def test_ranges_of_experts() -> None:
    assert sharding.ranges([]) == []
    assert sharding.ranges([2, 3, 4]) == [(2, 5)]
    assert sharding.ranges([0, 1, 5, 6]) == [(0, 2), (5, 7)]


def test_placed_experts_follow_the_options() -> None:
    config = DwdpConfig(dwdp_size=3, num_experts_per_worker=4)
    assert list(sharding.placed_experts(config, 2)(8)) == [0, 5, 6, 7]
    with pytest.raises(ValueError, match="3 ranks cannot share 2 experts"):
        sharding.placed_experts(DwdpConfig(dwdp_size=3), 0)(2)
