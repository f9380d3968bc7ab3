"""Which parameters of a TensorRT-LLM MoE backend are expert tensors, by quantisation method.

A quantisation method decides what a backend's module holds, so the table goes by its class. Shapes cannot
decide: with one resident expert, a ``[1, hidden_size]`` activation scale that all experts share looks like
an expert tensor. Whatever the table does not name is refused, so a format that a later TensorRT-LLM changes
is never run as something else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

MoEModule = Any
"""A MoE module of TensorRT-LLM: an ``nn.Module`` with attributes that no type checker knows."""

BACKENDS = {
    "CutlassFusedMoE": "CUTLASS",
    "TRTLLMGenFusedMoE": "TRTLLM",
    "CuteDslFusedMoE": "CUTEDSL",
    "DeepGemmFusedMoE": "DEEPGEMM",
    "TritonFusedMoE": "TRITON",
    "VanillaMoE": "VANILLA",
}
"""MoE backends by the name of their class, with the name of ``moe_config.backend``."""

VANILLA_BACKEND = "VanillaMoE"
WRAPPER = "ConfigurableMoE"
"""The module that models call where it supports the backend, which it holds as ``backend``."""

REFUSED_BACKENDS = {
    "WideEPMoE": "the WIDEEP backend sends tokens between ranks and needs attention data parallelism",
    "Llama4MinLatencyFusedMoE": (
        "the minimum-latency layer of Llama 4 has a forward of its own, in which experts cannot be waited "
        "for; set enable_min_latency to false"
    ),
}

_WEIGHTS = ("w3_w1_weight", "w2_weight", "w3_w1_bias", "w2_bias")
_BLOCK_SCALES = ("w3_w1_weight_scale", "w2_weight_scale")
_ALPHAS = ("fc31_alpha", "fc2_alpha")
_INPUT_SCALES = ("fc31_input_scale", "fc2_input_scale")


@dataclass(frozen=True)
class Format:
    """What one quantisation method puts into a module.

    Attributes:
        expert_tensors: parameters whose first dimension is the experts. Those that a model does not have
            (biases) are None.
        shared_values: parameters that all experts share; loading makes them the same on every rank.
        expert_attributes: tensors ``[num_experts]`` that are no parameters and that loading scales by a
            value of each expert.
        first_expert_scales: what loading takes from the first expert it loads, for all of them
            (suffixes of checkpoint names).
        largest_scales: of which loading takes the largest over the experts it loads, in
            TensorRT-LLM's ``W4A8_CUSTOM`` loading mode (suffixes of checkpoint names).
        refused: why the format cannot be shared, where it cannot.
    """

    expert_tensors: tuple[str, ...] = ()
    shared_values: tuple[str, ...] = ()
    expert_attributes: tuple[str, ...] = ()
    first_expert_scales: tuple[str, ...] = ()
    largest_scales: tuple[str, ...] = ()
    refused: str | None = None


_PRE_QUANT_SCALES = ("w1.pre_quant_scale", "w3.pre_quant_scale")

_NVFP4_CUTLASS = Format(
    (*_WEIGHTS, *_BLOCK_SCALES, *_ALPHAS),
    (*_INPUT_SCALES, "fc31_act_scale"),
    first_expert_scales=_PRE_QUANT_SCALES,
)
_NVFP4_TRTLLM_GEN = Format(
    (*_WEIGHTS, *_BLOCK_SCALES, *_ALPHAS, "fc31_scale_c"),
    (*_INPUT_SCALES, "fc31_act_scale"),
    first_expert_scales=_PRE_QUANT_SCALES,
)
_FP8_BLOCK_SCALES = Format((*_WEIGHTS, "w3_w1_weight_scaling_factor", "w2_weight_scaling_factor"))

FORMATS: dict[str, Format] = {
    "UnquantizedFusedMoEMethod": Format(_WEIGHTS),
    "FP8QDQFusedMoEMethod": Format(
        (*_WEIGHTS, "fc31_dequant", "fc2_dequant"), ("fc2_quant", "fc31_input_dequant")
    ),
    "DeepSeekFP8BlockScalesFusedMoEMethod": _FP8_BLOCK_SCALES,
    "DeepSeekFP8BlockScalesFusedMoEMethodDeepGemm": _FP8_BLOCK_SCALES,
    "INT8WoqPerChannelFusedMoEMethod": Format((*_WEIGHTS, "fc31_weight_scale", "fc2_weight_scale")),
    "WInt4AFP8FusedMoEMethod": Format(
        (
            *_WEIGHTS,
            *_ALPHAS,
            "fc31_weight_scale",
            "fc2_weight_scale",
            "fc31_act_scale",
            "fc2_act_scale",
        ),
        largest_scales=("w2.input_scale",),
    ),
    "WFP4A16FusedMoEMethod": Format((*_WEIGHTS, "fc31_weight_scale", "fc2_weight_scale")),
    "NVFP4CutlassFusedMoEMethod": _NVFP4_CUTLASS,
    "NVFP4CuteDslFusedMoEMethod": _NVFP4_CUTLASS,
    "NVFP4TRTLLMGenFusedMoEBaseMethod": _NVFP4_TRTLLM_GEN,
    "NVFP4TRTLLMGenFusedMoEMethod": Format(
        _NVFP4_TRTLLM_GEN.expert_tensors,
        _NVFP4_TRTLLM_GEN.shared_values,
        expert_attributes=("swiglu_beta", "swiglu_limit"),
        first_expert_scales=_PRE_QUANT_SCALES,
    ),
    "W4A8NVFP4FP8TRTLLMGenFusedMoEMethod": _NVFP4_TRTLLM_GEN,
    "W4A8MXFP4MXFP8CutlassFusedMoEMethod": Format((*_WEIGHTS, *_BLOCK_SCALES, "fake_input_scale")),
    "W4A8MXFP4FP8CutlassFusedMoEMethod": Format(
        (*_WEIGHTS, *_BLOCK_SCALES, "fc31_input_dequant", "fc2_input_dequant"), _INPUT_SCALES
    ),
    "W4A16MXFP4TRTLLMGenFusedMoEMethod": Format((*_WEIGHTS, *_BLOCK_SCALES)),
    "W4A8MXFP4MXFP8TRTLLMGenFusedMoEMethod": Format((*_WEIGHTS, *_BLOCK_SCALES)),
    "W4A8MXFP4FP8TRTLLMGenFusedMoEMethod": Format(
        (
            *_WEIGHTS,
            *_BLOCK_SCALES,
            "fc31_input_dequant",
            "fc31_input_gate_dequant",
            "fc2_input_dequant",
        )
    ),
    "TritonUnquantizedFusedMoEMethod": Format(_WEIGHTS),
    "TritonFP8QDQFusedMoEMethod": Format(
        (*_WEIGHTS, "fc31_dequant", "fc2_dequant"), ("fc31_input_dequant", "fc2_input_dequant")
    ),
    "TritonMXFP4FusedMoEMethod": Format(
        refused="loading replaces its parameters by tensor objects of Triton, whose memory cannot be "
        "moved; on Blackwell, use the CUTLASS or TRTLLM backend for MXFP4"
    ),
}
"""By the name of the quantisation method's class."""


