"""A rank reads from the checkpoint the experts that it stores, and what all ranks need.

TensorRT-LLM maps safetensors files into memory, so what nobody touches is not read, and no second copy of
the model is held: mapped pages belong to the page cache, which all processes of a host share. But before
that it reads every file as a whole, to have it in the page cache. That is where the other ranks' experts are
left out. The mapped tensors themselves stay complete: some models look at all experts' while they load.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from dwdp.engines.tensorrt_llm.sharding import ResidentOf, active_resident_of

_EXPERT = re.compile(r"(?P<layer>.*\bexperts\.)(?P<expert>\d+)\.")

_SMALL_BYTES = 1 << 16
"""Scales of all experts are read: they are small, and loading looks at them one by one."""

_READ_BYTES = 16 << 20
_NUM_READERS = 16


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file: its name, and the bytes ``[start, stop)`` of the file it lies in."""

    name: str
    start: int
    stop: int


def read_index(path: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file, in the order of their bytes.

    Format: 8 bytes with the length of a JSON object, the object, then the data that its offsets count from.

    Raises:
        ValueError: the file is not a safetensors file.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length)) if length < path.stat().st_size else None
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a safetensors file")
    data = 8 + length
    tensors = [
        StoredTensor(name, *(data + offset for offset in entry["data_offsets"]))
        for name, entry in header.items()
        if name != "__metadata__"
    ]
    return sorted(tensors, key=lambda tensor: tensor.start)


def wanted_ranges(
    files: Sequence[Sequence[StoredTensor]], resident_of: ResidentOf
) -> list[list[tuple[int, int]]]:
    """Per file, the bytes that a rank needs: all but the large tensors of experts it does not store.

    The number of experts of a layer is taken from their names. Where they cannot be placed, all are wanted:
    they are not those of a layer that is shared out.
    """
    last: dict[str, int] = defaultdict(int)
    for tensors in files:
        for tensor in tensors:
            if match := _EXPERT.match(tensor.name):
                last[match["layer"]] = max(last[match["layer"]], int(match["expert"]))
    resident = {layer: _resident(resident_of, expert + 1) for layer, expert in last.items()}
    wanted: list[list[tuple[int, int]]] = []
    for tensors in files:
        ranges: list[tuple[int, int]] = []
        for tensor in tensors:
            match = _EXPERT.match(tensor.name)
            is_small = tensor.stop - tensor.start <= _SMALL_BYTES
            if match and not is_small and int(match["expert"]) not in resident[match["layer"]]:
                continue
            if ranges and ranges[-1][1] == tensor.start:
                ranges[-1] = (ranges[-1][0], tensor.stop)
            else:
                ranges.append((tensor.start, tensor.stop))
        wanted.append(ranges)
    return wanted


def patch(module: ModuleType) -> None:
    """Let ``HfWeightLoader`` of ``tensorrt_llm._torch.models.checkpoints.hf.weight_loader`` prefetch less."""
    loader = module.HfWeightLoader
    original = loader.prefetch_files

    @functools.wraps(original)
    def prefetch_files(self: Any, file_names: list[str]) -> None:
        resident_of = active_resident_of()
        if resident_of is None:
            original(self, file_names)
        else:
            _prefetch(functools.partial(original, self), file_names, resident_of)

    loader.prefetch_files = prefetch_files


def _prefetch(
    whole: Callable[[list[str]], None], file_names: list[str], resident_of: ResidentOf
) -> None:
    from tensorrt_llm.logger import logger

    try:
        files = [read_index(Path(name)) for name in file_names]
    except (ValueError, KeyError):
        # Loading will say better what is wrong with a file, or knows it.
        whole(file_names)
        return
    wanted = wanted_ranges(files, resident_of)
    num_bytes = sum(stop - start for ranges in wanted for start, stop in ranges)
    total_bytes = sum(Path(name).stat().st_size for name in file_names)
    logger.info(
        f"dwdp: prefetching {num_bytes / 1e9:.1f} of {total_bytes / 1e9:.1f} GB of checkpoint files: "
        "without the weights of experts that this rank does not store"
    )
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        list(pool.map(_read, file_names, wanted))


def _read(file_name: str, ranges: list[tuple[int, int]]) -> None:
    """Read ``ranges``, for the page cache to keep."""
    buffer = memoryview(bytearray(_READ_BYTES))
    descriptor = os.open(file_name, os.O_RDONLY)
    try:
        for start, stop in ranges:
            while start < stop:
                num_read = os.preadv(descriptor, [buffer[: stop - start]], start)
                if num_read == 0:
                    return
                start += num_read
    finally:
        os.close(descriptor)


def _resident(resident_of: ResidentOf, num_experts: int) -> frozenset[int]:
    try:
        return frozenset(resident_of(num_experts))
    except ValueError:
        return frozenset(range(num_experts))
