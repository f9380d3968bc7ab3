"""Models as shapes: what each layer holds and computes, independent of any framework.

``dwdp/perf/model_config.py`` makes these from a Hugging Face ``config.json``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from dwdp.perf.hardware import Datatype

WeightFormat = Literal["fp32", "bf16", "fp8", "int8", "nvfp4", "mxfp4", "int4"]

BITS_PER_WEIGHT: dict[WeightFormat, float] = {
    "fp32": 32.0,
    "bf16": 16.0,
    "fp8": 8.0,
    "int8": 8.0,
    "nvfp4": 4.5,  # one 8-bit scale per 16 weights
    "mxfp4": 4.25,  # one 8-bit scale per 32 weights
    "int4": 4.125,  # one 16-bit scale per 128 weights
}
"""Bits that a weight takes, scales included (per-channel and per-tensor scales are left out)."""

COMPUTE_DATATYPE: dict[WeightFormat, Datatype] = {
    "fp32": "fp32",
    "bf16": "bf16",
    "fp8": "fp8",
    "int8": "fp8",
    "nvfp4": "fp4",
    "mxfp4": "fp4",
    "int4": "bf16",  # weight-only: dequantised before the product
}
"""What a matrix product with such weights is computed in, where the hardware can."""

ACTIVATION_BYTES: dict[Datatype, float] = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "fp4": 0.5625}
"""Bytes of one activation that enters a product in this datatype, scales included."""


@dataclass(frozen=True)
class Mixer:
    """How a layer mixes tokens.

    Attributes:
        kind: ``mla`` (a compressed KV cache), ``gqa`` (grouped heads; multi-head is the case of equal
            counts) or ``linear`` (a state of fixed size: linear attention, Mamba, short convolution).
        num_heads, num_kv_heads: attention heads.
        qk_head_dim, v_head_dim: widths per head; for MLA, ``qk_head_dim`` includes the rotary part.
        q_lora_rank, kv_lora_rank, rope_head_dim: MLA only; ``q_lora_rank`` 0 means uncompressed queries.
        window: keys that a token attends to at most (sliding window, or top-k of an indexer); None: all.
        linear_weights: weights of a ``linear`` mixer's projections.
        indexer_heads, indexer_head_dim: of the indexer that chooses which keys to attend to; 0: none.
    """

    kind: Literal["mla", "gqa", "linear"]
    num_heads: int
    num_kv_heads: int
    qk_head_dim: int
    v_head_dim: int
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    rope_head_dim: int = 0
    window: int | None = None
    linear_weights: int = 0
    indexer_heads: int = 0
    indexer_head_dim: int = 0

    def projections(self, hidden_size: int) -> dict[str, tuple[int, int]]:
        """Matrix products around the core as ``name -> (inputs, outputs)``; ``o_proj`` is the last."""
        if self.kind == "linear":
            inner = self.num_heads * self.v_head_dim
            rest = max(0, self.linear_weights - inner * hidden_size)
            return {
                "in_proj": (hidden_size, -(-rest // hidden_size)),
                "o_proj": (inner, hidden_size),
            }
        queries = self.num_heads * self.qk_head_dim
        values = self.num_heads * self.v_head_dim
        if self.kind == "mla":
            products = {
                "kv_a_proj": (hidden_size, self.kv_lora_rank + self.rope_head_dim),
                "kv_b_proj": (
                    self.kv_lora_rank,
                    self.num_heads * (self.qk_head_dim - self.rope_head_dim) + values,
                ),
            }
        else:
            products = {
                "k_proj": (hidden_size, self.num_kv_heads * self.qk_head_dim),
                "v_proj": (hidden_size, self.num_kv_heads * self.v_head_dim),
            }
        if self.q_lora_rank:
            products["q_a_proj"] = (hidden_size, self.q_lora_rank)
            products["q_b_proj"] = (self.q_lora_rank, queries)
        else:
            products["q_proj"] = (hidden_size, queries)
        if self.indexer_heads:
            from_queries = self.q_lora_rank or hidden_size
            products["indexer_q"] = (from_queries, self.indexer_heads * self.indexer_head_dim)
            products["indexer_k"] = (hidden_size, self.indexer_head_dim + self.indexer_heads)
        products["o_proj"] = (values, hidden_size)
        return products

    @property
    def kv_cache_elements(self) -> int:
        """Elements that one token leaves in the KV cache."""
        if self.kind == "mla":
            return self.kv_lora_rank + self.rope_head_dim
        if self.kind == "gqa":
            return self.num_kv_heads * (self.qk_head_dim + self.v_head_dim)
        return 0


@dataclass(frozen=True)
class Moe:
    """The expert part of a layer.

    Attributes:
        num_experts, top_k: routed experts, and how many of them a token activates.
        intermediate_size: width of one routed expert.
        shared_intermediate_size: width of what every token passes; 0: none.
        num_matrices: 3 with a gate (SwiGLU), else 2.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_intermediate_size: int = 0
    num_matrices: int = 3


