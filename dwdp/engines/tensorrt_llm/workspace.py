"""The workspace of DEEPGEMM, which grows with the experts that a rank computes with.

``DeepGemmFusedMoE.get_workspace`` takes room for every expert as if all tokens of a part went to it:
``experts x tokens x max(hidden size, intermediate size)`` bytes, and about twice that again. TensorRT-LLM
limits the tokens of a part (``moe_max_num_tokens``) for a GPU that computes with its own experts. A rank
computes with all of them here, and keeps to the same bytes with as many times fewer tokens.

A layer's parts are computed one after another: where TensorRT-LLM computes every other one on a second
stream, it gives both streams the same buffer.
"""

from __future__ import annotations

from dwdp.engines.tensorrt_llm import formats, log, sharding
from dwdp.engines.tensorrt_llm.sharing import SharedLayer, SharedModel

_TILE_TOKENS = 128
"""What DEEPGEMM rounds the tokens of a part up to."""


def limit(shared: SharedModel, *, is_given: bool) -> None:
    """Have DEEPGEMM's layers computed in parts whose workspace is what the rank's share would need.

    Says so in the log. Nothing to do for other backends.

    Args:
        is_given: whether the user set ``moe_config.max_num_tokens``, which is kept then.
    """
    layers = [
        layer
        for layer in shared.layers
        if formats.BACKENDS[type(layer.backend).__name__] == "DEEPGEMM"
    ]
    if not layers:
        return
    if any(layer.moe is layer.backend for layer in layers):
        log.info(
            "DEEPGEMM without ConfigurableMoE: its workspace has room for all tokens of all experts; "
            "leave ENABLE_CONFIGURABLE_MOE out, or lower max_num_tokens"
        )
        return
    for layer in layers:
        layer.moe.aux_stream = None
        if not is_given:
            layer.moe.moe_max_num_tokens = _tokens_of_share(layer)
    num_tokens = max(layer.moe.moe_max_num_tokens for layer in layers)
    why = "so that its workspace is that of this rank's share; moe_config.max_num_tokens says otherwise"
    log.info(
        f"DEEPGEMM computes at most {num_tokens} tokens at once, "
        f"{'as moe_config.max_num_tokens says' if is_given else why}"
    )


def _tokens_of_share(layer: SharedLayer) -> int:
    """Tokens that take as many bytes with all experts as TensorRT-LLM's limit does with the resident ones.

    At least a tile: where that is more, it is the smallest that there is.
    """
    allowed: int = layer.moe.moe_max_num_tokens
    resident = sharding.resident_experts(layer.backend) or ()
    tiles = allowed * len(resident) // layer.backend.num_experts // _TILE_TOKENS
    return min(allowed, max(1, tiles) * _TILE_TOKENS)
