"""Sharded loading: a rank reads its dense weights and its resident experts, and nothing else.

The model is loaded by its class's own ``from_pretrained``, so that dtypes, buffers, tied weights and the
generation config are Transformers' doing. Only the step that reads weights into the model, which is
still on the meta device then, is replaced: experts go from the checkpoint to where the caller wants them,
one at a time, and expert parameters stay on the meta device. The dense rest is handed on to Transformers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from dwdp.engines.transformers.checkpoint import Checkpoint, CheckpointError
from dwdp.engines.transformers.checkpoint_plan import (
    CheckpointPlan,
    missing_weights,
    plan_checkpoint,
)
from dwdp.engines.transformers.contract import loading_dtype
from dwdp.engines.transformers.experts import ExpertLayer, ExpertTensor, find_expert_layers
from dwdp.engines.transformers.interception import from_pretrained
from dwdp.system_memory import peak_rss_bytes, restart_peak_rss, rss_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class ExpertMemory(Protocol):
    """Where a rank's resident experts are to be stored."""

    def resident(self, layer: ExpertLayer) -> Sequence[int]:
        """Ids of the experts of ``layer`` that this rank stores."""

    def destination(self, tensor: ExpertTensor, expert: int) -> torch.Tensor:
        """Memory of one resident expert: ``tensor.expert_shape``, ``tensor.dtype``, written once."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds, known without reading a weight.

    Attributes:
        config: of the model that will run (the text part of a composite checkpoint).
        dtype: what the model is loaded in.
        dense_bytes: every weight and buffer that is not an expert tensor, once loaded.
        expert_layers: in the order the model runs them; their modules are on the meta device.
    """

    config: PreTrainedConfig
    model_type: str
    num_layers: int
    dtype: torch.dtype
    dense_bytes: int
    expert_layers: tuple[ExpertLayer, ...]


@dataclass(frozen=True)
class LoadReport:
    """What loading one rank took.

    Attributes:
        dense_bytes: weights and buffers in the model, expert tensors left out.
        loaded_expert_bytes: of resident experts, written to the destinations; page edges are not in it.
        read_bytes: read from the checkpoint's files.
        seconds: in all.
        rss_before_bytes: resident memory of the process when loading began.
        peak_rss_bytes: its highest value while loading (where the kernel does not let a process reset
            its own peak: since the process began).
    """

    dense_bytes: int
    loaded_expert_bytes: int
    read_bytes: int
    seconds: float
    rss_before_bytes: int
    peak_rss_bytes: int


def inspect_checkpoint(
    model_dir: str | PathLike[str], dtype: str | torch.dtype | None = None
) -> CheckpointInfo:
    """Check everything about a checkpoint that can be checked without reading weights.

    Args:
        model_dir: a directory with config.json and safetensors weights.
        dtype: ``"auto"`` (the checkpoint's own; so is None), ``"float32"``, ``"bfloat16"`` or ``"float16"``.

    Raises:
        CheckpointError: it is missing, corrupt or incomplete.
        UnsupportedModelError: the model's experts cannot be shared out.
        ValueError: ``dtype`` is not one of those.
    """
    found: list[tuple[PreTrainedModel, Any, list[ExpertLayer]]] = []

    def inspect(model: PreTrainedModel, load_config: Any, checkpoint: Checkpoint, _: Any) -> Any:
        layers = find_expert_layers(model, load_config.dtype_plan)
        _check_routing(Path(model_dir), model.config, layers)
        plan_checkpoint(model, layers, checkpoint.tensors, load_config)
        found.append((model, load_config, layers))
        raise _InspectedError

    with suppress(_InspectedError):
        from_pretrained(Path(model_dir), dtype, inspect)
    ((model, load_config, layers),) = found
    config = model.config
    return CheckpointInfo(
        config=config,
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        dtype=load_config.dtype,
        dense_bytes=_dense_bytes(model, layers, load_config.dtype_plan),
        expert_layers=tuple(layers),
    )


