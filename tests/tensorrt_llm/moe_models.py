"""MoE layers of TensorRT-LLM in every format that dwdp shares out, and checkpoints for them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pretend_cuda import PretendCuda
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

HIDDEN, TOP_K, NUM_LAYERS = 256, 2, 2

Weights = dict[str, Tensor]
ExpertWeights = Callable[[torch.Generator, int, int], Weights]


@dataclass(frozen=True)
class Case:
    """One backend with one quantisation.

    Attributes:
        backend: ``moe_config.backend``.
        algorithm: name of the ``QuantAlgo``, or None.
        sm_version: of the GPU that TensorRT-LLM is to believe in.
        expert_weights: makes what a checkpoint has of one expert, from ``(generator, hidden size,
            intermediate size)``.
        mode: how TensorRT-LLM names what it loads.
        gpt_oss: with biases and the activation's parameters, weights of all experts in one tensor.
        bias_dtype: of the checkpoint.
        suffix: tells apart what is otherwise equal.
    """

    backend: str
    algorithm: str | None
    sm_version: int
    expert_weights: ExpertWeights
    mode: str = "VANILLA"
    dtype: torch.dtype = torch.bfloat16
    gpt_oss: bool = False
    intermediate: int = 128
    bias_dtype: torch.dtype = torch.bfloat16
    suffix: str = ""

    def __str__(self) -> str:
        return f"{self.backend}-{self.algorithm or 'none'}{self.suffix}"


class Model(nn.Module):
    """MoE layers, and nothing else."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


def load_model(case: Case, checkpoint: list[Weights], num_experts: int) -> Model:
    """Creates and loads a model as TensorRT-LLM's ``ModelLoader`` does: on ``meta``, then on the device."""
    from tensorrt_llm._torch.models.modeling_utils import MetaInitMode

    with PretendCuda():
        with MetaInitMode():
            model = Model([_make_layer(case, index, num_experts) for index in range(NUM_LAYERS)])
            for module in list(model.modules()):
                if callable(getattr(module, "create_weights", None)):
                    module.create_weights()
        model._apply(
            lambda tensor: torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor
        )
        for layer, weights in zip(model.layers, checkpoint, strict=True):
            getattr(layer, "backend", layer).load_weights([dict(weights)])
        for module in model.modules():
            if hasattr(module, "post_load_weights") and not getattr(
                module, "_weights_removed", False
            ):
                module.post_load_weights()
    return model


def _make_layer(case: Case, index: int, num_experts: int) -> nn.Module:
    from tensorrt_llm._torch.model_config import ModelConfig
    from tensorrt_llm._torch.modules.fused_moe import create_moe
    from tensorrt_llm._torch.modules.fused_moe.interface import MoEWeightLoadingMode
    from tensorrt_llm._torch.modules.fused_moe.routing import RenormalizeMoeRoutingMethod
    from tensorrt_llm.mapping import Mapping
    from tensorrt_llm.models.modeling_utils import QuantConfig
    from tensorrt_llm.quantization.mode import QuantAlgo
    from transformers import PretrainedConfig

    algorithm = None if case.algorithm is None else QuantAlgo[case.algorithm]
    config = ModelConfig(
        mapping=Mapping(),
        pretrained_config=PretrainedConfig(hidden_size=HIDDEN, torch_dtype=case.dtype),
        moe_backend=case.backend,
        quant_config=QuantConfig(quant_algo=algorithm),
        max_num_tokens=64,
        skip_create_weights_in_init=True,
    )
    options: dict[str, Any] = {}
    if case.gpt_oss:
        options["bias"] = True
        for name, value in (("alpha", 1.702), ("beta", 1.0), ("limit", 7.0)):
            options[f"swiglu_{name}"] = torch.tensor([value] * num_experts, dtype=torch.float32)
    return create_moe(
        routing_method=RenormalizeMoeRoutingMethod(top_k=TOP_K, force_enable_pytorch_op=True),
        num_experts=num_experts,
        hidden_size=HIDDEN,
        intermediate_size=case.intermediate,
        dtype=case.dtype,
        model_config=config,
        weight_loading_mode=MoEWeightLoadingMode[case.mode],
        layer_idx=index,
        **options,
    )


