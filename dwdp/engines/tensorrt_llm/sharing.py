"""Shares out the experts of a loaded TensorRT-LLM model: composite tensors take the place of its parameters.

Comes after everything that TensorRT-LLM does to weights, whatever it repacked them to: this moves bytes.
Each layer's resident experts go to the fabric's memory and their first copy is freed, layer by layer, so
the most that is held at once is the rank's share and one layer. Afterwards the module looks as if all
experts had been loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dwdp.config import DwdpConfig
from dwdp.engines.tensorrt_llm import formats, sharding
from dwdp.engines.tensorrt_llm.expert_tensors import (
    ExpertTensor,
    FusedTensor,
    ModuleTensor,
    complete_modules,
    refresh_numbers,
)
from dwdp.engines.tensorrt_llm.formats import MoEModule
from dwdp.fabric.base import Fabric
from dwdp.group import Group
from dwdp.rendezvous import GroupError
from dwdp.runtime import DwdpRuntime
from dwdp.weights import ExpertWeights, LayerSpec

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class SharedLayer:
    """One MoE layer.

    Attributes:
        index: its number in the runtime, in the order of the forward.
        moe: the module that the model calls.
        backend: the one that holds the parameters: ``moe.backend`` where ``moe`` is a
            ``ConfigurableMoE``, else ``moe``.
        tensors: its expert tensors.
    """

    index: int
    moe: MoEModule
    backend: MoEModule
    tensors: tuple[ExpertTensor, ...]


class SharedModel:
    """A model whose experts are shared out.

    Attributes:
        model: as TensorRT-LLM made it.
        runtime: fetches the experts.
        layers: in the order of the forward.
    """

    def __init__(
        self, model: nn.Module, runtime: DwdpRuntime, layers: Sequence[SharedLayer]
    ) -> None:
        self.model = model
        self.runtime = runtime
        self.layers = tuple(layers)
        self._is_closed = False

    def close(self) -> None:
        """Give the experts' memory back. The model cannot run afterwards. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self.runtime.detach()
        for layer in self.layers:
            for tensor in layer.tensors:
                tensor.release()


def share_experts(
    model: nn.Module, group: Group, config: DwdpConfig, fabric: Fabric
) -> SharedModel:
    """Move the resident experts of ``model`` to ``fabric`` and let it see all experts.

    Every rank of ``group`` calls it, with a model that was created and loaded inside of
    :func:`~dwdp.engines.tensorrt_llm.sharding.resident_experts_only`. Peers' memory is mapped and
    first fetches are under way when it returns.

    Raises:
        ValueError: the model has no MoE layers, or some whose experts cannot be shared.
        GroupError: a peer failed, or has another model or other scales.
        FabricError: memory or descriptors cannot be had.
    """
    layers = _find_layers(model)
    _check_shared_values(layers, group)
    runtime = DwdpRuntime(group, config, fabric)
    try:
        weights = runtime.allocate([_layer_spec(layer) for layer in layers], layer_by_layer=True)
        for layer in layers:
            _move(layer, weights)
        runtime.attach()
        for layer in layers:
            _show_all_experts(layer, runtime.tensors(layer.index))
    except BaseException:
        runtime.detach()
        raise
    return SharedModel(model, runtime, layers)


def _find_layers(model: nn.Module) -> list[SharedLayer]:
    """The model's MoE layers, in the order in which they are registered, which is the forward's."""
    wrappers = (module for module in model.modules() if type(module).__name__ == formats.WRAPPER)
    moe_of = {wrapper.backend: wrapper for wrapper in wrappers}
    layers: list[SharedLayer] = []
    for module in model.modules():
        if not formats.is_backend(module):
            continue
        formats.check_backend(module)
        resident = sharding.resident_experts(module)
        if resident is None:
            raise ValueError(
                f"{type(module).__name__} was created with all experts: it was not loaded as one rank's share"
            )
        moe = moe_of.get(module, module)
        layers.append(SharedLayer(len(layers), moe, module, _expert_tensors(moe, module, resident)))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no MoE layers whose experts could be shared: "
            "run it without parallel=dwdp"
        )
    return layers


def _expert_tensors(
    moe: MoEModule, backend: MoEModule, resident: tuple[int, ...]
) -> tuple[ExpertTensor, ...]:
    if type(backend).__name__ == formats.VANILLA_BACKEND:
        complete_modules(backend, resident)
        paths = [path for path, _ in backend[resident[0]].named_parameters()]
        for expert in resident:
            if [path for path, _ in backend[expert].named_parameters()] != paths:
                raise ValueError(
                    f"experts {resident[0]} and {expert} have different parameters: dwdp needs equal experts"
                )
        return tuple(ModuleTensor(backend, path, resident) for path in paths)
    formats.check_parameters(backend, len(resident))
    known = formats.find_format(backend)
    tensors = [
        FusedTensor([backend], name, len(resident))
        for name in known.expert_tensors
        if getattr(backend, name, None) is not None
    ]
    holders = [backend] if moe is backend else [backend, moe]
    tensors += [
        FusedTensor(holders, name, len(resident))
        for name in known.expert_attributes
        if getattr(backend, name) is not None
    ]
    return tuple(tensors)


def _layer_spec(layer: SharedLayer) -> LayerSpec:
    return LayerSpec(
        f"moe.{layer.index}",
        tuple(tensor.spec for tensor in layer.tensors),
        top_k=layer.backend.routing_method.experts_per_token,
        hidden_size=layer.backend.hidden_size,
    )


def _check_shared_values(layers: Sequence[SharedLayer], group: Group) -> None:
    """Make sure that what all experts share is the same on all ranks: every rank loads it itself."""
    import torch

    digest = hashlib.sha256()
    for layer in layers:
        if type(layer.backend).__name__ == formats.VANILLA_BACKEND:
            continue
        for name in formats.find_format(layer.backend).shared_values:
            value = getattr(layer.backend, name, None)
            digest.update(name.encode())
            if value is not None:
                data = value.detach().contiguous().view(-1).view(torch.uint8).cpu()
                digest.update(data.numpy().tobytes())
    digests = group.exchange("shared values", digest.digest())
    differing = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if differing:
        raise GroupError(
            f"rank(s) {', '.join(map(str, differing))} and rank 0 loaded different input scales; "
            "start every rank with the same checkpoint"
        )


def _move(layer: SharedLayer, weights: ExpertWeights) -> None:
    import torch

    resident = sharding.resident_experts(layer.backend)
    assert resident is not None
    placed = weights.placement(layer.index).resident_experts(weights.rank)
    if resident != placed:
        raise ValueError(
            f"experts {list(resident)} were loaded, but this rank stores {list(placed)}"
        )
    weights.allocate_layer(layer.index)
    for tensor in layer.tensors:
        for position, expert in enumerate(resident):
            block = tensor.block(position)
            home = weights.destination(layer.index, tensor.spec.name, expert)
            home[: len(block)].copy_(block)
        tensor.release()
    if torch.cuda.is_available():
        # The fabric takes memory from the driver, not from torch's cache.
        torch.cuda.empty_cache()


def _show_all_experts(layer: SharedLayer, composites: dict[str, torch.Tensor]) -> None:
    for tensor in layer.tensors:
        tensor.point_at(composites[tensor.spec.name])
    if type(layer.backend).__name__ == formats.VANILLA_BACKEND:
        refresh_numbers(layer.backend)
    sharding.widen(layer.backend)
