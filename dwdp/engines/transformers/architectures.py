"""Small configurations of MoE architectures, for random-weight checkpoints of any of them."""

from __future__ import annotations

from typing import Any, Literal, get_args

from transformers import AutoConfig, PreTrainedConfig

Preset = Literal["tiny", "small"]

ARCHITECTURES: tuple[str, ...] = (
    "afmoe",
    "axk1",
    "axk2",
    "cohere2_moe",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v4",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "gpt_oss",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "hy_v3",
    "hy_v4",
    "jamba",
    "kimi_linear",
    "laguna",
    "lfm2_moe",
    "mellum",
    "mimo_v2_flash",
    "minimax",
    "minimax_m2",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "solar_open",
    "zaya",
)
"""Model types that :func:`tiny_config` is known to give a working model for."""

# A preset names one size per quantity; _FIELDS says under which configuration fields architectures
# spell it. Only fields that an architecture's own configuration has are set.
_SIZES: dict[Preset, dict[str, int]] = {
    "tiny": {
        "num_layers": 4,
        "num_dense_layers": 1,
        "hidden": 64,
        "dense_intermediate": 128,
        "moe_intermediate": 48,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "lora_rank": 16,
        "num_experts": 10,
        "top_k": 2,
        "max_positions": 512,
        "window": 32,
    },
    "small": {
        "num_layers": 6,
        "num_dense_layers": 1,
        "hidden": 256,
        "dense_intermediate": 768,
        "moe_intermediate": 192,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 32,
        "lora_rank": 64,
        "num_experts": 32,
        "top_k": 4,
        "max_positions": 4096,
        "window": 128,
    },
}

_FIELDS: dict[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers",),
    "num_dense_layers": ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"),
    "hidden": ("hidden_size",),
    "dense_intermediate": ("intermediate_size",),
    "moe_intermediate": (
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "shared_intermediate_size",
    ),
    "num_heads": ("num_attention_heads",),
    "num_kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"),
    "lora_rank": ("q_lora_rank", "kv_lora_rank"),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"),
    "max_positions": ("max_position_embeddings",),
    "window": ("sliding_window",),
}

# Fields whose defaults do not fit the sizes above. Patterns over layers are repeated to the depth.
_GROUPED_ROUTING = {"n_group": 2, "topk_group": 1}
_LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "axk1": _GROUPED_ROUTING,
    "deepseek_v3": _GROUPED_ROUTING,
    "deepseek_v32": _GROUPED_ROUTING,
    "dots1": {"n_shared_experts": 1},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_n_groups": 2,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 16,
    },
    "qwen3_5_moe_text": _LINEAR_ATTENTION,
    "qwen3_next": _LINEAR_ATTENTION,
    "zaya": {"num_experts_per_tok": 1},
}
_LAYER_PATTERNS = ("layer_types", "layers_block_type")
_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tiny_config(arch: str, preset: Preset, vocab_size: int, **overrides: Any) -> PreTrainedConfig:
    """The configuration of a small model of architecture ``arch``.

    Args:
        arch: a Transformers model type; those in :data:`ARCHITECTURES` are known to work.
        preset: ``"tiny"`` (0.2 to 3 million parameters) or ``"small"`` (about 20 to 60 million).
        vocab_size: tokens of the vocabulary. Ids 0, 1 and 2 are padding, start and end.
        overrides: what replaces the preset's: configuration fields, or sizes such as ``num_experts``
            (a key of ``_FIELDS``), which set the field that ``arch`` has for them.

    Raises:
        ValueError: Transformers does not know ``arch``, or ``preset`` is neither of the two.
    """
    if preset not in get_args(Preset):
        raise ValueError(f"preset is {preset!r}: use one of {', '.join(get_args(Preset))}")
    default = AutoConfig.for_model(arch)
    sizes = _SIZES[preset] | {size: overrides.pop(size) for size in _FIELDS if size in overrides}
    fields: dict[str, Any] = {
        field: sizes[size]
        for size, names in _FIELDS.items()
        for field in names
        if hasattr(default, field) and field not in default.attribute_map
    }
    if "intermediate_size" in fields and "moe_intermediate_size" not in fields:
        fields["intermediate_size"] = sizes["moe_intermediate"]
    if "kv_lora_rank" in fields:
        # Latent attention has as many key and value heads as query heads.
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    fields |= _EXCEPTIONS.get(arch, {}) | _SPECIAL_TOKENS | {"vocab_size": vocab_size} | overrides
    for name in _LAYER_PATTERNS:
        pattern = fields.get(name)
        if pattern is not None and name not in overrides:
            depth = int(fields.get("num_hidden_layers") or sizes["num_layers"])
            fields[name] = [pattern[layer % len(pattern)] for layer in range(depth)]
    return type(default)(**fields)
