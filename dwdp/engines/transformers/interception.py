"""Transformers' own from_pretrained, with the step that reads weights replaced."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dwdp.engines.transformers.checkpoint import (
    Checkpoint,
    CheckpointError,
    open_checkpoint,
    read_json,
)
from dwdp.engines.transformers.checkpoint_files import check_checkpoint_files
from dwdp.engines.transformers.contract import internals
from dwdp.engines.transformers.experts import UnsupportedModelError, refuse_quantized

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

DTYPES = ("auto", "float32", "bfloat16", "float16")

# Called with the model on the meta device, Transformers' LoadStateDictConfig, the open checkpoint, and
# Transformers' own _load_pretrained_model; returns what that returns.
ReadWeights = Callable[..., Any]


def from_pretrained(
    model_dir: Path, dtype: str | torch.dtype | None, read_weights: ReadWeights
) -> PreTrainedModel:
    """``AutoModelForCausalLM.from_pretrained`` with ``read_weights`` in place of its reading of weights.

    Only local files are used, and no code from the checkpoint is run.

    Args:
        dtype: one of :data:`DTYPES` or the torch dtype of that name; None is ``"auto"``.

    Raises:
        CheckpointError: config.json or the files cannot be used.
        UnsupportedModelError: the model is quantised, unknown, or not a causal language model.
        ValueError: ``dtype`` is not one of those.
    """
    from transformers import AutoModelForCausalLM

    name = "auto" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}: use one of {', '.join(DTYPES)}")
    internals()
    check_checkpoint_files(model_dir)
    config = _read_config(model_dir)
    with open_checkpoint(model_dir, getattr(config, "transformers_weights", None)) as checkpoint:
        _check_sizes(model_dir, config, checkpoint)
        began = False

        def begin(model: Any, load_config: Any, original: Any) -> Any:
            nonlocal began
            began = True
            return read_weights(model, load_config, checkpoint, original)

        with _weights_read_by(begin):
            try:
                return AutoModelForCausalLM.from_pretrained(
                    str(model_dir),
                    dtype=name,
                    local_files_only=True,
                    trust_remote_code=False,
                    use_safetensors=True,
                )
            except Exception as error:
                if began:
                    raise
                raise CheckpointError(
                    f"{model_dir / 'config.json'} does not describe a model that can be built: "
                    f"{type(error).__name__}: {_one_line(error)}"
                ) from error


def _read_config(model_dir: Path) -> PreTrainedConfig:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    if not model_dir.is_dir():
        raise CheckpointError(
            f"{model_dir} is not a directory: give the one that holds the checkpoint's config.json"
        )
    path = model_dir / "config.json"
    settings = read_json(path)
    model_type = settings.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{path} has no model_type")
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{path}: model_type {model_type} is not known to the installed Transformers, and dwdp runs "
            "no code from a checkpoint. Install a newer transformers"
        )
    refuse_quantized(settings)
    try:
        config = AutoConfig.from_pretrained(
            str(model_dir), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise CheckpointError(
            f"{path} is not usable: {type(error).__name__}: {_one_line(error)}"
        ) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"{path}: {model_type} is not a causal language model, the only kind dwdp runs"
        )
    return config


_active: ContextVar[ReadWeights | None] = ContextVar("dwdp_read_weights", default=None)
_patch_lock = threading.RLock()


def _check_sizes(model_dir: Path, config: PreTrainedConfig, checkpoint: Checkpoint) -> None:
    """Refuse sizes far beyond what the checkpoint holds: building such a model would take for ever.

    A layer has a tensor at least, and a router a row for every expert.
    """
    tensors = checkpoint.tensors.values()
    num_rows = max((extent for tensor in tensors for extent in tensor.shape), default=0)
    limits = {
        "num_hidden_layers": len(tensors),
        "num_experts": max(num_rows, len(tensors)),
        "num_local_experts": max(num_rows, len(tensors)),
        "n_routed_experts": max(num_rows, len(tensors)),
    }
    for name, limit in limits.items():
        value = getattr(config, name, None)
        if isinstance(value, int) and value > limit:
            raise CheckpointError(
                f"{model_dir / 'config.json'}: {name} is {value}, but the checkpoint's tensors leave "
                f"room for {limit} at most"
            )


@contextmanager
def _weights_read_by(read_weights: ReadWeights) -> Iterator[None]:
    """Within, from_pretrained in this context calls ``read_weights(model, load_config, original)``.

    The patch is on the class and so seen by every thread, but it applies to the context it was made in:
    others fall through to the original. The lock keeps two loads from restoring each other's patch.
    """
    from transformers import PreTrainedModel

    original = internals()._load_pretrained_model

    def dispatch(
        model: Any,
        state_dict: Any,
        checkpoint_files: Any,
        load_config: Any,
        *rest: Any,
        **more: Any,
    ) -> Any:
        active = _active.get()
        if active is None:
            return original(model, state_dict, checkpoint_files, load_config, *rest, **more)
        return active(model, load_config, original)

    with _patch_lock:
        token = _active.set(read_weights)
        PreTrainedModel._load_pretrained_model = staticmethod(dispatch)  # type: ignore[method-assign]
        try:
            yield
        finally:
            PreTrainedModel._load_pretrained_model = staticmethod(original)  # type: ignore[method-assign]
            _active.reset(token)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
