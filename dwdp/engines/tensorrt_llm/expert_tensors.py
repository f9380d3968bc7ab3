"""Where the bytes of each expert lie in a MoE backend, and how they are moved into composite tensors.

Experts are moved as blocks of storage, so any layout within an expert is kept as it is: transposed weights
(Triton), scales whose rows are padded (DeepGEMM). A block is as long as the strides say, the same whatever
the number of experts, so all ranks agree on it.

Shape legend: ``E`` = experts of a layer, ``B`` = elements of one expert's block.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from dwdp.engines.tensorrt_llm import formats
from dwdp.engines.tensorrt_llm.formats import MoEModule
from dwdp.weights import ExpertTensorSpec

if TYPE_CHECKING:
    import torch
    from torch import nn


class ExpertTensor(Protocol):
    """One tensor of every expert of a layer; loaded for some of them, in order."""

    @property
    def spec(self) -> ExpertTensorSpec: ...

    def block(self, position: int) -> torch.Tensor:
        """What is loaded of the ``position``-th resident expert, up to ``[B]`` elements."""

    def release(self) -> None:
        """Give up the memory that was loaded into."""

    def point_at(self, composite: torch.Tensor) -> None:
        """Make the module read ``composite``, ``[E, B]``."""


class FusedTensor:
    """A parameter or attribute ``[resident experts, ...]`` of a backend.

    Args:
        holders: the modules that have it as ``name``; the first one loaded it.

    Raises:
        ValueError: experts do not lie one after the other in storage.
    """

    def __init__(self, holders: Sequence[MoEModule], name: str, num_resident: int) -> None:
        self._holders = tuple(holders)
        self._name = name
        tensor = getattr(holders[0], name)
        self._shape, self._strides = tuple(tensor.shape[1:]), tuple(tensor.stride()[1:])
        num_elements = _block_elements(tensor.shape[1:], tensor.stride()[1:])
        if num_resident > 1 and tensor.stride(0) != num_elements:
            raise ValueError(
                f"{name} of {type(holders[0]).__name__} has strides {tensor.stride()} for shape "
                f"{list(tensor.shape)}: its experts do not lie one after the other, which dwdp needs"
            )
        num_experts = holders[0].num_experts
        self.spec = ExpertTensorSpec(name, num_experts, (num_elements,), tensor.dtype)

    def block(self, position: int) -> torch.Tensor:
        tensor = getattr(self._holders[0], self._name).detach()
        num_elements = self.spec.expert_shape[0]
        return _storage_slice(tensor, position * num_elements, num_elements)

    def release(self) -> None:
        for holder in self._holders:
            _set(holder, self._name, getattr(holder, self._name).new_empty(0))

    def point_at(self, composite: torch.Tensor) -> None:
        num_experts, num_elements = composite.shape
        view = composite.as_strided(
            (num_experts, *self._shape), (num_elements, *self._strides), composite.storage_offset()
        )
        for holder in self._holders:
            _set(holder, self._name, view)


class ModuleTensor:
    """The parameter ``path`` of each expert's own module (Vanilla).

    Args:
        backend: indexed by expert; :func:`complete_modules` has made the modules of remote ones.

    Raises:
        ValueError: the experts' parameters differ in shape, strides or dtype.
    """

    def __init__(self, backend: MoEModule, path: str, resident: Sequence[int]) -> None:
        self._backend, self._path, self._resident = backend, path, tuple(resident)
        tensors = [backend[expert].get_parameter(path) for expert in resident]
        first = tensors[0]
        self._shape, self._strides = tuple(first.shape), first.stride()
        for tensor in tensors:
            if (tensor.shape, tensor.stride(), tensor.dtype) != (
                first.shape,
                first.stride(),
                first.dtype,
            ):
                raise ValueError(
                    f"{path} is {list(first.shape)} {first.dtype} for one expert and "
                    f"{list(tensor.shape)} {tensor.dtype} for another: dwdp needs equal experts"
                )
        num_elements = _block_elements(first.shape, first.stride())
        self.spec = ExpertTensorSpec(path, backend.num_experts, (num_elements,), first.dtype)

    def block(self, position: int) -> torch.Tensor:
        tensor = self._backend[self._resident[position]].get_parameter(self._path).detach()
        return _storage_slice(tensor, 0, self.spec.expert_shape[0])

    def release(self) -> None:
        for expert in self._resident:
            parameter = self._backend[expert].get_parameter(self._path)
            parameter.data = parameter.data.new_empty(0)

    def point_at(self, composite: torch.Tensor) -> None:
        # Not by iterating over the backend, a list of modules that holds others as well.
        for expert, block in enumerate(composite):
            parameter = self._backend[expert].get_parameter(self._path)
            parameter.data = block.as_strided(self._shape, self._strides, block.storage_offset())


def complete_modules(backend: MoEModule, resident: Sequence[int]) -> None:
    """Give every remote expert a module like the first resident one's, whose parameters are empty.

    Raises:
        ValueError: modules hold tensors that are not parameters.
    """
    template = backend[resident[0]]
    for expert in range(backend.num_experts):
        if expert not in resident:
            backend[expert] = _empty_like(template, {})


def refresh_numbers(backend: MoEModule) -> None:
    """Set what loading keeps of an expert outside of its parameters, now that these are those of all."""
    for expert in range(backend.num_experts):
        for module in backend[expert].modules():
            method = type(getattr(module, "quant_method", None)).__name__
            for name, parameter in formats.VANILLA_FORMATS.get(method, {}).items():
                setattr(module, name, getattr(module, parameter).item())


def _empty_like(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """A copy of ``module`` with empty parameters; ``made`` has what is copied, as a module may come twice."""
    import torch

    if module in made:
        return made[module]
    held = [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]
    held += [name for name, _ in module.named_buffers(recurse=False)]
    if held:
        raise ValueError(
            f"{type(module).__name__} of an expert holds {', '.join(held)}, which are not parameters: "
            "parallel=dwdp does not support this format with the VANILLA backend"
        )
    made[module] = twin = copy.copy(module)
    twin._parameters = {
        name: None
        if parameter is None
        else torch.nn.Parameter(parameter.data.new_empty(0), requires_grad=False)
        for name, parameter in module._parameters.items()
    }
    twin._modules = {
        name: None if child is None else _empty_like(child, made)
        for name, child in module._modules.items()
    }
    return twin


def _block_elements(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements of storage from one expert to the next: those of the longest-striding dimension."""
    return max((size * stride for size, stride in zip(shape, strides, strict=True)), default=1)


def _storage_slice(tensor: torch.Tensor, start: int, num_elements: int) -> torch.Tensor:
    """``[num_elements]`` of a tensor's storage from its ``start`` on, or as many as there are."""
    offset = tensor.storage_offset() + start
    stored = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((min(num_elements, stored - offset),), (1,), offset)


def _set(holder: MoEModule, name: str, tensor: torch.Tensor) -> None:
    """Let ``holder`` read ``tensor``: a parameter stays the same object, which others may refer to."""
    if name in holder._parameters:
        parameter = holder._parameters[name]
        assert parameter is not None
        parameter.data = tensor
    else:
        setattr(holder, name, tensor)
