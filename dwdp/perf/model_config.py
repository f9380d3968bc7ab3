"""From a Hugging Face ``config.json`` to a :class:`Model`, by structure: no list of architectures.

A quantity is looked for under every name that Transformers' MoE families give it. What decides is the
structure: a ``kv_lora_rank`` makes attention MLA, ``layer_types`` says which layers slide, and so on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dwdp.perf.hardware import DATA_DIR
from dwdp.perf.model import Layer, Mixer, Model, Moe
from dwdp.perf.quantization import formats_of, kv_cache_bytes_of

Config = Mapping[str, Any]

_NUM_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
    "num_experts_per_topk",
)
_EXPERT_WIDTH = (
    "moe_intermediate_size",
    "expert_ffn_hidden_size",
    "moe_ffn_hidden_size",
    "ffn_hidden_size",
    "intermediate_size",
)
_DENSE_WIDTH = (
    "dense_intermediate_size",
    "intermediate_size_mlp",
    "intermediate_size",
    "ffn_hidden_size",
)
_SHARED_WIDTH = (
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "share_expert_dim",
    "shared_intermediate_size",
)
_NUM_SHARED = (
    "n_shared_experts",
    "num_shared_experts",
    "moe_num_shared_experts",
    "num_shared_expert",
)
_NUM_LAYERS = ("num_hidden_layers", "n_layers", "num_layers")
_HIDDEN = ("hidden_size", "d_model")
_HEADS = ("num_attention_heads", "n_heads")
_KV_HEADS = ("num_key_value_heads", "kv_n_heads", "num_kv_heads")
_SPARSITY_KEYS = (
    "mlp_layer_types",
    "layers_block_type",
    "layer_types",
    "hybrid_override_pattern",
    "moe_layers",
    "moe_layer_freq",
    "expert_layer_period",
    "decoder_sparse_step",
    "interleave_moe_layer_step",
    "moe_layer_interval",
    "first_k_dense_replace",
    "num_dense_layers",
    "moe_layer_start_index",
    "moe_layer_end_index",
    "mlp_only_layers",
)
"""What says which layers have experts."""
_TWO_WIDTHS_KEYS = ("first_k_dense_replace", "decoder_sparse_step", "mlp_only_layers")
"""Families that have these give experts a width of their own: it cannot be the dense layers'."""
_MAX_LAYERS = 10_000
_LINEAR_TYPES = ("linear", "mamba", "conv", "recurrent", "mixer_ssm")


def model_names() -> tuple[str, ...]:
    """The configurations that come with the package."""
    return tuple(sorted(path.stem for path in (DATA_DIR / "models").glob("*.json")))


