"""Random-weight checkpoints of MoE architectures, in the format that their real ones have.

Weights are made, converted and written one decoder layer at a time, so a checkpoint may be larger
than the machine's memory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from dwdp.engines.transformers.architectures import ARCHITECTURES, Preset, tiny_config
from dwdp.engines.transformers.experts import find_expert_layers

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
SPECIAL_TOKENS = (PAD, BOS, EOS)
VOCAB_SIZE = len(SPECIAL_TOKENS) + 256
SHARD_BYTES = 512 << 20
"""A safetensors file ends with the layer that brings it to this size."""

DtypeName = Literal["float32", "bfloat16"]
_DTYPES: dict[DtypeName, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`write_checkpoint` wrote. ``num_experts`` is per MoE layer; bytes are those
    of the tensors in the safetensors files, ``expert_bytes`` of routed experts in all layers."""

    path: Path
    arch: str
    dtype: DtypeName
    num_layers: int
    num_moe_layers: int
    num_experts: int
    num_parameters: int
    num_bytes: int
    expert_bytes: int
    num_files: int


def write_checkpoint(
    out: Path,
    arch: str,
    *,
    preset: Preset = "tiny",
    seed: int = 0,
    dtype: DtypeName = "float32",
    expert_bytes: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Checkpoint:
    """Write a random-weight checkpoint, its configuration and its tokenizer to the folder ``out``.

    The same arguments and versions give the same bytes. Peak memory is about twice one layer plus
    ``SHARD_BYTES``. The files are written to a folder beside ``out`` that takes its place at the end.

    Args:
        arch: one of ``ARCHITECTURES``.
        preset: the size to start from, see :func:`tiny_config`.
        seed: of the weights.
        dtype: what the weights are stored as.
        expert_bytes: about how much the experts of all layers should hold together: the experts'
            intermediate size is chosen for it (a multiple of 16).
        overrides: what replaces the preset's sizes: ``num_experts``, or any configuration field.
        force: replace a checkpoint that ``out`` holds.
        progress: called with the bytes written so far and their final number.

    Raises:
        ValueError: the architecture is not known, the configuration makes no model with experts, the
            disk is too small, or ``out`` is in use and may not be replaced.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(
            f"architecture {arch!r} is not known: use one of {', '.join(ARCHITECTURES)}"
        )
    out = out.resolve()
    _check_out(out, force)
    config, model = _build(arch, preset, dtype, expert_bytes, overrides or {})
    layers = find_expert_layers(model)
    # Counted here, because writing parts the tensors that are tied.
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    kept = _kept_tensors(model)
    num_bytes = sum(tensor.nbytes for tensor in kept.values())
    _check_disk(out, num_bytes)

    with _replacing(out) as folder:
        config.architectures = [type(model).__name__]
        config.dtype = dtype
        config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        byte_tokenizer(config.max_position_embeddings).save_pretrained(folder)
        num_files = _write_weights(model, kept, seed, folder, num_bytes, progress)
    return Checkpoint(
        path=out,
        arch=arch,
        dtype=dtype,
        num_layers=config.num_hidden_layers,
        num_moe_layers=len(layers),
        num_experts=max(layer.num_experts for layer in layers),
        num_parameters=num_parameters,
        num_bytes=num_bytes,
        expert_bytes=sum(layer.num_bytes for layer in layers),
        num_files=num_files,
    )


def byte_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer without training: the special tokens are 0 to 2, and the byte ``b`` is ``b + 3``."""
    tokens = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _build(
    arch: str,
    preset: Preset,
    dtype: DtypeName,
    expert_bytes: int | None,
    overrides: Mapping[str, Any],
) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """The configuration, and its model on the meta device."""
    default = tiny_config(arch, preset, VOCAB_SIZE)
    if "vocab_size" in overrides:
        raise ValueError(f"vocab_size is the byte tokenizer's, {VOCAB_SIZE}: it cannot be set")
    unknown = [name for name in overrides if name != "num_experts" and not hasattr(default, name)]
    if unknown:
        raise ValueError(f"the configuration of {arch} has no field {', '.join(unknown)}")

    def build(extra: Mapping[str, Any]) -> tuple[PreTrainedConfig, PreTrainedModel]:
        fields = {**overrides, **extra}
        try:
            config = tiny_config(arch, preset, VOCAB_SIZE, **fields)
            if hasattr(config, "initializer_range") and "initializer_range" not in fields:
                # At the usual 0.02 a narrow model's experts hardly change its output.
                config.initializer_range = config.hidden_size**-0.5
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=_DTYPES[dtype])
        except Exception as error:
            if not fields:
                raise
            given = ", ".join(f"{name}={value!r}" for name, value in fields.items())
            raise ValueError(f"{arch} cannot be built with {given}: {error}") from error
        return config, model

    config, model = build({})
    if expert_bytes is None:
        return config, model
    width = (
        "moe_intermediate_size" if hasattr(config, "moe_intermediate_size") else "intermediate_size"
    )
    if width in overrides:
        raise ValueError(f"{width} follows from the experts' bytes: give one of the two")
    # Experts' bytes are proportional to their width, but for biases.
    present = sum(layer.num_bytes for layer in find_expert_layers(model))
    scaled = getattr(config, width) * expert_bytes / present
    return build({width: max(16, round(scaled / 16) * 16)})