def load_sharded(
    model_dir: str | PathLike[str],
    dtype: str | torch.dtype | None,
    allocate: Callable[[list[ExpertLayer]], ExpertMemory],
) -> tuple[PreTrainedModel, list[ExpertLayer], LoadReport]:
    """Load a model's dense weights, and its resident experts into memory that the caller provides.

    The model comes back in eval mode on the CPU, with its expert parameters still on the meta device:
    the caller installs tensors in their place before the first forward.

    Loads of one process run one after the other. Other threads may call ``from_pretrained`` meanwhile.

    Args:
        model_dir: a directory with config.json and safetensors weights.
        dtype: ``"auto"`` (the checkpoint's own; so is None), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        allocate: called once, with the expert layers, before any weight is read.

    Raises:
        CheckpointError: it is missing, corrupt or incomplete.
        UnsupportedModelError: the model's experts cannot be shared out.
        ValueError: ``dtype`` is not one of those.
    """
    begin = time.perf_counter()
    restart_peak_rss()
    rss_before = rss_bytes()
    layers: list[ExpertLayer] = []
    loaded_bytes = read_bytes = 0

    def load(
        model: PreTrainedModel,
        load_config: Any,
        checkpoint: Checkpoint,
        load_dense: Callable[..., Any],
    ) -> Any:
        nonlocal loaded_bytes, read_bytes
        layers.extend(find_expert_layers(model, load_config.dtype_plan))
        _check_routing(Path(model_dir), model.config, layers)
        plan = plan_checkpoint(model, layers, checkpoint.tensors, load_config)
        loaded_bytes = _read_experts(plan, layers, allocate(layers))
        info, offload_index = load_dense(model, plan.dense, None, load_config)
        read_bytes = checkpoint.num_bytes_read
        for layer in layers:
            for tensor in layer.tensors:
                # Keeps Transformers from allocating and initialising it.
                getattr(layer.module, tensor.name)._is_hf_initialized = True
                info.missing_keys.discard(tensor.full_name)
        missing = missing_weights(model, info.missing_keys)
        if missing:
            raise CheckpointError(f"Transformers read no weight of {model_dir} into {missing[0]}")
        return info, offload_index

    model = from_pretrained(Path(model_dir), dtype, load)
    report = LoadReport(
        dense_bytes=_dense_bytes(model, layers, {}),
        loaded_expert_bytes=loaded_bytes,
        read_bytes=read_bytes,
        seconds=time.perf_counter() - begin,
        rss_before_bytes=rss_before,
        peak_rss_bytes=peak_rss_bytes(),
    )
    return model, layers, report


def _check_routing(path: Path, config: PreTrainedConfig, layers: Sequence[ExpertLayer]) -> None:
    num_experts = min(layer.num_experts for layer in layers)
    top_k = getattr(config, "num_experts_per_tok", None)
    if isinstance(top_k, int) and not 1 <= top_k <= num_experts:
        raise CheckpointError(
            f"{path / 'config.json'}: num_experts_per_tok is {top_k}, but a layer has {num_experts} "
            "experts; a token goes to at least 1 and at most all of them"
        )


def _read_experts(plan: CheckpointPlan, layers: Sequence[ExpertLayer], memory: ExpertMemory) -> int:
    """Read every resident expert to its destination; returns the bytes written there."""
    resident = {layer.path: memory.resident(layer) for layer in layers}
    num_bytes = 0
    for conversion in plan.experts:
        for expert in resident[conversion.tensors[0].module_path]:
            destinations = {
                tensor.full_name: memory.destination(tensor, expert)
                for tensor in conversion.tensors
            }
            conversion.read(expert, destinations)
            num_bytes += sum(tensor.expert_bytes for tensor in conversion.tensors)
    return num_bytes


class _InspectedError(Exception):
    """Ends a from_pretrained that was only wanted for its model on the meta device."""


def _dense_bytes(model: PreTrainedModel, layers: Sequence[ExpertLayer], dtype_plan: Any) -> int:
    """Bytes of all parameters and buffers that are not expert tensors, tied ones counted once."""
    skipped = {tensor.full_name for layer in layers for tensor in layer.tensors}
    skipped |= set(model.all_tied_weights_keys or {})
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return sum(
        tensor.numel() * loading_dtype(name, tensor.dtype, dtype_plan).itemsize
        for name, tensor in tensors
        if name not in skipped
    )