def load_model(name_or_path: str | Path) -> Model:
    """A model by packaged name, ``config.json`` or checkpoint directory.

    Beside a ``config.json``, a ``hf_quant_config.json`` (ModelOpt) is read where there is one.

    Raises:
        ValueError: no such model, not JSON, or a key is missing or out of range; one line with the key.
    """
    text = str(name_or_path)
    path = Path(name_or_path)
    if text.lower() in model_names() and not path.exists():
        path = DATA_DIR / "models" / f"{text.lower()}.json"
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise ValueError(
            f"model {text!r} is neither a config.json, a directory with one, nor one of "
            f"{', '.join(model_names())}."
        )
    config = _read_json(path)
    quantization = path.with_name("hf_quant_config.json")
    if quantization.is_file() and "quantization_config" not in config:
        config = {**config, "quantization_config": _read_json(quantization).get("quantization", {})}
    packaged = path.parent == DATA_DIR / "models"
    name = path.stem if packaged or path.name != "config.json" else path.resolve().parent.name
    try:
        return parse_config(config, name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_config(config: Config, name: str = "") -> Model:
    """The :class:`Model` that the fields of a ``config.json`` describe.

    Raises:
        ValueError: a key is missing or has a value that makes no sense; the text names it.
    """
    text = _text_config(config)
    fields = _Fields(text)
    num_layers = _num_layers(fields)
    moe = _moe(fields)
    sparse = _sparse_layers(fields, num_layers)
    mixers = _mixers(fields, num_layers)
    quantization = config.get("quantization_config") or text.get("quantization_config") or {}
    if not isinstance(quantization, Mapping):
        raise ValueError(f"quantization_config: {quantization!r} is not a JSON object.")
    dense_width = fields.integer(_DENSE_WIDTH, default=0)
    dense_matrices = 2 if fields.get(("model_type",)) == "nemotron_h" else 3
    layers = tuple(
        Layer(mixer, moe)
        if is_sparse
        else Layer(mixer, None, dense_width if has_mlp else 0, dense_matrices)
        for mixer, is_sparse, has_mlp in zip(
            mixers, sparse, _layers_with_mlp(fields, num_layers), strict=True
        )
    )
    if not any(sparse):
        keys = [key for key in _SPARSITY_KEYS if fields.get((key,)) is not None]
        raise ValueError(
            f"{', '.join(keys or _NUM_LAYERS[:1])}: none of the {num_layers} layers has experts, so DWDP "
            "has nothing to distribute."
        )
    index = sparse.index(True)
    dense_index = sparse.index(False) if False in sparse else index
    return Model(
        name=name or str(fields.get(("model_type",)) or "model"),
        hidden_size=fields.integer(_HIDDEN),
        vocab_size=fields.integer(("vocab_size",), at_least=1),
        layers=layers,
        formats=formats_of(quantization, _dtype(config, text), index, dense_index),
        kv_cache_bytes=kv_cache_bytes_of(quantization),
        notes=_notes(fields, mixers),
    )


class _Fields:
    """Looks quantities up under several names, and complains about the first by name."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._nested = [
            config[key]
            for key in ("ffn_config", "attn_config", "linear_attn_config")
            if isinstance(config.get(key), Mapping)
        ]

    def get(self, names: Sequence[str]) -> Any:
        """The first value that is there and not None, in the configuration or one level below."""
        return self._find(names)[1]

    def _find(self, names: Sequence[str]) -> tuple[str, Any]:
        for source in (self._config, *self._nested):
            for name in names:
                if source.get(name) is not None:
                    return name, source[name]
        return names[0], None

    def entries(self, names: Sequence[str]) -> list[Any] | None:
        """A list; None if there is none.

        Raises:
            ValueError: something else is there.
        """
        key, value = self._find(names)
        if value is not None and not isinstance(value, list):
            raise ValueError(f"{key}: {value!r} is not a list.")
        return value

    def integer(
        self,
        names: Sequence[str],
        default: int | None = None,
        at_least: int = 0,
        at_most: int | None = None,
    ) -> int:
        """A count; of a list (one per layer or modality) the largest.

        Raises:
            ValueError: it is missing and has no default, or is not a whole number in the range.
        """
        key, value = self._find(names)
        if isinstance(value, list) and value:
            value = max(value, key=lambda item: item if isinstance(item, int) else -1)
        if value is None:
            if default is None:
                raise ValueError(
                    f"{names[0]}: missing (also known as {', '.join(names[1:])})."
                    if len(names) > 1
                    else f"{names[0]}: missing."
                )
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
            raise ValueError(f"{key}: {value!r} is not a whole number of at least {at_least}.")
        if at_most is not None and value > at_most:
            raise ValueError(f"{key}: {value} is more than {at_most}.")
        return value


def _text_config(config: Config) -> Config:
    """The part that describes the language model."""
    for key in ("text_config", "thinker_config", "language_config", "llm_config"):
        if isinstance(config.get(key), Mapping):
            return _text_config(config[key])
    return config


def _num_layers(fields: _Fields) -> int:
    listed = fields.get(("layers_block_type", "layer_types"))
    default = len(listed) if isinstance(listed, list) else None
    return fields.integer(_NUM_LAYERS, default=default, at_least=1, at_most=_MAX_LAYERS)


def _moe(fields: _Fields) -> Moe:
    num_experts = fields.integer(_NUM_EXPERTS, at_least=1)
    top_k = fields.integer(_TOP_K, at_least=1)
    if top_k > num_experts:
        raise ValueError(f"num_experts_per_tok: {top_k} of {num_experts} experts.")
    # DBRX says intermediate sizes in ffn_config only, Granite and Mixtral have one size for all.
    has_two_widths = any(fields.get((key,)) for key in _TWO_WIDTHS_KEYS)
    width = fields.integer(_EXPERT_WIDTH[: 3 if has_two_widths else None], at_least=1)
    shared = fields.integer(_SHARED_WIDTH, default=0)
    if not shared:
        shared = width * fields.integer(_NUM_SHARED, default=0)
    if fields.get(("model_type",)) in ("llama4", "llama4_text", "hunyuan_v1_moe"):
        shared = width  # One shared expert, and no field for it.
    zero_experts = fields.integer(("zero_expert_num",), default=0)
    if zero_experts:
        # LongCat: some of the choices cost nothing, and a dense MLP runs beside the experts.
        top_k = max(1, round(top_k * num_experts / (num_experts + zero_experts)))
        shared = fields.integer(("ffn_hidden_size",), at_least=1)
    num_matrices = 2 if fields.get(("model_type",)) == "nemotron_h" else 3
    return Moe(num_experts, top_k, width, shared, num_matrices)


def _sparse_layers(fields: _Fields, num_layers: int) -> list[bool]:
    """Which layers have experts."""
    types = fields.entries(("mlp_layer_types",))
    if types is not None:
        return [kind != "dense" for kind in _of_length(types, num_layers, "mlp_layer_types")]
    blocks = _block_types(fields, num_layers)
    if blocks is not None and "moe" in blocks:
        return [kind == "moe" for kind in blocks]
    listed = fields.entries(("moe_layers",))
    if listed is not None:
        return [index in listed for index in range(num_layers)]
    frequency = fields.get(("moe_layer_freq",))
    if isinstance(frequency, list):
        return [bool(flag) for flag in _of_length(frequency, num_layers, "moe_layer_freq")]
    period = fields.integer(("expert_layer_period",), default=0)
    if period:
        offset = fields.integer(("expert_layer_offset",), default=0)
        return [index % period == offset for index in range(num_layers)]
    if fields.get(("zero_expert_num",)):  # LongCat: experts in every second of its sub-layers
        return [index % 2 == 1 for index in range(num_layers)]
    step = fields.integer(
        ("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval"), default=0
    )
    first = fields.integer(
        ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), default=0
    )
    last = fields.integer(("moe_layer_end_index",), default=num_layers - 1)
    dense = fields.entries(("mlp_only_layers",)) or []
    step = step or (frequency if isinstance(frequency, int) else 1) or 1
    aligned = fields.get(("moe_layer_freq",)) is not None
    return [
        first <= index <= last
        and index not in dense
        and (index % step == 0 if aligned else (index + 1) % step == 0)
        for index in range(num_layers)
    ]


def _layers_with_mlp(fields: _Fields, num_layers: int) -> list[bool]:
    """Which layers have a dense MLP where they have no experts: all, unless blocks are listed singly."""
    blocks = _block_types(fields, num_layers)
    if blocks is None or "moe" not in blocks:
        return [True] * num_layers
    return [kind == "mlp" for kind in blocks]


def _block_types(fields: _Fields, num_layers: int) -> list[str] | None:
    types = fields.get(("layers_block_type",))
    if not isinstance(types, list) and _has_moe_in_types(fields):
        types = fields.get(("layer_types",))
    if isinstance(types, list):
        return [str(kind) for kind in _of_length(types, num_layers, "layers_block_type")]
    pattern = fields.get(("hybrid_override_pattern",))
    if isinstance(pattern, str):
        letters = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
        kinds = [letters.get(letter, "mlp") for letter in pattern]
        return [str(kind) for kind in _of_length(kinds, num_layers, "hybrid_override_pattern")]
    return None


def _has_moe_in_types(fields: _Fields) -> bool:
    types = fields.get(("layer_types",))
    return isinstance(types, list) and "moe" in types


def _of_length(values: list[Any], num_layers: int, key: str) -> list[Any]:
    if len(values) != num_layers:
        raise ValueError(f"{key}: {len(values)} entries for {num_layers} layers.")
    return values


def _mixers(fields: _Fields, num_layers: int) -> list[Mixer | None]:
    full = _attention(fields)
    window = fields.integer(("sliding_window", "attention_chunk_size"), default=0)
    if fields.get(("use_sliding_window",)) is False:
        window = 0
    sliding = _with_window(full, window)
    sparse = _with_window(full, fields.integer(("index_topk",), default=0))
    linear = _linear(fields)
    types = fields.entries(("layer_types", "layers_block_type"))
    if types is None:
        types = _block_types(fields, num_layers)
    if types is None:
        types = _periodic_types(fields, num_layers, has_window=bool(window))
    mixers: list[Mixer | None] = []
    for kind in map(str, _of_length(types, num_layers, "layer_types")):
        if kind in ("moe", "mlp"):
            mixers.append(None)
        elif any(word in kind for word in _LINEAR_TYPES):
            mixers.append(linear)
        elif "sliding" in kind or "chunked" in kind:
            mixers.append(sliding)
        elif "sparse" in kind or "compressed" in kind:
            mixers.append(sparse)
        else:
            mixers.append(full)
    return mixers


def _periodic_types(fields: _Fields, num_layers: int, has_window: bool) -> list[str]:
    """Layer types of configurations that give a period instead of a list."""
    period = fields.integer(("attn_layer_period", "full_attention_interval"), default=0)
    if period:
        offset = fields.integer(("attn_layer_offset",), default=period - 1)
        return [
            "attention" if index % period == offset % period else "linear"
            for index in range(num_layers)
        ]
    full_from = fields.integer(("max_window_layers",), default=num_layers) if has_window else 0
    pattern = fields.integer(("global_attn_every_n_layers", "sliding_window_pattern"), default=0)
    if pattern and has_window:
        return ["attention" if (i + 1) % pattern == 0 else "sliding" for i in range(num_layers)]
    if fields.get(("max_window_layers",)) is not None:
        # Qwen counts the other way round: layers from max_window_layers on slide.
        return ["attention" if i < full_from else "sliding" for i in range(num_layers)]
    kind = "sliding" if has_window else "sparse" if fields.get(("index_topk",)) else "attention"
    return [kind] * num_layers


def _attention(fields: _Fields) -> Mixer:
    heads = fields.integer(_HEADS, at_least=1)
    hidden = fields.integer(_HIDDEN, at_least=1)
    kv_lora = fields.integer(("kv_lora_rank",), default=0)
    indexer_heads = fields.integer(("index_n_heads",), default=0)
    indexer_dim = fields.integer(("index_head_dim",), default=0)
    if kv_lora:
        nope = fields.integer(("qk_nope_head_dim",), at_least=1)
        rope = fields.integer(("qk_rope_head_dim",), default=0)
        return Mixer(
            "mla",
            heads,
            heads,
            qk_head_dim=nope + rope,
            v_head_dim=fields.integer(("v_head_dim",), at_least=1),
            q_lora_rank=fields.integer(("q_lora_rank",), default=0),
            kv_lora_rank=kv_lora,
            rope_head_dim=rope,
            indexer_heads=indexer_heads,
            indexer_head_dim=indexer_dim,
        )
    head_dim = fields.integer(("head_dim", "kv_channels"), default=0) or hidden // heads
    return Mixer(
        "gqa",
        heads,
        fields.integer(_KV_HEADS, default=heads, at_least=1),
        qk_head_dim=head_dim,
        v_head_dim=fields.integer(("v_head_dim",), default=head_dim) or head_dim,
        q_lora_rank=fields.integer(("q_lora_rank",), default=0),
        indexer_heads=indexer_heads,
        indexer_head_dim=indexer_dim,
    )


def _with_window(full: Mixer, window: int) -> Mixer:
    return replace(full, window=window) if window else full


def _linear(fields: _Fields) -> Mixer:
    """A mixer whose cost per token does not grow with the context.

    Its core updates and reads a state of ``qk_head_dim x v_head_dim`` per head; gates, convolutions
    and discretisation are small beside the projections and are left out.
    """
    hidden = fields.integer(_HIDDEN, at_least=1)
    if fields.integer(("conv_L_cache",), default=0):  # LFM2: gated short convolution
        return Mixer("linear", 1, 1, 1, hidden, linear_weights=4 * hidden * hidden)
    heads = fields.integer(
        (
            "linear_num_value_heads",
            "linear_num_heads",
            "mamba_n_heads",
            "mamba_num_heads",
            "num_heads",
        ),
        default=0,
    )
    expand = fields.integer(("mamba_expand",), default=0)
    if not heads and expand:  # Mamba 1: one state per channel
        inner = expand * hidden
        state = fields.integer(("mamba_d_state",), default=16)
        return Mixer("linear", inner, inner, state, 1, linear_weights=3 * hidden * inner)
    heads = heads or fields.integer(_HEADS, at_least=1)
    value_dim = fields.integer(
        ("linear_value_head_dim", "linear_head_dim", "mamba_d_head", "mamba_head_dim", "head_dim"),
        default=0,
    ) or max(1, hidden // heads)
    key_dim = fields.integer(
        ("linear_key_head_dim", "linear_head_dim", "mamba_d_state", "ssm_state_size"),
        default=value_dim,
    )
    key_heads = fields.integer(("linear_num_key_heads",), default=heads)
    inner = heads * value_dim
    # Values, gate and output are as wide as the values; queries and keys as wide as the keys.
    weights = hidden * (3 * inner + 2 * key_heads * key_dim)
    return Mixer("linear", heads, key_heads, key_dim, value_dim, linear_weights=weights)


def _notes(fields: _Fields, mixers: Sequence[Mixer | None]) -> tuple[str, ...]:
    notes = []
    if any(mixer is not None and mixer.kind == "linear" for mixer in mixers):
        notes.append("Layers with a fixed-size state are costed by projections and state updates.")
    types = fields.get(("layer_types",)) or ()
    if any("compressed" in str(kind) for kind in types):
        notes.append("Attention over a compressed cache is costed as attention to index_topk keys.")
    return tuple(notes)


def _dtype(config: Config, text: Config) -> str:
    for source in (text, config):
        for key in ("dtype", "torch_dtype"):
            if source.get(key):
                return str(source[key]).removeprefix("torch.")
    return "bfloat16"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also numbers and nesting beyond Python's limits
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object.")
    return content
