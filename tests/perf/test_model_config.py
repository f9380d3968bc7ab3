"""Models read from the configurations of every MoE family that Transformers has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dwdp.perf.model_config import load_model, model_names, parse_config

QWEN = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "vocab_size": 100,
}


def test_deepseek_r1_is_what_its_authors_say() -> None:
    model = load_model("deepseek-r1-nvfp4")
    assert len(model.layers) == 61 and len(model.moe_layers) == 58
    assert (model.moe.num_experts, model.moe.top_k) == (256, 8)
    mixer = model.layers[0].mixer
    assert mixer is not None and mixer.kind == "mla" and mixer.kv_cache_elements == 576
    assert model.expert_bytes(model.moe) == 24_772_608
    assert model.layer_bytes(model.moe) == pytest.approx(6.342e9, rel=1e-3)
    assert model.formats.attention == "bf16" and model.formats.o_proj == "nvfp4"
    assert model.kv_cache_bytes == 1
    # 671 billion parameters, of which 653.9 billion are routed experts in one byte each.
    fp8 = load_model("deepseek-r1")
    assert fp8.all_expert_bytes == pytest.approx(653.9e9, rel=1e-3)
    embeddings = 2 * 129_280 * 7168
    total = fp8.all_expert_bytes + fp8.dense_bytes - embeddings
    assert total == pytest.approx(671e9, rel=5e-3)


def test_qwen3_235b_is_what_its_authors_say() -> None:
    model = load_model("qwen3-235b-a22b")
    assert (model.all_expert_bytes + model.dense_bytes) / 2 == pytest.approx(235e9, rel=5e-3)


@pytest.mark.parametrize(
    ("model_type", "billions"), [("longcat_flash", 560), ("llama4", 108), ("gpt_oss", 117)]
)
def test_families_of_unusual_structure_have_their_published_size(
    model_type: str, billions: float
) -> None:
    transformers = pytest.importorskip("transformers")
    model = parse_config(transformers.AutoConfig.for_model(model_type).to_dict())
    assert (model.all_expert_bytes + model.dense_bytes) / 2e9 == pytest.approx(billions, rel=0.02)


@pytest.mark.parametrize("name", model_names())
def test_packaged_configurations_load_by_name(name: str) -> None:
    assert load_model(name).name == name


APPROXIMATED = {
    "deepseek_v4": "a compressed cache and grouped output projections",
    "hy_v4": "layers that share one indexer",
    "kimi_linear": "low-rank gates, small only beside a hidden size that is not tiny",
    "zaya": "convolutions in attention and a router of several layers",
}
"""Families of which only the experts are read exactly, and what the rest leaves out."""


def _architectures() -> list[str]:
    architectures = pytest.importorskip("dwdp.engines.transformers.architectures")
    return list(architectures.ARCHITECTURES)


@pytest.mark.parametrize("arch", _architectures())
def test_every_family_is_read_as_its_model_is_built(arch: str) -> None:
    """The number of parameters of the real modules, built without memory, is the yardstick."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from dwdp.engines.transformers.architectures import tiny_config

    config = tiny_config(arch, "tiny", vocab_size=16)
    model = parse_config(config.to_dict(), arch)
    with torch.device("meta"):
        real = transformers.AutoModelForCausalLM.from_config(config)
    expert_weights, expert_layers = 0, set()
    for name, parameter in real.named_parameters():
        if parameter.dim() == 3 and parameter.shape[0] == model.moe.num_experts:
            expert_weights += parameter.numel()
            expert_layers.add(next(int(part) for part in name.split(".") if part.isdigit()))
    assert len(model.moe_layers) == len(expert_layers)
    ours = sum(
        layer.moe.num_experts
        * layer.moe.num_matrices
        * model.hidden_size
        * layer.moe.intermediate_size
        for layer in model.moe_layers
        if layer.moe
    )
    assert ours == expert_weights
    if arch in APPROXIMATED:
        return
    rest = sum(parameter.numel() for parameter in real.parameters()) - expert_weights
    bytes_per_weight = 4 if model.formats.attention == "fp32" else 2
    assert model.dense_bytes / bytes_per_weight == pytest.approx(rest, rel=0.2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_experts": None}, "n_routed_experts"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"mlp_only_layers": [0, 1, 2, 3]}, "mlp_only_layers: none of the 4 layers has experts"),
        ({"mlp_only_layers": 2}, "mlp_only_layers: 2 is not a list"),
        ({"layer_types": 1}, "layer_types: 1 is not a list"),
        ({"num_experts": "many"}, "^[^ ]*: num_experts: 'many' is not a whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000 is more than 10000"),
        ({"vocab_size": None}, "vocab_size: missing"),
        (
            {"mlp_only_layers": [1], "moe_intermediate_size": None, "intermediate_size": 64},
            "moe_intermediate_size: missing",
        ),
        ({"quantization_config": [1]}, "quantization_config: \\[1\\] is not a JSON object"),
        (
            {"quantization_config": {"quant_method": "fp8", "ignore": 1}},
            "quantization_config.ignore: 1 is not a list",
        ),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "X9"}}, "quant_algo"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "quant_method"),
        (
            {"quantization_config": {"quant_method": "fp8", "ignore": ["re:("]}},
            "quantization_config.ignore: 're:\\('",
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "kv_cache_scheme": {"num_bits": 0}}},
            "kv_cache_scheme.num_bits: 0",
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"g": []},
                }
            },
            "config_groups",
        ),
    ],
)
def test_a_wrong_configuration_is_one_line_with_the_key(
    change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    config = {key: value for key, value in {**QWEN, **change}.items() if value is not None}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=named) as raised:
        load_model(tmp_path)
    assert "config.json" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="deepseek-r1"):
        load_model("no-such-model")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not a JSON file"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("quantization", "routed", "attention"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", "fp8"),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, "mxfp4", "bf16"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "int4", "int4"),
        ({"quant_method": "awq", "bits": 4}, "int4", "int4"),
        ({"quant_algo": "NVFP4", "exclude_modules": ["*self_attn*", "lm_head"]}, "nvfp4", "bf16"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
                "ignore": ["re:.*self_attn.*"],
            },
            "fp8",
            "bf16",
        ),
    ],
)
def test_quantised_checkpoints(quantization: dict[str, Any], routed: str, attention: str) -> None:
    model = parse_config({**QWEN, "quantization_config": quantization})
    assert (model.formats.routed, model.formats.attention) == (routed, attention)
    assert model.formats.lm_head == "bf16"


