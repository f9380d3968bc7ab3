"""What dwdp relies on inside Transformers beyond its public interface, checked in one place."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Mapping
from functools import cache
from operator import attrgetter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MINIMUM_VERSION = (5, 17)

_LOADING = "transformers.core_model_loading"
_MODELING = "transformers.modeling_utils"

# (module, attribute, the leading parameters or dataclass fields dwdp uses)
_SYMBOLS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        _MODELING,
        "PreTrainedModel._load_pretrained_model",
        ("model", "state_dict", "checkpoint_files", "load_config"),
    ),
    (_MODELING, "LoadStateDictConfig", ("weight_mapping", "dtype_plan")),
    (
        _LOADING,
        "rename_source_key",
        (
            "source_key",
            "weight_renamings",
            "weight_converters",
            "base_model_prefix",
            "meta_state_dict",
        ),
    ),
    (_LOADING, "dot_natural_key", ("s",)),
    (_LOADING, "WeightRenaming", ()),
    (_LOADING, "WeightConverter", ("source_patterns", "target_patterns", "operations")),
    (
        _LOADING,
        "WeightConverter.add_tensor",
        ("self", "target_key", "source_key", "source_pattern", "future"),
    ),
    (_LOADING, "WeightConverter.convert", ("self", "layer_name", "model", "config")),
    (_LOADING, "MergeModulelist", ("dim",)),
    (_LOADING, "Concatenate", ("dim", "num_shards_attribute")),
    (_LOADING, "Chunk", ("dim", "num_shards_attribute")),
    (_LOADING, "Interleave", ("dim",)),
    (_LOADING, "Transpose", ("dim0", "dim1", "check_dims")),
    ("transformers.integrations.moe", "use_experts_implementation", ()),
)


class IncompatibleTransformersError(RuntimeError):
    """The installed Transformers lacks something that dwdp's loading is built on."""


@cache
def internals() -> SimpleNamespace:
    """Transformers' internals by their own names, after checking that they are what dwdp expects.

    Raises:
        IncompatibleTransformersError: the version is too old, or the symbols named in the text moved.
    """
    import transformers

    version = transformers.__version__
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < MINIMUM_VERSION:
        wanted = ".".join(map(str, MINIMUM_VERSION))
        raise IncompatibleTransformersError(
            f"transformers {version} is too old: dwdp needs transformers >= {wanted}"
        )
    found: dict[str, Any] = {}
    problems = []
    for module, name, wanted_names in _SYMBOLS:
        try:
            symbol = attrgetter(name)(importlib.import_module(module))
        except (ImportError, AttributeError):
            problems.append(f"{module}.{name} is gone")
            continue
        names = _parameter_names(symbol)
        lacking = [wanted for wanted in wanted_names if wanted not in names]
        if lacking:
            problems.append(f"{module}.{name} no longer takes {', '.join(lacking)}")
        found[name.rpartition(".")[2]] = symbol
    if problems:
        raise IncompatibleTransformersError(
            f"transformers {version} changed what dwdp's loading is built on: {'; '.join(problems)}. "
            "Install the version named in constraints.txt, or a newer dwdp"
        )
    return SimpleNamespace(**found)


def loading_dtype(
    name: str, dtype: torch.dtype, dtype_plan: Mapping[str, torch.dtype]
) -> torch.dtype:
    """The dtype in which Transformers loads parameter ``name`` of a model built in ``dtype``.

    ``dtype_plan`` maps name patterns (regular expressions in which ``*`` stands for anything) to
    dtypes: the parameters a model keeps in float32 whatever the rest is in.
    """
    for pattern, planned in dtype_plan.items():
        if re.search(pattern.replace("*", ".*"), name):
            return planned
    return dtype


def _parameter_names(symbol: Any) -> set[str]:
    if dataclasses.is_dataclass(symbol):
        return {field.name for field in dataclasses.fields(symbol)}
    return set(inspect.signature(symbol).parameters)