def make_checkpoint(case: Case, num_experts: int) -> list[Weights]:
    """What each layer's ``load_weights`` reads. Every byte is random, scales differ between experts."""
    layers = []
    for layer in range(NUM_LAYERS):
        generator = torch.Generator().manual_seed(layer)
        experts = [
            case.expert_weights(generator, HIDDEN, case.intermediate) for _ in range(num_experts)
        ]
        if case.gpt_oss:
            layers.append(_stacked(experts, generator, case))
        else:
            layers.append(
                {
                    f"{expert}.{name}": tensor
                    for expert, weights in enumerate(experts)
                    for name, tensor in weights.items()
                }
            )
    return layers


def _stacked(experts: list[Weights], generator: torch.Generator, case: Case) -> Weights:
    """Experts as GPT-OSS has them: gate and up in one tensor, inputs before outputs."""
    stacked: Weights = {}
    for name in {name.partition(".")[2] for name in experts[0]}:
        if experts[0][f"w1.{name}"].dim() < 2:
            key = f"proj_{name}"
            stacked[f"gate_up_{key}"] = max(expert[f"w1.{name}"] for expert in experts)
            stacked[f"down_{key}"] = max(expert[f"w2.{name}"] for expert in experts)
            continue
        key = "proj" if name == "weight" else f"proj_{name}"
        gate_up = [torch.cat([expert[f"w1.{name}"], expert[f"w3.{name}"]]) for expert in experts]
        stacked[f"gate_up_{key}"] = torch.stack([tensor.T.contiguous() for tensor in gate_up])
        stacked[f"down_{key}"] = torch.stack(
            [expert[f"w2.{name}"].T.contiguous() for expert in experts]
        )
    for name, size in (("gate_up_proj.bias", 2 * case.intermediate), ("down_proj.bias", HIDDEN)):
        stacked[name] = torch.randn(len(experts), size, generator=generator).to(case.bias_dtype)
    return stacked


def _state(module: nn.Module) -> dict[str, Any]:
    """All that a module holds, deep down: plain values, tensors, tuples of tensors."""
    held: dict[str, Any] = {}
    for path, child in module.named_modules():
        for name, value in {**vars(child), **child._parameters}.items():
            if isinstance(value, (Tensor, int, float, str, tuple, list, type(None))):
                held[f"{path}.{name}"] = value
    return {name: held[name] for name in held if not name.endswith(".dwdp_resident_experts")}


def assert_same_state(actual: nn.Module, expected: nn.Module) -> None:
    """All plain values and tensors of two modules are equal, layouts and bytes included."""
    held, wanted = _state(actual), _state(expected)
    assert held.keys() == wanted.keys()
    for name in wanted:
        _assert_same(held[name], wanted[name], name)


def _assert_same(actual: Any, expected: Any, name: str) -> None:
    if isinstance(expected, (tuple, list)):
        assert len(actual) == len(expected), name
        for a, e in zip(actual, expected, strict=True):
            _assert_same(a, e, name)
    elif isinstance(expected, Tensor):
        assert (actual.shape, actual.stride(), actual.dtype) == (
            expected.shape,
            expected.stride(),
            expected.dtype,
        ), name
        assert torch.equal(_raw(actual), _raw(expected)), name
    else:
        assert actual == expected, name