def test_modelopts_own_file_beside_the_configuration_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    quantization = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(quantization))
    model = load_model(tmp_path)
    assert model.formats.routed == "nvfp4" and model.kv_cache_bytes == 1


@pytest.mark.parametrize(
    ("fields", "sparse"),
    [
        ({}, [0, 1, 2, 3]),
        ({"first_k_dense_replace": 1}, [1, 2, 3]),
        ({"decoder_sparse_step": 2}, [1, 3]),
        ({"mlp_only_layers": [2]}, [0, 1, 3]),
        ({"mlp_layer_types": ["dense", "sparse", "sparse", "dense"]}, [1, 2]),
        ({"moe_layer_freq": [0, 1, 0, 1]}, [1, 3]),
        ({"moe_layer_freq": 2}, [0, 2]),
        ({"expert_layer_period": 2, "expert_layer_offset": 1}, [1, 3]),
        ({"moe_layers": [0, 3]}, [0, 3]),
    ],
)
def test_which_layers_have_experts(fields: dict[str, Any], sparse: list[int]) -> None:
    model = parse_config({**QWEN, **fields})
    assert [i for i, layer in enumerate(model.layers) if layer.moe] == sparse
    dense = [layer for layer in model.layers if not layer.moe]
    assert all(layer.dense_intermediate_size == 256 for layer in dense)


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"sliding_window": 8}, [8, 8, 8, 8]),
        ({"sliding_window": 8, "use_sliding_window": False}, [None] * 4),
        (
            {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8},
            [8, None] * 2,
        ),
        ({"index_topk": 32}, [32] * 4),
        ({}, [None] * 4),
    ],
)
def test_which_layers_see_a_window(fields: dict[str, Any], windows: list[int | None]) -> None:
    model = parse_config({**QWEN, **fields})
    assert [layer.mixer.window for layer in model.layers if layer.mixer] == windows
