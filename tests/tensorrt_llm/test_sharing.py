"""Ranks that load their shares see, byte for byte, what one full load gives: every backend, every format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from moe_models import (
    CASES,
    HIDDEN,
    Case,
    Model,
    Weights,
    assert_same_state,
    load_model,
    make_checkpoint,
)
from pretend_cuda import pretend_gpu
from ranks import run_ranks
from torch import nn

from dwdp import DwdpConfig, Group
from dwdp.engines.tensorrt_llm import sharding
from dwdp.engines.tensorrt_llm.sharing import SharedModel, share_experts
from dwdp.fabric import create_fabric
from dwdp.rendezvous import GroupError

pytestmark = pytest.mark.trtllm


@dataclass(frozen=True)
class Placed:
    """A group and how it places experts."""

    config: DwdpConfig
    num_experts: int
    name: str


PLACEMENTS = (
    Placed(DwdpConfig(dwdp_size=2, fetch_mode="staged"), 6, "2-even"),
    # Rank 2 stores 4, 5, 6 and 0.
    Placed(DwdpConfig(dwdp_size=3, num_experts_per_worker=4), 7, "3-redundant"),
    # Rank 3 stores one expert: nothing says how long an expert is but its own strides.
    Placed(DwdpConfig(dwdp_size=4), 7, "4-uneven"),
)


def share(group: Group, placed: Placed, case: Case, checkpoint: list[Weights]) -> SharedModel:
    """Loads this rank's share from a checkpoint that has no other weights, and shares it."""
    resident_of = sharding.placed_experts(placed.config, group.rank)
    with sharding.resident_experts_only(resident_of):
        share = [without_remote(layer, resident_of(placed.num_experts)) for layer in checkpoint]
        model = load_model(case, share, placed.num_experts)
    return share_experts(model, group, placed.config, create_fabric("host"))


def without_remote(layer: Weights, resident: Sequence[int]) -> Weights:
    """What a rank needs of a layer: its experts, and the activation scales of all."""
    kept = {}
    for name, tensor in layer.items():
        expert = name.partition(".")[0]
        is_scale = name.endswith(("input_scale", "pre_quant_scale"))
        if is_scale or not expert.isdigit() or int(expert) in resident:
            kept[name] = tensor
    return kept


def backend_of(layer: nn.Module) -> nn.Module:
    return getattr(layer, "backend", layer)


