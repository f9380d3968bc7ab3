"""The key-value cache that continuous batching sets aside, known from a model's configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers.generation.continuous_batching.cache import (
    find_head_dim,
    find_num_kv_heads,
    group_layers_by_attn_type,
)

from dwdp.serving.rank_server.backend import UnsupportedModel
from dwdp.serving.rank_server.options import RankOptions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

BLOCK_TOKENS = 32
DEFAULT_KV_CACHE_TOKENS = 32_768
_SPARE_BLOCKS = 2
"""The scheduler asks for up to this many blocks more than a sequence's tokens fill."""
_PADDING_BLOCKS = 2
"""Transformers adds them to every cache tensor, for tokens that only pad a batch."""
_PAGED_ATTENTION = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class KvCachePlan:
    """A rank's cache.

    Attributes:
        num_tokens: that fit into it; of one sequence or of several.
        num_blocks: of ``BLOCK_TOKENS`` tokens and one group of layers each.
        num_bytes: of all its tensors.
    """

    num_tokens: int
    num_blocks: int
    num_bytes: int


def plan_kv_cache(
    config: PreTrainedConfig, dtype: torch.dtype, options: RankOptions, max_sequence_length: int
) -> KvCachePlan:
    """The cache of a rank that batches continuously.

    Layers are grouped, all groups having as many layers (``group_layers_by_attn_type`` in Transformers).
    There are two tensors, ``[tokens, heads, head size]``, per layer of *one* group: a block of them belongs
    to one group at a time.

    Args:
        config: of the model (the text part of a composite one).
        dtype: of the model, and so of its cache.
        max_sequence_length: tokens of a prompt and its answer together.

    Raises:
        UnsupportedModel: the model's attention has no such cache.
        ValueError: ``options`` ask for a cache that is too small for one sequence.
    """
    if getattr(config, "kv_lora_rank", None) is not None:
        raise UnsupportedModel("its keys and values are of different sizes")
    try:
        groups, types = group_layers_by_attn_type(config)
        row_bytes = find_num_kv_heads(config) * find_head_dim(config) * dtype.itemsize
    except (AttributeError, ValueError) as error:
        raise UnsupportedModel(
            f"its configuration does not say how large it is: {error}"
        ) from error
    if not set(types) <= _PAGED_ATTENTION:
        raise UnsupportedModel(f"it has {', '.join(sorted(set(types) - _PAGED_ATTENTION))} layers")
    num_tokens = _num_tokens(options, max_sequence_length)
    num_blocks = len(groups) * -(-num_tokens // BLOCK_TOKENS)
    rows = (num_blocks + _PADDING_BLOCKS) * BLOCK_TOKENS
    return KvCachePlan(num_tokens, num_blocks, 2 * len(groups[0]) * rows * row_bytes)


def max_running(options: RankOptions) -> int:
    """Sequences generated at the same time: each takes a token of every forward."""
    return min(options.max_running, options.max_batch_tokens)


def _num_tokens(options: RankOptions, max_sequence_length: int) -> int:
    one = max_sequence_length + _SPARE_BLOCKS * BLOCK_TOKENS
    if options.kv_cache_tokens is None:
        return max(one, min(DEFAULT_KV_CACHE_TOKENS, max_running(options) * one))
    if options.kv_cache_tokens < one:
        raise ValueError(
            f"kv_cache_tokens is {options.kv_cache_tokens}, but one sequence of {max_sequence_length} tokens "
            f"needs {one}: raise it, or lower max_sequence_length"
        )
    return options.kv_cache_tokens
