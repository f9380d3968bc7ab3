"""Attach DWDP to a Transformers model: composite tensors take the place of its expert parameters.

Every expert module keeps its own class and its own kernels; it sees ordinary ``[E, ...]`` parameters.
In staged mode its forward is bracketed by ``begin`` and ``end`` of the runtime.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dwdp.config import DwdpConfig
from dwdp.engines.transformers.experts import (
    ExpertLayer,
    ExpertTensor,
    UnsupportedModelError,
    find_expert_layers,
)
from dwdp.engines.transformers.loading import LoadReport, load_sharded
from dwdp.fabric import FabricError, create_fabric
from dwdp.fabric.cuda_devices import list_devices
from dwdp.group import Group
from dwdp.runtime import DwdpRuntime
from dwdp.weights import ExpertTensorSpec, ExpertWeights, LayerSpec


@dataclass
class Attachment:
    """A model whose experts are shared out over a group. A context manager that detaches.

    Attributes:
        model: runs as before. Its experts are read-only; staged, they cannot be saved or converted.
        runtime: its experts' memory and counters.
        load_report: bytes, time and peak memory of loading; None for a model that was loaded before.
    """

    model: PreTrainedModel
    runtime: DwdpRuntime
    load_report: LoadReport | None
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def detach(self) -> None:
        """Turn the model back into what it was before and give the experts' memory back. Idempotent.

        A model given to :func:`attach` gets its experts back as ordinary parameters, copied from the
        group's memory; one that :func:`load` made is left without experts, on the meta device.
        """
        with ExitStack() as undone:  # every one, whatever goes wrong in another
            undone.callback(self.runtime.detach)
            for undo in self._undo:
                undone.callback(undo)
            self._undo.clear()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def load(
    model_dir: str | PathLike[str],
    group: Group,
    config: DwdpConfig,
    *,
    dtype: str = "auto",
    device: str = "cpu",
) -> Attachment:
    """Load a checkpoint's dense weights and this rank's experts, and attach. Every rank calls it.

    Args:
        model_dir: a Hugging Face checkpoint directory with safetensors files.
        group: the ranks that share the experts.
        config: the same on every rank.
        dtype: ``"auto"`` (the checkpoint's), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        device: ``"cpu"``; ``"cuda"`` for one GPU per rank of a host, in turn (several ranks share one
            where there are fewer); or one device, such as ``"cuda:1"``.

    Raises:
        CheckpointError, UnsupportedModelError: the checkpoint cannot be loaded or shared out.
        ValueError: the experts cannot be placed on the group, or it is one of several (``num_groups``).
        GroupError, FabricError: the group's memory cannot be set up.
    """
    compute = _device(device, group)
    with _attaching(group, config, compute) as runtime:
        model, layers, report = load_sharded(
            model_dir, dtype, lambda layers: _LoadTarget(runtime, layers)
        )
        _move_dense(model, compute)
    return _install(Attachment(model, runtime, report), layers, restore_copies=False)


def attach(model: PreTrainedModel, group: Group, config: DwdpConfig) -> Attachment:
    """Share out the experts of a model that is loaded already. Every rank calls it.

    It stays on its device, the CPU or one GPU. Its own expert parameters are released when it is
    attached, not before, so that a failure leaves it as it was. :func:`load` never holds more than this
    rank's share.

    Raises:
        UnsupportedModelError: the model has no experts that can be shared out; the text says why.
        ValueError, GroupError, FabricError: as :func:`load`.
    """
    with _attaching(group, config, model.device) as runtime:
        layers = find_expert_layers(model)
        weights = _allocate(runtime, layers)
        for index, layer in enumerate(layers):
            _copy_resident(weights, index, layer, group.rank)
    return _install(Attachment(model, runtime, None), layers, restore_copies=True)


@contextmanager
def _attaching(group: Group, config: DwdpConfig, device: torch.device) -> Iterator[DwdpRuntime]:
    """A runtime to load into; attached when the body ends, given up when anything goes wrong."""
    with group.setting_up():
        if config.num_groups != 1:
            raise ValueError(
                f"num_groups is {config.num_groups}: the Transformers engine is started as one group; leave "
                "it out, and start every group by a launcher of its own"
            )
        if device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"the model is on device {str(device)!r}: move it to the CPU or a GPU first"
            )
        if device.type == "cuda":
            torch.cuda.set_device(device)
            fabric = create_fabric("cuda", ordinal=device.index, across_hosts=not group.is_one_host)
        else:
            fabric = create_fabric("host")
        runtime = DwdpRuntime(group, config, fabric)
        try:
            yield runtime
            runtime.attach()
        except BaseException:
            runtime.detach()
            raise


def _device(name: str, group: Group) -> torch.device:
    """The device that ``name`` means on this rank.

    Raises:
        ValueError: it is neither the CPU nor a GPU.
        FabricError: there is no GPU.
    """
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise ValueError(f'device is {name!r}: use "cpu", "cuda" or "cuda:N"')
    if name != "cuda":
        return torch.device(name)
    num_devices = len(list_devices())
    if num_devices == 0:
        raise FabricError("there is no GPU that this process may use; check CUDA_VISIBLE_DEVICES")
    return torch.device("cuda", group.local_rank % num_devices)


def _move_dense(model: PreTrainedModel, device: torch.device) -> None:
    """Move all weights and buffers but the experts, which are on the meta device; tied ones stay tied."""
    for parameter in model.parameters():
        if not parameter.is_meta:
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def layer_specs(layers: Sequence[ExpertLayer]) -> list[LayerSpec]:
    """The runtime's description of a model's MoE layers, in the order of the forward."""
    return [
        LayerSpec(
            layer.path,
            tuple(
                ExpertTensorSpec(tensor.name, tensor.num_experts, tensor.expert_shape, tensor.dtype)
                for tensor in layer.tensors
            ),
            top_k=layer.top_k,
            hidden_size=layer.hidden_size,
        )
        for layer in layers
    ]


def _allocate(runtime: DwdpRuntime, layers: Sequence[ExpertLayer]) -> ExpertWeights:
    """Memory for this rank's experts, once it is clear that the layers can be bracketed."""
    if runtime.fetch_mode != "direct":
        for layer in layers:
            _choice_name(layer)
    return runtime.allocate(layer_specs(layers))


