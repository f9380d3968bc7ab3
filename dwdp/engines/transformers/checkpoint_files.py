"""What Transformers would wait for, or pass over without a word, in a checkpoint's directory."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from dwdp.engines.transformers.checkpoint import CheckpointError, read_json

_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja")


def check_checkpoint_files(model_dir: str | Path) -> None:
    """Refuse files that cannot be read to their end, and a generation config that cannot be used.

    What is missing is left to the loader, which says so.

    Raises:
        CheckpointError: the text names the file.
    """
    path = Path(model_dir)
    if path.is_dir():
        _refuse_special_files(path)
        _check_generation_config(path / "generation_config.json")


def _refuse_special_files(model_dir: Path) -> None:
    for path in sorted(model_dir.iterdir()):
        if not path.name.endswith(_SUFFIXES) or not path.exists():
            continue
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            # Reading a FIFO would wait for somebody to write to it.
            kind = "a FIFO" if stat.S_ISFIFO(mode) else "a socket or a device"
            raise CheckpointError(f"{path} is {kind}, not a file")


def _check_generation_config(path: Path) -> None:
    """Transformers goes on with defaults when it cannot read this file."""
    from transformers import GenerationConfig

    if not os.path.lexists(path):
        return
    settings = read_json(path)
    try:
        GenerationConfig.from_dict(settings)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path} is not usable: {reason}") from error