VANILLA_FORMATS: dict[str, dict[str, str]] = {
    "UnquantizedLinearMethod": {},
    "FP8QDQLinearMethod": {},
    "FP8BlockScalesLinearMethod": {},
    "NVFP4LinearMethod": {"scalar_alpha": "alpha"},
}
"""Formats of the VANILLA backend, whose experts are modules of linear layers: by the name of a linear
layer's quantisation method, the numbers that loading keeps beside the parameter they are taken from."""


def is_backend(module: nn.Module) -> bool:
    """Whether a module is a MoE backend, of TensorRT-LLM or derived from one, supported or not."""
    bases = {cls.__name__ for cls in type(module).__mro__}
    return type(module).__name__ != WRAPPER and not bases.isdisjoint({"MoE", *BACKENDS})


def check_backend(backend: MoEModule) -> None:
    """Refuse a backend whose experts cannot be shared, before it creates its weights.

    Raises:
        ValueError: the backend, and why.
    """
    name = type(backend).__name__
    if name in REFUSED_BACKENDS:
        raise ValueError(f"parallel=dwdp does not support {name}: {REFUSED_BACKENDS[name]}")
    if name not in BACKENDS:
        raise ValueError(
            f"parallel=dwdp does not know the MoE backend {name}; it supports "
            f"{', '.join(BACKENDS.values())} (moe_config.backend)"
        )
    for attribute in ("ep_size", "tp_size", "cluster_size", "parallel_size"):
        value = getattr(backend, attribute)
        if value != 1:
            raise ValueError(
                f"{name} has {attribute} {value}: with parallel=dwdp every rank is a whole replica, "
                "so tensor, expert and cluster parallelism have to be 1"
            )
    if getattr(backend, "layer_load_balancer", None) is not None:
        raise ValueError(
            f"{name} has an expert load balancer, which moves experts between ranks: "
            "remove moe_config.load_balancer, or do not use parallel=dwdp"
        )
    if getattr(backend, "pack_weights", False):
        raise ValueError("parallel=dwdp does not support VanillaMoE with pack_weights")