def _copy_resident(weights: ExpertWeights, index: int, layer: ExpertLayer, rank: int) -> None:
    for tensor in layer.tensors:
        parameter = layer.module.get_parameter(tensor.name).detach()
        for expert in weights.placement(index).resident_experts(rank):
            weights.destination(index, tensor.name, expert).copy_(parameter[expert])


class _LoadTarget:
    """Resident memory of the runtime, as the loader's destination."""

    def __init__(self, runtime: DwdpRuntime, layers: Sequence[ExpertLayer]) -> None:
        self._rank = runtime.group.rank
        self._weights = _allocate(runtime, layers)
        self._index = {layer.path: index for index, layer in enumerate(layers)}

    def resident(self, layer: ExpertLayer) -> Sequence[int]:
        return self._weights.placement(self._index[layer.path]).resident_experts(self._rank)

    def destination(self, tensor: ExpertTensor, expert: int) -> torch.Tensor:
        return self._weights.destination(self._index[tensor.module_path], tensor.name, expert)


def _install(
    attachment: Attachment, layers: Sequence[ExpertLayer], *, restore_copies: bool
) -> Attachment:
    """Give every layer its composite tensors; all is undone and detached if anything goes wrong."""
    try:
        for index, layer in enumerate(layers):
            attachment._undo.append(
                _install_layer(attachment.runtime, index, layer, restore_copies=restore_copies)
            )
    except BaseException:
        attachment.detach()
        raise
    return attachment


