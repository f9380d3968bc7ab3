"""Which parameters of a model are expert tensors, found by structure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from dwdp.engines.transformers.contract import loading_dtype

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

# What Transformers' use_experts_implementation sets on every instance of a class it decorates.
_INTERFACE_ATTRIBUTES = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


class UnsupportedModelError(ValueError):
    """The model's experts cannot be shared out; the text says why."""


@dataclass(frozen=True)
class ExpertTensor:
    """A parameter ``[num_experts, *expert_shape]`` of an expert layer.

    Attributes:
        module_path: the module that owns it, e.g. ``model.layers.3.mlp.experts``.
        name: the parameter's name in that module, e.g. ``gate_up_proj``.
        expert_shape: of one expert, without the leading dimension; ``()`` for one number per expert.
        dtype: what it is stored as once loaded.
    """

    module_path: str
    name: str
    num_experts: int
    expert_shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def full_name(self) -> str:
        """The parameter's name in the model."""
        return f"{self.module_path}.{self.name}" if self.module_path else self.name

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return prod(self.expert_shape) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of all experts."""
        return self.num_experts * self.expert_bytes


@dataclass(frozen=True)
class ExpertLayer:
    """The experts of one MoE layer: a module that uses Transformers' experts interface.

    Attributes:
        top_k, hidden_size: experts per token, and the model's width, if its config names them as usual.
    """

    path: str
    module: nn.Module
    num_experts: int
    tensors: tuple[ExpertTensor, ...]
    top_k: int | None = None
    hidden_size: int | None = None

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert, all its tensors together."""
        return sum(tensor.expert_bytes for tensor in self.tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes of all experts."""
        return sum(tensor.num_bytes for tensor in self.tensors)


def find_expert_layers(
    model: PreTrainedModel, dtype_plan: Mapping[str, torch.dtype] | None = None
) -> list[ExpertLayer]:
    """The expert layers of ``model``, in the order the model runs them.

    A layer is a module whose class uses the experts interface; its expert tensors are the parameters it
    owns directly whose first dimension is its ``num_experts``. Its other parameters and its buffers
    count as dense, and so does a parameter without elements.

    Args:
        model: on any device, ``meta`` included.
        dtype_plan: the dtypes Transformers will load some parameters in, by name pattern.

    Raises:
        UnsupportedModelError: there are no expert layers, or their experts cannot be shared out.
    """
    config = model.config
    method = quantization_method(config.to_dict())
    if method is not None:
        raise UnsupportedModelError(_quantized(config.model_type, method))
    layers = [
        layer
        for path, module in model.named_modules()
        if _uses_interface(module)
        and (layer := _expert_layer(path, module, config, dtype_plan or {})).tensors
    ]
    elsewhere = _find_other_experts(model, any_name=not layers)
    if elsewhere is not None:
        path, class_name = elsewhere
        raise UnsupportedModelError(
            f"{config.model_type} keeps its experts in {path} ({class_name}), which does not use "
            "Transformers' experts interface (use_experts_implementation), so they are not tensors "
            "[num_experts, ...] that dwdp could share out"
        )
    if not layers:
        raise UnsupportedModelError(
            f"{config.model_type} is a dense model: it has no expert layers, and dwdp shares out "
            "experts only. Run it without dwdp, or use a mixture-of-experts checkpoint"
        )
    _refuse_shared(model, layers)
    return layers


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """The quantisation method that ``config`` (a model's config.json) names, or None."""
    for section in (config, config.get("text_config") or {}):
        settings = section.get("quantization_config") or section.get("compression_config")
        if settings:
            settings = settings if isinstance(settings, Mapping) else vars(settings)
            return str(settings.get("quant_method", "unnamed"))
    return None


def refuse_quantized(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError if ``config`` (a model's config.json) names a quantisation method."""
    method = quantization_method(config)
    if method is not None:
        raise UnsupportedModelError(_quantized(config.get("model_type", "the model"), method))


def _quantized(model_type: str, method: str) -> str:
    return (
        f"{model_type} is quantised with {method}, and the Transformers engine shares out unquantised "
        "experts only: use a float32, bfloat16 or float16 checkpoint"
    )


def _uses_interface(module: nn.Module) -> bool:
    num_experts = getattr(module, "num_experts", None)
    return (
        all(hasattr(module, name) for name in _INTERFACE_ATTRIBUTES)
        and isinstance(num_experts, int)
        and num_experts > 0
    )


def _expert_layer(
    path: str, module: nn.Module, config: PreTrainedConfig, dtype_plan: Mapping[str, torch.dtype]
) -> ExpertLayer:
    num_experts = int(module.num_experts)  # type: ignore[arg-type]
    tensors = tuple(
        ExpertTensor(
            module_path=path,
            name=name,
            num_experts=num_experts,
            expert_shape=tuple(parameter.shape[1:]),
            dtype=loading_dtype(f"{path}.{name}", parameter.dtype, dtype_plan),
        )
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 0 and parameter.shape[0] == num_experts and parameter.numel() > 0
    )
    return ExpertLayer(
        path,
        module,
        num_experts,
        tensors,
        top_k=_whole_number(config, "num_experts_per_tok"),
        hidden_size=_whole_number(config, "hidden_size"),
    )


def _whole_number(config: PreTrainedConfig, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else None


def _find_other_experts(model: nn.Module, *, any_name: bool) -> tuple[str, str] | None:
    """(path, class name) of a module that holds routed experts in some other form, if there is one.

    Only names tell a list of experts from a list of layers, or routed experts from shared ones. They
    decide what is refused and why; what is shared out is never found by name.

    Args:
        any_name: also look at the classes' names, for a model in which nothing uses the interface.
    """
    for path, module in model.named_modules():
        if _uses_interface(module):
            continue
        class_name = type(module).__name__
        if path.rpartition(".")[2] == "experts" or (any_name and "Expert" in class_name):
            return path, class_name
    return None


def _refuse_shared(model: PreTrainedModel, layers: list[ExpertLayer]) -> None:
    owner: dict[int, str] = {}
    modules = {id(layer.module) for layer in layers}
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) not in modules:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            first = owner.setdefault(id(parameter), f"{path}.{name}")
            if first != f"{path}.{name}":
                raise UnsupportedModelError(
                    f"{path}.{name} and {first} are the same parameter: experts that layers share "
                    "cannot be shared out over ranks"
                )
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    names = {tensor.full_name for layer in layers for tensor in layer.tensors}
    for target, source in tied.items():
        if target in names or source in names:
            raise UnsupportedModelError(
                f"{target} is tied to {source}: tied experts cannot be shared out over ranks"
            )
