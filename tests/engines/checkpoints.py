"""Random-weight checkpoints, written by Transformers' own save_pretrained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from dwdp.engines.transformers.architectures import ARCHITECTURES as ALL_ARCHITECTURES
from dwdp.engines.transformers.architectures import tiny_config

ARCHITECTURES: tuple[str, ...] = ALL_ARCHITECTURES
VOCAB_SIZE = 128


def make_checkpoint(
    arch: str, path: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Path:
    """Write a tiny checkpoint of ``arch`` to ``path``, in the format its published checkpoints have."""
    make_model(arch, seed, dtype, **overrides).save_pretrained(path)
    return path


def make_model(
    arch: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A tiny model of ``arch`` in which no two weights are alike."""
    config = tiny_config(arch, "tiny", vocab_size=VOCAB_SIZE, **overrides)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms start at one and biases at zero: a mix-up among them would not show.
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model
