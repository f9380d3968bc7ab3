"""The table of formats: complete for TensorRT-LLM as it is, and strict about what it does not know."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from moe_models import CASES, load_model, make_checkpoint
from pretend_cuda import pretend_gpu
from torch import nn

from dwdp.engines.tensorrt_llm import formats

UNUSED_METHODS = {
    # Bases, and one that no backend of this version creates.
    "FusedMoEMethodBase",
    "MXFP4WeightCutlassFusedMoEMethod",
    "MXFP4WeightFusedMoEMethod",
    "MXFP4WeightTRTLLMGenFusedMoEMethod",
    "NVFP4FusedMoEMethod",
    "W4A16MXFP4CutlassFusedMoEMethod",
}


def make_backend(method: str, **shapes: tuple[int, ...]) -> Any:
    backend: Any = type("CutlassFusedMoE", (nn.Module,), {})()
    backend.quant_method = type(method, (), {})()
    for name, shape in shapes.items():
        backend.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))
    return backend


@pytest.mark.trtllm
def test_the_table_has_every_method_of_this_tensorrt_llm() -> None:
    from tensorrt_llm._torch.modules.fused_moe import fused_moe_triton, quantization

    methods = {
        name
        for module in (quantization, fused_moe_triton)
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, quantization.FusedMoEMethodBase)
    }
    assert methods - UNUSED_METHODS == set(formats.FORMATS)


@pytest.mark.trtllm
def test_the_table_has_every_backend_of_this_tensorrt_llm() -> None:
    import tensorrt_llm._torch.models.modeling_llama_min_latency  # noqa: F401
    from tensorrt_llm._torch.modules.fused_moe.interface import MoE

    def descendants(cls: type) -> set[str]:
        subclasses = [c for c in cls.__subclasses__() if c.__module__.startswith("tensorrt_llm.")]
        return {cls.__name__}.union(*map(descendants, subclasses))

    known = {*formats.BACKENDS, *formats.REFUSED_BACKENDS, "MoE", "ConfigurableMoE"}
    assert descendants(MoE) | {formats.VANILLA_BACKEND} == known


@pytest.mark.trtllm
def test_every_backend_and_format_of_the_table_has_a_case() -> None:
    assert {case.backend for case in CASES} == set(formats.BACKENDS.values())
    methods = set()
    for case in CASES:
        with pretend_gpu(case.sm_version):
            layer = load_model(case, make_checkpoint(case, 2), 2).layers[0]
            if case.backend != "VANILLA":
                methods.add(type(getattr(layer, "backend", layer).quant_method).__name__)
    refused = {name for name, known in formats.FORMATS.items() if known.refused is not None}
    assert methods == set(formats.FORMATS) - refused


def test_an_activation_scale_for_all_experts_is_not_an_expert_tensor() -> None:
    """Its shape ``[1, H]`` is that of an expert tensor of a rank with one expert."""
    backend = make_backend(
        "NVFP4CutlassFusedMoEMethod", w2_weight=(1, 4, 2), fc31_alpha=(1,), fc31_act_scale=(1, 8)
    )
    formats.check_parameters(backend, 1)
    known = formats.find_format(backend)
    assert "fc31_act_scale" in known.shared_values
    assert "fc31_act_scale" not in known.expert_tensors


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({"w2_weight": (3, 4)}, r"w2_weight .* shape \[3, 4\], not one row for each of 2"),
        ({"w2_weight": ()}, r"w2_weight .* shape \[\], not one row"),
        ({"fc2_quant": (2,)}, r"fc2_quant .* shape \[2\], but is a value that all experts share"),
        ({"fc9_scale": (2,)}, "parameter fc9_scale, which dwdp does not know"),
    ],
)
def test_parameters_that_the_table_does_not_describe_are_refused(
    shapes: dict[str, tuple[int, ...]], reason: str
) -> None:
    backend = make_backend("FP8QDQFusedMoEMethod", **shapes)
    with pytest.raises(ValueError, match=reason):
        formats.check_parameters(backend, 2)


def test_buffers_are_refused() -> None:
    backend = make_backend("FP8QDQFusedMoEMethod", w2_weight=(2, 4))
    backend.register_buffer("table", torch.zeros(2))
    with pytest.raises(ValueError, match=r"buffers \['table'\]"):
        formats.check_parameters(backend, 2)


def test_an_unknown_method_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="the format of CutlassFusedMoE with NewFusedMoEMethod"):
        formats.find_format(make_backend("NewFusedMoEMethod"))


def test_the_largest_scale_of_all_experts_is_loaded_for_each() -> None:
    backend = make_backend("WInt4AFP8FusedMoEMethod")
    backend.num_experts = 4
    weights = {f"{expert}.w2.input_scale": torch.tensor(expert + 1.0) for expert in range(4)}
    backend.weight_loading_mode = SimpleNamespace(name="W4A8_CUSTOM")
    read = formats.as_full_load_reads(backend, weights, (1, 2))
    assert [float(read[f"{expert}.w2.input_scale"]) for expert in range(4)] == [1, 4, 4, 4]
    assert float(weights["1.w2.input_scale"]) == 2
    backend.weight_loading_mode = SimpleNamespace(name="VANILLA")
    assert formats.as_full_load_reads(backend, weights, (1, 2)) is weights
