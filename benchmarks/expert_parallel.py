"""The baseline DWDP is measured against: data + expert parallel (DEP) with per-layer collectives.

Every rank keeps its own tokens for attention and holds an even share of each layer's experts. In
every MoE layer all ranks gather all tokens, each computes its own experts' part for all of them, and
the parts are reduced and scattered back: the all-gather / reduce-scatter form of DEP. Every layer
therefore waits for the slowest rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from dwdp.engines.transformers.experts import ExpertLayer, find_expert_layers


def shard_experts(model: PreTrainedModel) -> None:
    """Turn a fully loaded model into this rank's part of a DEP group (the default process group).

    The number of ranks must divide the number of experts.
    """
    for layer in find_expert_layers(model):
        _shard_layer(layer, dist.get_rank(), dist.get_world_size())


def _shard_layer(layer: ExpertLayer, rank: int, world_size: int) -> None:
    num_local_experts, rest = divmod(layer.num_experts, world_size)
    if rest:
        raise ValueError(f"{world_size} ranks do not divide {layer.num_experts} experts")
    first = rank * num_local_experts
    module: Any = layer.module
    for tensor in layer.tensors:
        full = module.get_parameter(tensor.name)
        share = full.detach()[first : first + num_local_experts].clone()
        module.register_parameter(tensor.name, nn.Parameter(share, requires_grad=False))
    module.num_experts = num_local_experts
    compute_experts = module.forward

    def forward(
        hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        lengths = [torch.empty(1, dtype=torch.long) for _ in range(world_size)]
        num_tokens = hidden_states.shape[0]
        dist.all_gather(lengths, torch.tensor([num_tokens]))
        padded = int(max(lengths))
        hidden = _gather(hidden_states, padded, world_size)
        index = _gather(top_k_index, padded, world_size)
        weights = _gather(top_k_weights, padded, world_size)
        # Transformers' own convention for experts of other ranks: an index past the last one, with
        # weight zero, costs no matrix product.
        local = (index >= first) & (index < first + num_local_experts)
        local &= weights != 0
        index = torch.where(local, index - first, num_local_experts)
        partial = compute_experts(hidden, index, weights * local)
        out = partial.new_empty((padded, *partial.shape[1:]))
        dist.reduce_scatter_tensor(out, partial.contiguous())
        return out[:num_tokens]

    module.forward = forward


def _gather(tensor: torch.Tensor, padded: int, world_size: int) -> torch.Tensor:
    """``[padded * world_size, ...]``: every rank's rows, each padded with zeros."""
    rows = tensor.new_zeros((padded, *tensor.shape[1:]))
    rows[: tensor.shape[0]] = tensor
    gathered = tensor.new_empty((padded * world_size, *tensor.shape[1:]))
    dist.all_gather_into_tensor(gathered, rows)
    return gathered
