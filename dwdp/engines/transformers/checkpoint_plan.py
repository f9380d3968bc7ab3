"""Which checkpoint tensors feed which parameter of a model: its experts, and the dense rest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dwdp.engines.transformers.checkpoint import CheckpointError, LazyTensor
from dwdp.engines.transformers.contract import internals, loading_dtype
from dwdp.engines.transformers.conversion import Conversion, ExpertConversion
from dwdp.engines.transformers.experts import ExpertLayer, ExpertTensor, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class CheckpointPlan:
    """What is read for one rank: all of ``dense``, and single experts through ``experts``."""

    dense: dict[str, LazyTensor]
    experts: list[ExpertConversion]


def plan_checkpoint(
    model: PreTrainedModel,
    layers: Sequence[ExpertLayer],
    tensors: Mapping[str, LazyTensor],
    load_config: Any,
) -> CheckpointPlan:
    """Split a checkpoint into experts and the dense rest, and check that it has all of ``model``.

    Args:
        model: on the meta device.
        tensors: the checkpoint's tensors by key.
        load_config: Transformers' LoadStateDictConfig for the model.

    Raises:
        CheckpointError: a weight of the model is missing, or has another shape.
        UnsupportedModelError: experts are stored in a way that one expert cannot be read from.
    """
    expert_tensors = {tensor.full_name: tensor for layer in layers for tensor in layer.tensors}
    parameters = model.state_dict()
    dense = dict(tensors)
    experts: list[ExpertConversion] = []
    present: set[str] = set()
    for conversion in _group_by_target(
        model, parameters, tensors, load_config.weight_mapping or []
    ):
        if conversion.target in expert_tensors:
            experts.append(ExpertConversion(model, conversion, expert_tensors))
            present.update(tensor.full_name for tensor in experts[-1].tensors)
            for key in conversion.keys:
                del dense[key]
        else:
            dtype = loading_dtype(
                conversion.target, parameters[conversion.target].dtype, load_config.dtype_plan
            )
            for key in conversion.keys:
                dense[key].cast_to = dtype
            present.update(_check_dense(model, conversion, parameters, expert_tensors))
    missing = missing_weights(model, parameters.keys() - present)
    if missing:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise CheckpointError(
            f"the checkpoint lacks {missing[0]}{others}: it does not belong to its config.json, or is "
            "incomplete. Fetch it again"
        )
    return CheckpointPlan(dense, experts)


def missing_weights(model: PreTrainedModel, absent: Iterable[str]) -> list[str]:
    """Those of the ``absent`` weights that nothing else supplies: tied ones and ignorable ones left out."""
    names = set(absent)
    for target, source in (model.all_tied_weights_keys or {}).items():
        if target not in names or source not in names:
            names -= {target, source}
    ignorable = model._keys_to_ignore_on_load_missing or ()
    return sorted(name for name in names if not any(re.search(p, name) for p in ignorable))


def _group_by_target(
    model: PreTrainedModel,
    parameters: Mapping[str, torch.Tensor],
    tensors: Mapping[str, LazyTensor],
    weight_mapping: Sequence[Any],
) -> list[Conversion]:
    """Checkpoint tensors by the parameter they become, as Transformers' own loading groups them.

    Follows convert_and_load_state_dict_in_model in transformers/core_model_loading.py (5.17). Keys that
    match no parameter are left out: Transformers ignores them.
    """
    hf = internals()
    # Renaming marks what was used and may depend on what came before: work on a copy.
    mapping = deepcopy(list(weight_mapping))
    renamings = [entry for entry in mapping if isinstance(entry, hf.WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, hf.WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    conversions: dict[str, Conversion] = {}
    for key in sorted(tensors, key=hf.dot_natural_key):
        prefix = model.base_model_prefix
        target, pattern = hf.rename_source_key(key, renamings, converters, prefix, parameters)
        if target not in parameters and key in parameters:
            target, pattern = hf.rename_source_key(key, [], [], prefix, parameters)
        if target not in parameters:
            continue
        if target not in conversions:
            converter = None if pattern is None else deepcopy(by_pattern[pattern])
            conversions[target] = Conversion(target, converter)
        sources = conversions[target].sources
        sources.setdefault(key if pattern is None else pattern, []).append(tensors[key])
    return list(conversions.values())


def _check_dense(
    model: PreTrainedModel,
    conversion: Conversion,
    parameters: Mapping[str, torch.Tensor],
    expert_tensors: Mapping[str, ExpertTensor],
) -> Iterable[str]:
    """Check the shapes of what ``conversion`` gives; returns the names of those parameters."""
    metas = {
        pattern: [
            torch.empty(source.shape, dtype=source.dtype, device="meta") for source in sources
        ]
        for pattern, sources in conversion.sources.items()
    }
    outputs = conversion.apply(model, metas)
    for name, output in outputs.items():
        if name in expert_tensors:
            raise UnsupportedModelError(
                f"{conversion.keys[0]} becomes both {conversion.target} and the expert tensor {name}: "
                "experts stored together with dense weights cannot be shared out"
            )
        if name in parameters and output.shape != parameters[name].shape:
            raise CheckpointError(
                f"{conversion.keys[0]} gives {name} the shape {list(output.shape)}, but config.json "
                f"makes it {list(parameters[name].shape)}"
            )
    return outputs