@dataclass(frozen=True)
class Layer:
    """One transformer layer: a mixer (None: none), then experts, a dense MLP, both or neither."""

    mixer: Mixer | None
    moe: Moe | None = None
    dense_intermediate_size: int = 0
    num_dense_matrices: int = 3


@dataclass(frozen=True)
class Formats:
    """In what each kind of weight is stored. ``o_proj`` may differ from the other projections."""

    attention: WeightFormat = "bf16"
    o_proj: WeightFormat = "bf16"
    shared: WeightFormat = "bf16"
    dense: WeightFormat = "bf16"
    routed: WeightFormat = "bf16"
    lm_head: WeightFormat = "bf16"


@dataclass(frozen=True)
class Model:
    """A model as the performance model sees it.

    Attributes:
        name: for people.
        hidden_size, vocab_size: as in the configuration.
        layers: every layer, in order.
        formats: of weights.
        kv_cache_bytes: of one KV-cache element.
        notes: what the configuration does not say and was approximated.
    """

    name: str
    hidden_size: int
    vocab_size: int
    layers: tuple[Layer, ...]
    formats: Formats = Formats()
    kv_cache_bytes: float = 2.0
    notes: tuple[str, ...] = ()

    @cached_property
    def layer_counts(self) -> Counter[Layer]:
        """Distinct layers and how often each occurs."""
        return Counter(self.layers)

    @property
    def moe_layers(self) -> tuple[Layer, ...]:
        """The layers with experts, in order."""
        return tuple(layer for layer in self.layers if layer.moe)

    @property
    def moe(self) -> Moe:
        """The expert part of the layer with the most expert bytes."""
        return max(
            (layer.moe for layer in self.layers if layer.moe), key=lambda moe: self.layer_bytes(moe)
        )

    def expert_bytes(self, moe: Moe) -> int:
        """Bytes of one routed expert."""
        weights = moe.num_matrices * self.hidden_size * moe.intermediate_size
        return round(weights * BITS_PER_WEIGHT[self.formats.routed] / 8)

    def layer_bytes(self, moe: Moe) -> int:
        """Bytes of all routed experts of one layer."""
        return moe.num_experts * self.expert_bytes(moe)

    @cached_property
    def all_expert_bytes(self) -> int:
        """Bytes of all routed experts of all layers."""
        return sum(self.layer_bytes(layer.moe) for layer in self.layers if layer.moe)

    @cached_property
    def dense_bytes(self) -> float:
        """Bytes of everything that every rank holds: all weights but routed experts."""
        total = 2 * self.vocab_size * self.hidden_size * BITS_PER_WEIGHT[self.formats.lm_head] / 8
        for layer, count in self.layer_counts.items():
            total += count * self._dense_layer_bytes(layer)
        return total

    def _dense_layer_bytes(self, layer: Layer) -> float:
        formats, hidden = self.formats, self.hidden_size
        total = 0.0
        if layer.mixer is not None:
            for name, (inputs, outputs) in layer.mixer.projections(hidden).items():
                kind = formats.o_proj if name == "o_proj" else formats.attention
                total += inputs * outputs * BITS_PER_WEIGHT[kind] / 8
        if layer.moe is not None:
            shared = layer.moe.num_matrices * hidden * layer.moe.shared_intermediate_size
            total += (
                shared * BITS_PER_WEIGHT[formats.shared] / 8 + 2.0 * hidden * layer.moe.num_experts
            )
        dense = layer.num_dense_matrices * hidden * layer.dense_intermediate_size
        return total + dense * BITS_PER_WEIGHT[formats.dense] / 8

    def kv_bytes_per_token(self) -> float:
        """KV-cache bytes of one token over all layers, windows not counted."""
        elements = sum(layer.mixer.kv_cache_elements for layer in self.layers if layer.mixer)
        return elements * self.kv_cache_bytes

    def with_formats(self, **formats: WeightFormat) -> Model:
        """The same model with some weights in other formats (fields of :class:`Formats`)."""
        return replace(self, formats=replace(self.formats, **formats))
