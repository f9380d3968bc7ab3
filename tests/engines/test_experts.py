"""Expert tensors are found by structure, and what cannot be shared out is refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoints import make_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from dwdp.engines.transformers import contract
from dwdp.engines.transformers.architectures import tiny_config
from dwdp.engines.transformers.contract import IncompatibleTransformersError, internals
from dwdp.engines.transformers.experts import UnsupportedModelError, find_expert_layers


def meta_model(arch: str, **overrides: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(arch, "tiny", 128, **overrides))


def test_weights_and_biases_in_the_order_of_the_layers() -> None:
    layers = find_expert_layers(meta_model("gpt_oss"))
    assert [layer.path for layer in layers] == [f"model.layers.{i}.mlp.experts" for i in range(4)]
    first = layers[0]
    assert {tensor.name: tensor.expert_shape for tensor in first.tensors} == {
        "gate_up_proj": (64, 96),
        "gate_up_proj_bias": (96,),
        "down_proj": (48, 64),
        "down_proj_bias": (64,),
    }
    assert first.expert_bytes == 4 * (64 * 96 + 96 + 48 * 64 + 64)
    assert first.num_bytes == 10 * first.expert_bytes
    assert first.tensors[0].full_name == "model.layers.0.mlp.experts.gate_up_proj"


def test_what_does_not_count_experts_stays_dense() -> None:
    model = make_model("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    experts.scale = nn.Parameter(torch.ones(10))
    experts.shift = nn.Parameter(torch.ones(11, 3))
    experts.offset = nn.Parameter(torch.tensor(1.0))
    experts.nothing = nn.Parameter(torch.empty(10, 0))
    experts.register_buffer("table", torch.ones(10, 4))
    names = {tensor.name: tensor.expert_shape for tensor in find_expert_layers(model)[0].tensors}
    assert names == {"gate_up_proj": (96, 64), "down_proj": (64, 48), "scale": ()}


def test_planned_dtypes_are_reported() -> None:
    plan = {"layers.1.*gate_up": torch.float32}
    layers = find_expert_layers(meta_model("qwen3_moe").to(torch.bfloat16), plan)
    dtypes = [tensor.dtype for layer in layers[:2] for tensor in layer.tensors]
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16]


def test_refuses_a_dense_model() -> None:
    config = AutoConfig.for_model("llama", hidden_size=32, num_hidden_layers=1, vocab_size=64)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModelError, match="llama is a dense model"):
        find_expert_layers(model)


def test_refuses_a_moe_model_whose_layers_are_all_dense() -> None:
    model = meta_model("qwen3_moe", mlp_only_layers=[0, 1, 2, 3])
    with pytest.raises(UnsupportedModelError, match="qwen3_moe is a dense model"):
        find_expert_layers(model)


@pytest.mark.parametrize("arch", ["llama4_text", "jetmoe", "longcat_flash"])
def test_refuses_experts_outside_the_interface(arch: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"keeps its experts in .* does not use"):
        find_expert_layers(meta_model(arch))


def test_refuses_a_list_of_experts_beside_layers_that_use_the_interface() -> None:
    model = make_model("qwen3_moe")
    model.model.layers[2].mlp.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
    with pytest.raises(UnsupportedModelError, match=r"model.layers.2.mlp.experts \(ModuleList\)"):
        find_expert_layers(model)


def test_refuses_quantised_models() -> None:
    model = meta_model("qwen3_moe")
    model.config.quantization_config = {"quant_method": "mxfp4"}
    with pytest.raises(UnsupportedModelError, match="quantised with mxfp4"):
        find_expert_layers(model)


def test_refuses_experts_that_layers_share() -> None:
    model = make_model("qwen3_moe")
    first, second = (model.model.layers[i].mlp for i in range(2))
    second.experts.down_proj = first.experts.down_proj
    with pytest.raises(UnsupportedModelError, match="are the same parameter"):
        find_expert_layers(model)
    second.experts = first.experts
    with pytest.raises(UnsupportedModelError, match="are the same parameter"):
        find_expert_layers(model)


def test_refuses_tied_experts() -> None:
    model = make_model("qwen3_moe")
    names = [f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)]
    model.all_tied_weights_keys = {names[1]: names[0]}
    with pytest.raises(UnsupportedModelError, match="is tied to"):
        find_expert_layers(model)


def test_the_interface_is_still_recognised() -> None:
    """Expert classes carry what ``use_experts_implementation`` is recognised by."""
    config = tiny_config("qwen3_moe", "tiny", 128)
    experts = Qwen3MoeExperts(config)
    assert experts.has_gate and not experts.has_bias
    assert not experts.is_transposed and experts.is_concatenated


@pytest.mark.parametrize(
    ("symbol", "message"),
    [
        (("transformers.core_model_loading", "rename_keys", ()), "rename_keys is gone"),
        (("transformers.no_such_module", "a", ()), "no_such_module.a is gone"),
        (
            ("transformers.core_model_loading", "Chunk", ("dim", "axis")),
            "Chunk no longer takes axis",
        ),
    ],
)
def test_names_what_moved_in_transformers(
    symbol: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contract, "_SYMBOLS", (*contract._SYMBOLS, symbol))
    internals.cache_clear()
    with pytest.raises(IncompatibleTransformersError, match=message):
        internals()


def test_names_the_version_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "5.9.1")
    internals.cache_clear()
    with pytest.raises(IncompatibleTransformersError, match=r"5\.9\.1 is too old.*>= 5\.17"):
        internals()