@pytest.mark.parametrize("placed", PLACEMENTS, ids=lambda placed: placed.name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_rank_looks_as_if_it_had_loaded_all_experts(case: Case, placed: Placed) -> None:
    with pretend_gpu(case.sm_version):
        checkpoint = make_checkpoint(case, placed.num_experts)
        full = load_model(case, checkpoint, placed.num_experts)

        def body(group: Group) -> None:
            shared = share(group, placed, case, checkpoint)
            runtime = shared.runtime
            assert [layer.moe for layer in shared.layers] == list(shared.model.layers)
            for layer, expected in zip(shared.layers, full.layers, strict=True):
                assert layer.backend is backend_of(layer.moe)
                runtime.begin(layer.index)
                assert_same_state(layer.moe, expected)
                runtime.end(layer.index)
            shared.close()

        run_ranks(placed.config.dwdp_size, body)


def test_backends_without_a_wrapper_are_shared_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENABLE_CONFIGURABLE_MOE", "0")
    case = next(c for c in CASES if str(c) == "TRTLLM-NVFP4-gpt-oss")
    placed = PLACEMENTS[1]
    with pretend_gpu(case.sm_version):
        checkpoint = make_checkpoint(case, placed.num_experts)
        full = load_model(case, checkpoint, placed.num_experts)

        def body(group: Group) -> None:
            shared = share(group, placed, case, checkpoint)
            for layer, expected in zip(shared.layers, full.layers, strict=True):
                assert layer.moe is layer.backend
                assert_same_state(layer.moe, expected)
            shared.close()

        run_ranks(placed.config.dwdp_size, body)


@pytest.mark.parametrize("backend", ["CUTLASS", "VANILLA"])
@pytest.mark.parametrize("placed", PLACEMENTS, ids=lambda placed: placed.name)
def test_the_layer_computes_the_same(backend: str, placed: Placed) -> None:
    case = next(c for c in CASES if c.backend == backend and c.algorithm is None)
    with pretend_gpu(case.sm_version):
        checkpoint = make_checkpoint(case, placed.num_experts)
        full = load_model(case, checkpoint, placed.num_experts)
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(33, HIDDEN, generator=generator).to(case.dtype)
        logits = torch.randn(33, placed.num_experts, generator=generator)
        expected = [layer(x, logits) for layer in full.layers]

        def body(group: Group) -> None:
            shared = share(group, placed, case, checkpoint)
            for layer, output in zip(shared.layers, expected, strict=True):
                shared.runtime.begin(layer.index)
                assert torch.equal(layer.moe(x, logits), output)
                shared.runtime.end(layer.index)
            shared.close()

        run_ranks(placed.config.dwdp_size, body)
    assert all(len(torch.unique(output)) > 1000 for output in expected)


@pytest.fixture
def plain_case() -> Iterator[Case]:
    case = CASES[0]
    with pretend_gpu(case.sm_version):
        yield case


def test_closing_gives_the_memory_back(plain_case: Case) -> None:
    placed = PLACEMENTS[0]
    checkpoint = make_checkpoint(plain_case, placed.num_experts)

    def body(group: Group) -> None:
        shared = share(group, placed, plain_case, checkpoint)
        parameters = list(shared.model.parameters())
        assert all(parameter.numel() for parameter in parameters)
        shared.close()
        shared.close()
        assert not any(parameter.numel() for parameter in parameters)
        assert shared.runtime.stats().resident_expert_bytes > 0

    run_ranks(2, body)


def test_parameters_stay_the_objects_that_quantisation_scales_refer_to() -> None:
    case = next(c for c in CASES if str(c) == "CUTLASS-NVFP4")
    placed = PLACEMENTS[0]
    with pretend_gpu(case.sm_version):
        checkpoint = make_checkpoint(case, placed.num_experts)

        def body(group: Group) -> None:
            shared = share(group, placed, case, checkpoint)
            for layer in shared.layers:
                parameters = set(map(id, layer.backend.parameters()))
                assert {id(scale) for scale in layer.backend.quant_scales} <= parameters
            shared.close()

        run_ranks(2, body)


def test_different_checkpoints_are_noticed_by_their_scales() -> None:
    case = next(c for c in CASES if str(c) == "CUTLASS-FP8")
    placed = PLACEMENTS[0]
    with pretend_gpu(case.sm_version):
        checkpoint = make_checkpoint(case, placed.num_experts)
        other = [dict(layer) for layer in checkpoint]
        other[1]["5.w2.input_scale"] = torch.tensor(9.0)

        def body(group: Group) -> None:
            share(group, placed, case, other if group.rank else checkpoint)

        with pytest.raises(
            GroupError, match=r"rank\(s\) 1 and rank 0 loaded different input scales"
        ):
            run_ranks(2, body)


def test_a_model_that_was_not_loaded_as_a_share_is_refused(plain_case: Case) -> None:
    checkpoint = make_checkpoint(plain_case, 6)
    config = DwdpConfig(dwdp_size=1)

    def body(group: Group) -> None:
        model = load_model(plain_case, checkpoint, 6)
        share_experts(model, group, config, create_fabric("host"))

    with pytest.raises(ValueError, match="CutlassFusedMoE was created with all experts"):
        run_ranks(1, body)


def test_a_model_without_moe_layers_is_refused() -> None:
    def body(group: Group) -> None:
        share_experts(
            Model([nn.Linear(2, 2)]), group, DwdpConfig(dwdp_size=1), create_fabric("host")
        )

    with pytest.raises(ValueError, match="no MoE layers"):
        run_ranks(1, body)