def _install_layer(
    runtime: DwdpRuntime, index: int, layer: ExpertLayer, *, restore_copies: bool
) -> Callable[[], None]:
    """Give a layer its composite tensors; returns what undoes it.

    Undone, its parameters are copies of all experts, or (``restore_copies`` false) on the meta device.
    """
    module = layer.module
    requires_grad = {t.name: module.get_parameter(t.name).requires_grad for t in layer.tensors}

    def restore_parameters() -> None:
        if restore_copies:
            runtime.begin(index)
        for name, grad in requires_grad.items():
            composite = module.get_parameter(name).detach()
            tensor = composite.clone() if restore_copies else composite.to("meta")
            module.register_parameter(name, nn.Parameter(tensor, requires_grad=grad))
        if restore_copies:
            runtime.end(index)

    with ExitStack() as undo:
        undo.callback(restore_parameters)
        for name, composite in runtime.tensors(index).items():
            module.register_parameter(name, nn.Parameter(composite, requires_grad=False))
        if runtime.is_staged:
            undo.callback(_bracket_forward(layer, runtime, index))
        undo.callback(_guard_parameters(module, is_staged=runtime.is_staged))
        return undo.pop_all().close


def _guard_parameters(module: nn.Module, *, is_staged: bool) -> Callable[[], None]:
    """Refuse what composite tensors do not stand; returns what undoes it.

    They are mapped read-only: a write would end the process with SIGSEGV. Where remote experts are
    staged they are there between ``begin`` and ``end`` alone: a copy would be of something else.
    """

    def refuse_load(*_: Any) -> None:
        raise RuntimeError(
            "shared experts are read-only: detach the model before loading weights into it"
        )

    def refuse_copy(*_: Any, **__: Any) -> Any:
        raise RuntimeError(
            "staged experts cannot be copied, saved or converted: detach the model first, or use "
            "fetch_mode='direct'"
        )

    guards = [module.register_load_state_dict_pre_hook(refuse_load)]
    if is_staged:
        guards.append(module.register_state_dict_pre_hook(refuse_copy))
        module._apply = refuse_copy  # type: ignore[method-assign]

    def undo() -> None:
        for guard in guards:
            guard.remove()
        module.__dict__.pop("_apply", None)

    return undo


def _choice_name(layer: ExpertLayer) -> str:
    """What a layer's forward calls the router's choice.

    Every expert module takes hidden states first and the router's choice second. Asked of the class: the
    forward in place may be a user's own.

    Raises:
        UnsupportedModelError: it takes no second argument.
    """
    forward = type(layer.module).forward
    parameters = list(inspect.signature(forward).parameters)
    if len(parameters) < 3:
        raise UnsupportedModelError(
            f"{layer.path} ({type(layer.module).__name__}) has a forward that takes "
            f"{', '.join(parameters[1:]) or 'nothing'}: experts are staged for modules that take hidden "
            "states and the router's choice; use fetch_mode='direct'"
        )
    return parameters[2]


def _bracket_forward(layer: ExpertLayer, runtime: DwdpRuntime, index: int) -> Callable[[], None]:
    """Put ``begin`` and ``end`` around a layer's forward; returns what undoes it."""
    module = layer.module
    forward = module.forward
    previous = module.__dict__.get("forward")
    choice_name = _choice_name(layer)

    def staged_forward(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(map(_needs_grad, (*args, *kwargs.values()))):
            raise RuntimeError(
                "staged experts are for inference: their slot is refilled before a backward pass would "
                "read it. Run the model under torch.inference_mode(), or use fetch_mode='direct'"
            )
        runtime.begin(index, args[1] if len(args) > 1 else kwargs.get(choice_name))
        try:
            return forward(*args, **kwargs)
        finally:
            runtime.end(index)

    def undo() -> None:
        if previous is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = previous

    module.forward = staged_forward
    return undo


def _needs_grad(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad
