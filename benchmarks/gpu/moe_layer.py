"""Compute of one transformer layer: attention, router and grouped GEMM, by the kernels engines use."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from layer import ExpertShape
from torch.nn import functional
from transformers.integrations.moe import grouped_mm_experts_forward

HEAD_DIM = 128


class MoeCompute:
    """One layer of ``shape`` in bfloat16; the expert tensors are given at each call.

    Attention has as many key and value heads as query heads: four square matrices, as the performance
    model assumes. Weights are random, and routing is uniform.
    """

    def __init__(self, shape: ExpertShape, sequence_length: int, num_sequences: int = 1) -> None:
        self.shape = shape
        self.num_tokens = sequence_length * num_sequences
        hidden = shape.hidden_size
        self._heads = (num_sequences, sequence_length, -1, HEAD_DIM)
        self._qkv = _random(3 * hidden, hidden)
        self._out = _random(hidden, hidden)
        self.hidden_states = _random(self.num_tokens, hidden) * hidden**0.5
        scores = torch.rand(self.num_tokens, shape.num_experts, device="cuda")
        self.indices = scores.topk(shape.top_k).indices
        self._routing_weights = torch.full_like(self.indices, 1 / shape.top_k, dtype=torch.bfloat16)

    def attention(self) -> torch.Tensor:
        """Causal attention with its projections: ``[num_tokens, hidden_size]``."""
        projected = functional.linear(self.hidden_states, self._qkv).chunk(3, dim=-1)
        query, key, value = (part.view(self._heads).transpose(1, 2) for part in projected)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(self.num_tokens, -1)
        return functional.linear(mixed, self._out)

    def experts(
        self, hidden_states: torch.Tensor, weights: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The activated experts' part, with Transformers' own grouped GEMM."""
        module = SimpleNamespace(
            num_experts=self.shape.num_experts,
            has_gate=True,
            has_bias=False,
            is_transposed=False,
            _apply_gate=_apply_gate,
            **weights,
        )
        out: torch.Tensor = grouped_mm_experts_forward(
            module, hidden_states, self.indices, self._routing_weights
        )
        return out


def _apply_gate(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _random(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda") * columns**-0.5


def random_experts(shape: ExpertShape) -> dict[str, torch.Tensor]:
    """Expert tensors of an unsharded layer, in torch's own memory."""
    return {
        spec.name: torch.randn(
            spec.num_experts, *spec.expert_shape, dtype=spec.dtype, device="cuda"
        ).mul_(spec.expert_shape[-1] ** -0.5)
        for spec in shape.bf16_tensors()
    }