def _raw(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _matrices(hidden: int, intermediate: int) -> tuple[tuple[str, int, int], ...]:
    """Rows and columns of an expert's three weights."""
    return (
        ("w1", intermediate, hidden),
        ("w2", hidden, intermediate),
        ("w3", intermediate, hidden),
    )


def _bytes(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def _scale(generator: torch.Generator) -> Tensor:
    return torch.rand((), generator=generator) + 0.5


def plain(generator: torch.Generator, hidden: int, intermediate: int) -> Weights:
    return {
        f"{name}.weight": torch.randn(rows, columns, generator=generator).to(torch.bfloat16)
        for name, rows, columns in _matrices(hidden, intermediate)
    }


def fp8(generator: torch.Generator, hidden: int, intermediate: int) -> Weights:
    made = {}
    for name, rows, columns in _matrices(hidden, intermediate):
        values = torch.randn(rows, columns, generator=generator)
        made[f"{name}.weight"] = values.to(torch.float8_e4m3fn)
        made[f"{name}.weight_scale"] = _scale(generator)
        made[f"{name}.input_scale"] = _scale(generator)
    return made


def fp8_blocks(generator: torch.Generator, hidden: int, intermediate: int) -> Weights:
    made = {}
    for name, rows, columns in _matrices(hidden, intermediate):
        values = torch.randn(rows, columns, generator=generator)
        blocks = (-(-rows // 128), -(-columns // 128))
        made[f"{name}.weight"] = values.to(torch.float8_e4m3fn)
        made[f"{name}.weight_scale_inv"] = torch.rand(blocks, generator=generator) + 0.5
    return made


def nvfp4(generator: torch.Generator, hidden: int, intermediate: int, block: int = 16) -> Weights:
    made = {}
    first = (_scale(generator), _scale(generator))
    for name, rows, columns in _matrices(hidden, intermediate):
        input_scale, weight_scale_2 = (
            first if name != "w2" else (_scale(generator), _scale(generator))
        )
        made[f"{name}.weight"] = _bytes(generator, rows, columns // 2)
        scales = torch.rand(rows, columns // block, generator=generator)
        made[f"{name}.weight_scale"] = scales.to(torch.float8_e4m3fn)
        made[f"{name}.input_scale"] = input_scale
        made[f"{name}.weight_scale_2"] = weight_scale_2
    return made


def nvfp4_blocks_of_32(generator: torch.Generator, hidden: int, intermediate: int) -> Weights:
    return nvfp4(generator, hidden, intermediate, 32)


def nvfp4_awq(generator: torch.Generator, hidden: int, intermediate: int) -> Weights:
    """Activation scales of the experts are as good as equal, but round to either of two bfloat16:
    each rank has to take those of the same expert."""
    made = nvfp4(generator, hidden, intermediate)
    halfway = 1 + (2 * (torch.arange(hidden) % 128) + 1) / 256
    wobble = 1 + 4e-6 * (2 * torch.rand(hidden, generator=generator) - 1)
    return {**made, "w1.pre_quant_scale": halfway * wobble, "w3.pre_quant_scale": halfway * wobble}


def mxfp4(generator: torch.Generator, hidden: int, intermediate: int) -> Weights:
    made = {}
    for name, rows, columns in _matrices(hidden, intermediate):
        made[f"{name}.weight"] = _bytes(generator, rows, columns // 2)
        made[f"{name}.weight_scale"] = _bytes(generator, rows, columns // 32)
    return made


def mxfp4_fp8(generator: torch.Generator, hidden: int, intermediate: int) -> Weights:
    made = mxfp4(generator, hidden, intermediate)
    up = _scale(generator)
    return {**made, "w1.input_scale": up, "w3.input_scale": up, "w2.input_scale": _scale(generator)}


def mxfp4_hopper(generator: torch.Generator, hidden: int, intermediate: int) -> Weights:
    made = mxfp4(generator, hidden, intermediate)
    return {name.replace("weight_scale", "weight_scale_inv"): made[name] for name in made}


def int8(generator: torch.Generator, hidden: int, intermediate: int) -> Weights:
    made = {}
    for name, rows, columns in _matrices(hidden, intermediate):
        made[f"{name}.weight"] = _bytes(generator, rows, columns).view(torch.int8)
        made[f"{name}.weight_scale"] = torch.rand(rows, generator=generator)
    return made


def int4_awq(generator: torch.Generator, hidden: int, intermediate: int) -> Weights:
    """As ModelOpt packs for Hopper: two neighbours of a column in one byte."""
    made = _awq_scales(generator, hidden, intermediate, "weight_scale")
    for name, rows, columns in _matrices(hidden, intermediate):
        made[f"{name}.weight"] = _bytes(generator, rows // 2, columns).view(torch.int8)
    return made


def int4_awq_ada(generator: torch.Generator, hidden: int, intermediate: int) -> Weights:
    made = _awq_scales(generator, hidden, intermediate, "weight_scale")
    for name, rows, columns in _matrices(hidden, intermediate):
        made[f"{name}.weight"] = _bytes(generator, rows, columns // 2).view(torch.int8)
    return made


def int4_custom(generator: torch.Generator, hidden: int, intermediate: int) -> Weights:
    made = _awq_scales(generator, hidden, intermediate, "weight_scale_inv")
    for name, rows, columns in _matrices(hidden, intermediate):
        made[f"{name}.weight"] = _bytes(generator, rows, columns // 2).view(torch.int8)
    return made


def _awq_scales(
    generator: torch.Generator, hidden: int, intermediate: int, weight_scale: str
) -> Weights:
    made = {}
    for name, rows, columns in _matrices(hidden, intermediate):
        made[f"{name}.{weight_scale}"] = torch.rand(rows, columns // 128, generator=generator)
        made[f"{name}.input_scale"] = _scale(generator)
        made[f"{name}.pre_quant_scale"] = torch.rand(columns, generator=generator) + 0.5
        made[f"{name}.weight_scale_2"] = _scale(generator)
    return made


GPT_OSS: dict[str, Any] = {"gpt_oss": True, "mode": "FUSED_GATE_UP_PROJ"}

CASES = (
    Case("CUTLASS", None, 90, plain),
    Case("CUTLASS", "FP8", 90, fp8),
    Case("CUTLASS", "FP8", 90, fp8, intermediate=72, suffix="-padded"),
    Case("CUTLASS", "FP8_BLOCK_SCALES", 90, fp8_blocks),
    Case("CUTLASS", "NVFP4", 100, nvfp4),
    Case("CUTLASS", "NVFP4", 100, nvfp4, intermediate=96, suffix="-padded"),
    Case("CUTLASS", "NVFP4", 100, nvfp4_awq, suffix="-awq"),
    Case("CUTLASS", "W4A8_AWQ", 90, int4_awq),
    Case("CUTLASS", "W4A8_AWQ", 90, int4_custom, mode="W4A8_CUSTOM", suffix="-custom"),
    Case("CUTLASS", "W4A8_AWQ", 89, int4_awq_ada, dtype=torch.float16, suffix="-ada"),
    Case("CUTLASS", "W8A16", 90, int8),
    Case("CUTLASS", "W4A16_MXFP4", 90, mxfp4_hopper),
    Case("CUTLASS", "W4A8_MXFP4_FP8", 100, mxfp4_fp8),
    Case("CUTLASS", "W4A8_MXFP4_MXFP8", 100, mxfp4),
    Case("CUTLASS", "W4A8_MXFP4_MXFP8", 100, mxfp4, suffix="-gpt-oss", **GPT_OSS),
    Case("TRTLLM", "FP8_BLOCK_SCALES", 100, fp8_blocks),
    Case("TRTLLM", "NVFP4", 100, nvfp4),
    Case("TRTLLM", "NVFP4", 100, nvfp4, suffix="-gpt-oss", bias_dtype=torch.float32, **GPT_OSS),
    Case("TRTLLM", "NVFP4", 100, nvfp4_awq, suffix="-awq"),
    Case("TRTLLM", "W4A8_NVFP4_FP8", 100, nvfp4_blocks_of_32),
    Case("TRTLLM", "W4A16_MXFP4", 100, mxfp4),
    Case("TRTLLM", "W4A16_MXFP4", 100, mxfp4, suffix="-gpt-oss", **GPT_OSS),
    Case("TRTLLM", "W4A8_MXFP4_FP8", 100, mxfp4_fp8),
    Case("TRTLLM", "W4A8_MXFP4_MXFP8", 100, mxfp4),
    Case("CUTEDSL", "FP8_BLOCK_SCALES", 100, fp8_blocks),
    Case("CUTEDSL", "NVFP4", 100, nvfp4),
    Case("DEEPGEMM", "FP8_BLOCK_SCALES", 100, fp8_blocks),
    Case("DEEPGEMM", "FP8_BLOCK_SCALES", 90, fp8_blocks, suffix="-hopper"),
    Case("TRITON", None, 90, plain),
    Case("TRITON", None, 90, plain, suffix="-gpt-oss", **GPT_OSS),
    Case("TRITON", "FP8", 90, fp8),
    Case("VANILLA", None, 90, plain),
    Case("VANILLA", "FP8", 90, fp8),
    Case("VANILLA", "FP8_BLOCK_SCALES", 90, fp8_blocks),
    Case("VANILLA", "NVFP4", 100, nvfp4),
)