def find_format(backend: MoEModule) -> Format:
    """The format of a backend other than Vanilla that has created its weights.

    Raises:
        ValueError: the format cannot be shared, or is not known.
    """
    method = type(backend.quant_method).__name__
    described = f"{type(backend).__name__} with {method}"
    known = FORMATS.get(method)
    if known is None:
        raise ValueError(f"parallel=dwdp does not know the format of {described}")
    if known.refused is not None:
        raise ValueError(f"parallel=dwdp does not support {described}: {known.refused}")
    return known


def check_vanilla_expert(expert: MoEModule) -> None:
    """Refuse a format of the VANILLA backend, by one expert's module that has created its weights.

    Raises:
        ValueError: the format is not known.
    """
    for module in expert.modules():
        method = type(getattr(module, "quant_method", None)).__name__
        if any(True for _ in module.parameters(recurse=False)) and method not in VANILLA_FORMATS:
            raise ValueError(
                f"parallel=dwdp does not support VanillaMoE with {method}: what it keeps of each expert is "
                "not known; use the CUTLASS backend"
            )


def check_parameters(backend: MoEModule, num_resident: int) -> None:
    """Make sure that a module holds what its format's entry says, for ``num_resident`` experts.

    Raises:
        ValueError: a parameter is not in the table, or has another shape than its entry needs.
    """
    known = find_format(backend)
    described = f"{type(backend).__name__} with {type(backend.quant_method).__name__}"
    for name, parameter in backend.named_parameters(recurse=False):
        if name in known.expert_tensors:
            if not parameter.dim() or parameter.shape[0] != num_resident:
                raise ValueError(
                    f"{name} of {described} has shape {list(parameter.shape)}, not one row for each of "
                    f"{num_resident} resident experts: this TensorRT-LLM is not supported"
                )
        elif name not in known.shared_values:
            raise ValueError(
                f"{described} has a parameter {name}, which dwdp does not know: this TensorRT-LLM is "
                "not supported"
            )
        elif parameter.dim() and parameter.shape[0] != 1:
            raise ValueError(
                f"{name} of {described} has shape {list(parameter.shape)}, but is a value that all "
                "experts share: this TensorRT-LLM is not supported"
            )
    buffers = [name for name, _ in backend.named_buffers(recurse=False)]
    if buffers:
        raise ValueError(f"{described} has buffers {buffers}, which dwdp does not know")


def as_full_load_reads(
    backend: MoEModule, weights: dict[str, torch.Tensor], resident: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors of one layer, such that loading ``resident`` gives what a full load gives.

    Almost every value that loading computes over several experts it computes over all of them. Where
    it takes those it loads alone, their entries are replaced by what all experts would give.

    Args:
        weights: by the names that the backend's ``load_weights`` reads, ``"7.w1.input_scale"``.

    Returns:
        ``weights``, or a copy with some entries replaced.
    """
    known = find_format(backend)
    replaced: dict[str, torch.Tensor] = {}
    for suffix in known.first_expert_scales:
        if f"0.{suffix}" in weights:
            replaced[f"{resident[0]}.{suffix}"] = weights[f"0.{suffix}"]
    if known.largest_scales and backend.weight_loading_mode.name == "W4A8_CUSTOM":
        for suffix in known.largest_scales:
            largest = max(
                (weights[f"{expert}.{suffix}"] for expert in range(backend.num_experts)),
                key=lambda scale: float(scale[...].reshape(())),
            )
            replaced.update({f"{expert}.{suffix}": largest for expert in resident})
    return {**weights, **replaced} if replaced else weights
