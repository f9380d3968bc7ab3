"""What a layer computes: operators with their FLOPs and the bytes they must move.

Symbols: t tokens of the step, H hidden size, and per sequence n new tokens after p past ones.

* A product of ``[t, a]`` with ``[a, b]`` takes ``2 t a b`` FLOPs and moves its weights once plus both
  activations.
* Causal attention's core touches ``sum over i=1..n of min(p + i, window)`` (query, key) pairs per head,
  each ``2 (d_qk + d_v)`` FLOPs: one multiply-add per element for the scores and one for the values.
* MLA at one new token per sequence runs absorbed: heads attend to the compressed cache of
  ``kv_lora_rank + rope`` elements, and ``kv_b_proj`` is applied to queries and outputs instead of keys
  and values (DeepSeek-V2, arXiv 2405.04434, section 2.1). Otherwise keys and values are decompressed.
* A routed expert is three products (gate, up, down); the grouped GEMM reads each activated expert once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from dwdp.perf.demand import expected_activated_experts
from dwdp.perf.hardware import Datatype
from dwdp.perf.model import (
    ACTIVATION_BYTES,
    BITS_PER_WEIGHT,
    COMPUTE_DATATYPE,
    Layer,
    Mixer,
    Model,
    Moe,
    WeightFormat,
)

Category = Literal["attention", "dense_gemm", "grouped_gemm", "other"]

_LINEAR_CHUNK_PAIRS = 64
"""(query, key) pairs per token and head that chunked linear attention touches beside its state."""


class Sequences(NamedTuple):
    """``times`` sequences that each compute ``new`` tokens after ``past`` ones in the KV cache."""

    new: int
    past: int = 0
    times: int = 1


@dataclass(frozen=True)
class Batch:
    """What one rank computes in one step."""

    sequences: tuple[Sequences, ...]

    @classmethod
    def prefill(cls, lengths: Iterable[int]) -> Batch:
        """Whole prompts of these lengths, in any order."""
        counts = Counter(lengths)
        return cls(tuple(Sequences(length, times=counts[length]) for length in sorted(counts)))

    @classmethod
    def decode(cls, num_sequences: int, past: int) -> Batch:
        """One new token for each of ``num_sequences`` sequences with ``past`` tokens."""
        return cls((Sequences(1, past, num_sequences),) if num_sequences else ())

    @cached_property
    def num_tokens(self) -> int:
        """Tokens that are computed."""
        return sum(part.new * part.times for part in self.sequences)

    @cached_property
    def num_sequences(self) -> int:
        """Sequences in the batch."""
        return sum(part.times for part in self.sequences)

    @property
    def is_decode(self) -> bool:
        """Whether every sequence computes one token."""
        return all(part.new == 1 for part in self.sequences)

    def pairs(self, window: int | None) -> float:
        """(query, key) pairs per head, causal, with at most ``window`` keys per query."""
        total = 0.0
        for new, past, count in self.sequences:
            # Queries 1..full see past + i keys, the rest exactly `window`.
            full = new if window is None else min(new, max(0, window - past))
            pairs = full * past + full * (full + 1) / 2
            if window is not None:
                pairs += (new - full) * window
            total += count * pairs
        return total

    def keys_read(self, window: int | None) -> float:
        """Cached tokens that attention reads, summed over sequences."""
        return sum(
            count * (new + past if window is None else min(new + past, new + window - 1))
            for new, past, count in self.sequences
        )


@dataclass(frozen=True)
class Operator:
    """One operator of one layer.

    Attributes:
        name: ``attention`` or the name of a product.
        category: what its achieved rate is measured as.
        flops: floating-point operations.
        num_bytes: least bytes to and from memory.
        datatype: what it is computed in.
    """

    name: str
    category: Category
    flops: float
    num_bytes: float
    datatype: Datatype


def matrix_product(
    name: str, tokens: float, inputs: int, outputs: int, weights: WeightFormat
) -> Operator:
    """``[tokens, inputs] x [inputs, outputs]``; the result is 16-bit."""
    datatype = COMPUTE_DATATYPE[weights]
    num_bytes = (
        inputs * outputs * BITS_PER_WEIGHT[weights] / 8
        + tokens * inputs * ACTIVATION_BYTES[datatype]
        + tokens * outputs * 2.0
    )
    return Operator(name, "dense_gemm", 2.0 * tokens * inputs * outputs, num_bytes, datatype)


def attention_core(mixer: Mixer, batch: Batch, kv_cache_bytes: float) -> Operator:
    """Scores, softmax and values, without the projections around them."""
    tokens = batch.num_tokens
    if mixer.kind == "linear":
        state = mixer.qk_head_dim * mixer.v_head_dim
        chunk = _LINEAR_CHUNK_PAIRS * (mixer.qk_head_dim + mixer.v_head_dim)
        flops = 2.0 * tokens * mixer.num_heads * (2 * state + (0 if batch.is_decode else chunk))
        num_bytes = 2.0 * tokens * mixer.num_heads * (mixer.qk_head_dim + 2 * mixer.v_head_dim)
        num_bytes += batch.num_sequences * mixer.num_heads * state * 4.0
        return Operator("attention", "attention", flops, num_bytes, "bf16")
    if mixer.kind == "mla" and batch.is_decode:
        width = mixer.kv_lora_rank + mixer.rope_head_dim
        flops = 2.0 * batch.pairs(mixer.window) * mixer.num_heads * (width + mixer.kv_lora_rank)
        activations = tokens * mixer.num_heads * (width + mixer.kv_lora_rank) * 2.0
    else:
        per_pair = mixer.qk_head_dim + mixer.v_head_dim
        flops = 2.0 * batch.pairs(mixer.window) * mixer.num_heads * per_pair
        activations = tokens * mixer.num_heads * per_pair * 2.0
    cache = batch.keys_read(mixer.window) * mixer.kv_cache_elements * kv_cache_bytes
    if mixer.indexer_heads:  # scores every key, and reads one 8-bit vector of each
        flops += 2.0 * batch.pairs(None) * mixer.indexer_heads * mixer.indexer_head_dim
        cache += batch.keys_read(None) * mixer.indexer_head_dim
    return Operator("attention", "attention", flops, activations + cache, "bf16")


def grouped_gemm(model: Model, moe: Moe, token_copies: float, experts_read: float) -> Operator:
    """All products of the routed experts, for ``token_copies`` (token, expert) pairs."""
    weights = moe.num_matrices * model.hidden_size * moe.intermediate_size
    datatype = COMPUTE_DATATYPE[model.formats.routed]
    per_copy = (model.hidden_size + moe.intermediate_size) * ACTIVATION_BYTES[datatype]
    per_copy += 2.0 * model.hidden_size + 2.0 * (moe.num_matrices - 1) * moe.intermediate_size
    return Operator(
        "grouped_gemm",
        "grouped_gemm",
        2.0 * token_copies * weights,
        experts_read * model.expert_bytes(moe) + token_copies * per_copy,
        datatype,
    )


def mlp(
    name: str, model: Model, tokens: float, width: int, weights: WeightFormat, num_matrices: int
) -> Iterator[Operator]:
    """A dense MLP: gate and up as one product, then down."""
    yield matrix_product(
        f"{name}_up", tokens, model.hidden_size, (num_matrices - 1) * width, weights
    )
    yield matrix_product(f"{name}_down", tokens, width, model.hidden_size, weights)


def dense_operators(model: Model, layer: Layer, batch: Batch) -> list[Operator]:
    """Everything of a layer but its routed experts, in the order of execution."""
    tokens, formats = batch.num_tokens, model.formats
    operators: list[Operator] = []
    if layer.mixer is not None:
        projections = layer.mixer.projections(model.hidden_size)
        last = projections.pop("o_proj")
        operators += [
            matrix_product(name, tokens, inputs, outputs, formats.attention)
            for name, (inputs, outputs) in projections.items()
        ]
        operators.append(attention_core(layer.mixer, batch, model.kv_cache_bytes))
        operators.append(matrix_product("o_proj", tokens, *last, formats.o_proj))
    if layer.moe is not None:
        operators.append(
            matrix_product("router", tokens, model.hidden_size, layer.moe.num_experts, "bf16")
        )
        if layer.moe.shared_intermediate_size:
            operators += mlp(
                "shared",
                model,
                tokens,
                layer.moe.shared_intermediate_size,
                formats.shared,
                layer.moe.num_matrices,
            )
    elif layer.dense_intermediate_size:
        width, matrices = layer.dense_intermediate_size, layer.num_dense_matrices
        operators += mlp("mlp", model, tokens, width, formats.dense, matrices)
    return operators


def layer_operators(model: Model, layer: Layer, batch: Batch) -> list[Operator]:
    """All operators of a layer on a rank that computes its own tokens with all experts."""
    operators = dense_operators(model, layer, batch)
    if layer.moe is not None:
        tokens, moe = batch.num_tokens, layer.moe
        activated = expected_activated_experts(moe.num_experts, moe.top_k, tokens)
        operators.append(grouped_gemm(model, moe, tokens * moe.top_k, activated))
    return operators