def _kept_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors of ``model`` that its checkpoint has, by the model's own names."""
    state = remove_tied_weights_from_state_dict(model.state_dict(), model)
    ignored = set(model._keys_to_ignore_on_save or ())
    return {name: tensor for name, tensor in state.items() if name not in ignored}


def _write_weights(
    model: PreTrainedModel,
    kept: Mapping[str, torch.Tensor],
    seed: int,
    folder: Path,
    num_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> int:
    """Write the safetensors files (and their index when there are several); returns how many."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    written = 0

    def flush() -> None:
        nonlocal written
        path = folder / _shard_name(len(shards))
        save_file(pending, path, metadata={"format": "pt"})
        # safetensors makes files that only their owner may read.
        path.chmod((folder / "config.json").stat().st_mode)
        shards.append(list(pending))
        written += sum(tensor.nbytes for tensor in pending.values())
        pending.clear()
        if progress is not None:
            progress(written, num_bytes)

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for group in _module_groups(model):
            state = _initialise(model, group, kept)
            for name, tensor in revert_weight_conversion(model, state).items():
                pending[name] = tensor.contiguous()
            if sum(tensor.nbytes for tensor in pending.values()) >= SHARD_BYTES:
                flush()
    if pending:
        flush()
    _name_shards(folder, shards, num_bytes)
    return len(shards)


def _module_groups(model: PreTrainedModel) -> Iterator[dict[str, nn.Module]]:
    """The modules of ``model`` by name: first those outside its lists of layers, then each layer's."""
    layers: dict[str, nn.Module] = {}

    def outside(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        yield prefix, module
        for name, child in module.named_children():
            path = f"{prefix}.{name}" if prefix else name
            if isinstance(child, nn.ModuleList):
                layers.update((f"{path}.{index}", layer) for index, layer in child.named_children())
            else:
                yield from outside(path, child)

    yield dict(outside("", model))
    for prefix, layer in layers.items():
        yield dict(layer.named_modules(prefix=prefix))


def _initialise(
    model: PreTrainedModel, group: Mapping[str, nn.Module], kept: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Random values for the tensors of one group of modules, by name; the modules stay on meta."""
    std = getattr(model.config, "initializer_range", 0.02)
    for module in group.values():
        module.to_empty(device="cpu", recurse=False)
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            tensor.zero_()
    # Children before their parents, as Transformers does it.
    for module in reversed(list(group.values())):
        model._init_weights(module)
    state = {}
    for prefix, module in group.items():
        for name, tensor in [
            *module.named_parameters(prefix, recurse=False),
            *module.named_buffers(prefix, recurse=False),
        ]:
            if name not in kept:
                continue
            # Zeros (biases, or what the model's code leaves to be loaded) would hide an engine that
            # forgets them.
            if tensor.is_floating_point() and not tensor.any():
                tensor.normal_(0.0, std)
            state[name] = tensor.detach()
        module.to_empty(device="meta", recurse=False)
    return state


def _shard_name(index: int, count: int | None = None) -> str:
    if count == 1:
        return "model.safetensors"
    end = "" if count is None else f"-of-{count:05d}"
    return f"model-{index + 1:05d}{end}.safetensors"


def _name_shards(folder: Path, shards: list[list[str]], num_bytes: int) -> None:
    """Give the shards their final names, which say how many there are, and write their index."""
    names = [_shard_name(index, len(shards)) for index in range(len(shards))]
    for index, name in enumerate(names):
        (folder / _shard_name(index)).rename(folder / name)
    if len(shards) == 1:
        return
    weight_map = {
        tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors
    }
    index_file = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    text = json.dumps(index_file, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text)


def _check_out(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file: name a folder for the checkpoint")
    if not any(out.iterdir()):
        return
    if not force:
        raise ValueError(f"{out} is not empty: name another folder, or replace it with --force")
    if not (out / "config.json").is_file():
        raise ValueError(
            f"{out} holds no checkpoint (no config.json): --force replaces nothing else"
        )


def _check_disk(out: Path, num_bytes: int) -> None:
    existing = next(folder for folder in out.parents if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise ValueError(
            f"the checkpoint needs {num_bytes / 2**30:.2f} GiB and {existing} has "
            f"{free / 2**30:.2f} GiB free: choose a smaller model or another disk"
        )


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """An empty folder beside ``out`` that takes its place, or is removed if anything goes wrong."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    replaced = out.with_name(f".{out.name}.{os.getpid()}.replaced")
    partial.mkdir()
    try:
        yield partial
        if out.exists():
            out.rename(replaced)
        try:
            partial.rename(out)
        except BaseException:
            if replaced.exists():
                replaced.rename(out)
            raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
