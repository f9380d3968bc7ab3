"""References, on the CPU, of the operators that TensorRT-LLM's Python needs to load experts and to run them.

Those of loading only permute or repack bytes of one expert.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def block_scale_interleave(scales: Tensor) -> Tensor:
    """``[(batch,) rows, columns]`` of bytes to the order that tensor cores read: tiles of 128 x 4.

    Byte ``(r, c)`` of a tile comes to ``16 * (r % 32) + 4 * (r // 32) + c``. Missing rows and columns of
    a tile are 0.
    """
    rows, columns = scales.shape[-2:]
    batches = scales.reshape(-1, rows, columns)
    padded = torch.nn.functional.pad(batches, (0, -columns % 4, 0, -rows % 128))
    tiles = padded.view(len(batches), -1, 4, 32, padded.shape[2] // 4, 4)
    return tiles.permute(0, 1, 4, 3, 2, 5).reshape(-1)


def block_scale_interleave_reverse(scales: Tensor) -> Tensor:
    """The inverse of :func:`block_scale_interleave` where there is nothing missing, in the same shape."""
    rows, columns = scales.shape[-2:]
    tiles = scales.reshape(-1, rows // 128, columns // 4, 32, 4, 4)
    return tiles.permute(0, 1, 4, 3, 2, 5).reshape(scales.shape)


def shuffle_matrix(matrix: Tensor, row_indices: Tensor) -> Tensor:
    """Row ``row_indices[i]`` becomes row ``i``."""
    return matrix[row_indices]


def pack_int4(weight: Tensor) -> Tensor:
    """Two neighbours in one byte, the first in its low half."""
    return ((weight[..., 0::2] & 15) | (weight[..., 1::2] << 4)).contiguous()


def unpack_int4(weight: Tensor) -> Tensor:
    """The inverse of :func:`pack_int4`, with the sign of each half."""
    return torch.stack([(weight << 4) >> 4, weight >> 4], dim=-1).flatten(-2)


def resmooth_to_fp8_e8m0(
    weight: Tensor, weight_scale: Tensor, block_size: tuple[int, int] = (128, 128)
) -> tuple[Tensor, Tensor]:
    """In place of a Triton kernel: scales of blocks become powers of two, weights are quantised again."""
    rows, columns = block_size
    weight, weight_scale = weight.clone(), weight_scale.clone()
    for r in range(weight_scale.shape[-2]):
        for c in range(weight_scale.shape[-1]):
            block = weight[..., r * rows : (r + 1) * rows, c * columns : (c + 1) * columns]
            values = block.float() * weight_scale[..., r, c]
            largest = values.abs().amax().clamp(min=1e-4)
            scale = torch.exp2(torch.ceil(torch.log2(largest / 448.0)))
            block.copy_((values / scale).to(weight.dtype))
            weight_scale[..., r, c] = scale
    return weight, weight_scale


def silu_and_mul(
    x: Tensor, scale: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    assert scale is None
    gate, up = x.chunk(2, dim=-1)
    return (silu(gate) * up).to(dtype or x.dtype)


def fused_moe(
    x: Tensor,
    token_selected_experts: Tensor,
    token_final_scales: Tensor,
    w3_w1: Tensor,
    w3_w1_bias: Tensor | None,
    w2: Tensor,
    w2_bias: Tensor | None,
    output_dtype: torch.dtype,
    quant_scales: list[Tensor],
    **options: object,
) -> list[Tensor]:
    """Cutlass's operator for weights without quantisation: ``w3_w1`` is ``[E, 2 * I, H]``, w3 above w1.

    It computes with the experts whose weights it is given, and takes them for all there are.
    """
    assert not quant_scales and w3_w1_bias is None and w2_bias is None
    assert options["ep_size"] == 1 and options["ep_rank"] == 0
    output = torch.zeros(x.shape, dtype=torch.float32)
    for expert in range(len(w3_w1)):
        tokens, choices = torch.where(token_selected_experts == expert)
        up, gate = (x[tokens] @ w3_w1[expert].T).chunk(2, dim=-1)
        result = (silu(gate) * up) @ w2[expert].T
        output.index_add_(0, tokens, result.float() * token_final_scales[tokens, choices, None])
    return [output.to(output_dtype)]


REFERENCES = {
    "block_scale_interleave": block_scale_interleave,
    "block_scale_interleave_reverse": block_scale_interleave_reverse,
    "shuffle_matrix": shuffle_matrix,
    "pack_int8_tensor_to_packed_int4": pack_int4,
    "unpack_int4_packed_tensor_to_int8": unpack_int4,
    "silu_and_mul": silu_and_mul,
    "fused_moe": fused_moe,
    "allreduce": None,  # only asked for: a group of one rank reduces nothing
}
"""By their names in ``torch.ops.trtllm``."""
