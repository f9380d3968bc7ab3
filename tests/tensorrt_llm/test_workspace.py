"""DEEPGEMM's workspace for all experts is no larger than TensorRT-LLM's for a rank's share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dwdp import DwdpConfig, Group
from dwdp.engines.tensorrt_llm import forward, log, sharding, workspace
from dwdp.engines.tensorrt_llm.sharing import SharedModel
from dwdp.fabric import create_fabric

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

import moe_models
from moe_models import HIDDEN, Case
from pretend_cuda import PretendCuda, pretend_gpu
from ranks import run_ranks

pytestmark = pytest.mark.trtllm

NUM_EXPERTS, NUM_RANKS, MAX_TOKENS = 8, 2, 1024
CASE = Case("DEEPGEMM", "FP8_BLOCK_SCALES", 100, moe_models.fp8_blocks)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    lines: list[str] = []
    monkeypatch.setattr(log, "info", lines.append)
    monkeypatch.setattr(moe_models, "NUM_LAYERS", 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pretend_gpu(CASE.sm_version):
        yield lines


def share(group: Group, max_tokens: int) -> SharedModel:
    """A model of which TensorRT-LLM computes ``max_tokens`` at once, every other part on a second stream."""
    from dwdp.engines.tensorrt_llm.sharing import share_experts

    config = DwdpConfig(dwdp_size=NUM_RANKS, fetch_mode="staged")
    checkpoint = moe_models.make_checkpoint(CASE, NUM_EXPERTS)
    with sharding.resident_experts_only(sharding.placed_experts(config, group.rank)):
        model = moe_models.load_model(CASE, checkpoint, NUM_EXPERTS)
    for layer in model.layers:
        layer.moe_max_num_tokens = max_tokens
        layer.aux_stream = torch.cuda.Stream()
    return share_experts(model, group, config, create_fabric("host"))


def parts_of(layer: Any, num_tokens: int) -> list[tuple[int, int]]:
    """For each part that ``layer`` is computed in: tokens, and elements of its largest workspace."""
    parts = []

    def run_moe(x: torch.Tensor, *args: Any, workspace: dict[str, torch.Tensor], **_: Any) -> Any:
        parts.append((len(x), max(buffer.numel() for buffer in workspace.values())))
        return torch.zeros_like(x)

    layer.backend.run_moe = run_moe
    with PretendCuda():
        layer(torch.randn(num_tokens, HIDDEN).bfloat16(), torch.randn(num_tokens, NUM_EXPERTS))
    return parts


@pytest.mark.parametrize(
    ("max_tokens", "num_tokens", "allowed"),
    [(MAX_TOKENS, 1000, 512), (MAX_TOKENS, 512, 512), (300, 290, 128), (100, 90, 100)],
)
def test_parts_are_as_many_times_smaller_as_there_are_more_experts(
    max_tokens: int, num_tokens: int, allowed: int, said: list[str]
) -> None:
    def rank(group: Group) -> None:
        shared = share(group, max_tokens)
        workspace.limit(shared, is_given=False)
        (layer,) = shared.layers
        assert (layer.moe.moe_max_num_tokens, layer.moe.aux_stream) == (allowed, None)
        if group.rank == 0:  # Ranks are threads here, and buffers belong to the process.
            parts = parts_of(layer.moe, num_tokens)
            assert sum(tokens for tokens, _ in parts) == num_tokens
            assert len(parts) == -(-num_tokens // allowed)
            tiles = -(-max_tokens // 128)
            of_share = max(NUM_EXPERTS // NUM_RANKS * tiles, NUM_EXPERTS) * 128 * HIDDEN
            assert max(size for _, size in parts) <= of_share
        shared.close()

    run_ranks(NUM_RANKS, rank)
    assert {line.partition(",")[0] for line in said} == {
        f"DEEPGEMM computes at most {allowed} tokens at once"
    }


def test_without_the_limit_there_is_room_for_all_tokens_of_all_experts(said: list[str]) -> None:
    """So the test above would see a workspace that is too large."""

    def rank(group: Group) -> None:
        shared = share(group, MAX_TOKENS)
        (layer,) = shared.layers
        if group.rank == 0:
            [(num_tokens, size)] = parts_of(layer.moe, MAX_TOKENS)
            assert (num_tokens, size) == (MAX_TOKENS, NUM_EXPERTS * MAX_TOKENS * HIDDEN)
        shared.close()

    run_ranks(NUM_RANKS, rank)


def test_what_the_user_gave_is_kept(said: list[str]) -> None:
    def rank(group: Group) -> None:
        shared = share(group, MAX_TOKENS)
        workspace.limit(shared, is_given=True)
        (layer,) = shared.layers
        assert (layer.moe.moe_max_num_tokens, layer.moe.aux_stream) == (MAX_TOKENS, None)
        shared.close()

    run_ranks(NUM_RANKS, rank)
    assert set(said) == {
        f"DEEPGEMM computes at most {MAX_TOKENS} tokens at once, as moe_config.max_num_tokens says"
    }


def test_a_layer_in_parts_is_waited_for_and_released_once(said: list[str]) -> None:
    def rank(group: Group) -> None:
        shared = share(group, MAX_TOKENS)
        workspace.limit(shared, is_given=False)
        events: list[str] = []
        runtime = SimpleNamespace(
            is_staged=True,
            fetch_mode="staged",
            begin=lambda index, indices: events.append("begin"),
            end=lambda index: events.append("end"),
        )
        (layer,) = shared.layers
        layer.backend.run_moe = lambda x, *_, **__: torch.zeros_like(x)
        forward.wrap(SimpleNamespace(runtime=runtime, layers=shared.layers))  # type: ignore[arg-type]
        if group.rank == 0:
            with PretendCuda():
                layer.moe(torch.randn(1000, HIDDEN).bfloat16(), torch.randn(1000, NUM_EXPERTS))
            assert events == ["begin", "begin", "end"]
        shared.close()

    run_ranks(NUM_RANKS, rank)


def test_both_streams_of_tensorrt_llm_would_share_a_workspace(said: list[str]) -> None:
    """Why parts run one after another here: drop that where a version gives each its own."""
    from tensorrt_llm._torch.modules.fused_moe.fused_moe_deepgemm import DeepGemmFusedMoE

    with PretendCuda():
        layers = moe_models.load_model(
            CASE, moe_models.make_checkpoint(CASE, NUM_EXPERTS), NUM_EXPERTS
        ).layers
        first, second = DeepGemmFusedMoE.get_workspaces(layers[0].backend, [256, 256])
    assert {name: buffer.data_ptr() for name, buffer in first.items()} == {
        name: buffer.data_ptr() for name, buffer in second.items()
    }


def test_without_the_wrapper_it_is_said(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENABLE_CONFIGURABLE_MOE", "0")

    def rank(group: Group) -> None:
        shared = share(group, MAX_TOKENS)
        workspace.limit(shared, is_given=False)
        assert shared.layers[0].moe.moe_max_num_tokens == MAX_TOKENS
        shared.close()

    run_ranks(NUM_RANKS, rank)
    assert set(said) and all("leave ENABLE_CONFIGURABLE_MOE out" in line for line in said)
