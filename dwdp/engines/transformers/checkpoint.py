"""Checkpoint files on disk: safetensors read with pread, so that no file is ever mapped.

Pages of a mapped file count as the process's memory (RSS), and a rank reads only a part of each file.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_MAX_HEADER_BYTES = 100_000_000
_CAST_BLOCK_BYTES = 16 << 20
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete, corrupt or not to be read; the text names the file or key."""


class LazyTensor:
    """One tensor of a safetensors file, read when it is asked for.

    ``tensor[...]`` reads all of it, which is what Transformers' own loading does with the values of a
    state dict, and returns it in ``cast_to`` if that was set.

    Args:
        dtype_name: what the file calls the dtype. One that is not known is an error once the tensor is
            needed, not before: files may hold tensors that a model has no use for.
    """

    def __init__(
        self,
        file: SafetensorsFile,
        key: str,
        dtype_name: str,
        shape: tuple[int, ...],
        offset: int,
    ) -> None:
        self.key = key
        self.shape = shape
        self.cast_to: torch.dtype | None = None
        self._dtype_name = dtype_name
        self._file = file
        self._offset = offset

    @property
    def dtype(self) -> torch.dtype:
        """As stored.

        Raises:
            CheckpointError: dwdp does not know it.
        """
        dtype = _DTYPES.get(self._dtype_name)
        if dtype is None:
            raise CheckpointError(
                f"{self.key} in {self._file.path} has dtype {self._dtype_name}, which dwdp does not load: "
                "use a float32, bfloat16 or float16 checkpoint"
            )
        return dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of the first dimension, ``[stop - start, ...]``."""
        rows = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        self.read_elements(rows, start * prod(self.shape[1:]))
        return rows

    def read_elements(self, out: torch.Tensor, start: int = 0) -> None:
        """Fill ``out`` (contiguous, on the CPU, of this dtype) from element ``start`` on."""
        if out.numel():
            view = out.detach().reshape(-1).view(torch.uint8).numpy()
            self._file.read(view.data, self._offset + start * self.dtype.itemsize)

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = torch.empty(self.shape, dtype=self.cast_to or self.dtype)
        if tensor.dtype == self.dtype:
            self.read_elements(tensor)
        else:
            # In blocks, so that the tensor is never held in both dtypes.
            flat = tensor.reshape(-1)
            block = torch.empty(_CAST_BLOCK_BYTES // self.dtype.itemsize, dtype=self.dtype)
            for start in range(0, flat.numel(), block.numel()):
                part = flat[start : start + block.numel()]
                self.read_elements(block[: part.numel()], start)
                part.copy_(block[: part.numel()])
        return tensor if index is Ellipsis else tensor[index]

    def get_shape(self) -> list[int]:
        return list(self.shape)


class SafetensorsFile:
    """One safetensors file whose header has been read and checked against the file's length.

    Raises:
        CheckpointError: it cannot be read, its header is not valid, or it was cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes_read = 0
        self._lock = threading.Lock()
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            size = os.fstat(self._fd).st_size
            header_bytes = int.from_bytes(os.pread(self._fd, 8, 0), "little")
            if size < 8 or header_bytes > min(size - 8, _MAX_HEADER_BYTES):
                raise self._corrupt(
                    f"it is {size} bytes long and promises a header of {header_bytes}"
                )
            header = os.pread(self._fd, header_bytes, 8)
        except OSError as error:
            self.close()
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
        except CheckpointError:
            self.close()
            raise
        try:
            self.tensors = self._parse(header, 8 + header_bytes, size)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            self.close()
            if isinstance(error, CheckpointError):
                raise
            raise self._corrupt(f"its header is not valid ({error})") from None

    def read(self, out: memoryview, offset: int) -> None:
        """Fill ``out`` with the file's bytes from ``offset`` on."""
        done = 0
        while done < len(out):
            try:
                count = os.preadv(self._fd, [out[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from None
            if count == 0:
                raise self._corrupt(f"it ends at byte {offset + done}, while it is being read")
            done += count
        with self._lock:
            self.num_bytes_read += done

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _parse(self, header: bytes, start: int, size: int) -> dict[str, LazyTensor]:
        entries = json.loads(header)
        if not isinstance(entries, dict):
            raise self._corrupt("its header is no JSON object")
        entries.pop("__metadata__", None)
        tensors = {}
        end = 0
        for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            name, shape = str(entry["dtype"]), tuple(entry["shape"])
            if not all(type(number) is int for number in (*shape, *entry["data_offsets"])):
                raise self._corrupt(f"{key} has a shape or offsets that are no whole numbers")
            tensor = LazyTensor(self, key, name, shape, start + end)
            first, last = entry["data_offsets"]
            num_bytes = tensor.num_bytes if name in _DTYPES else max(0, last - first)
            if first != end or last - first != num_bytes or any(n < 0 for n in shape):
                raise self._corrupt(
                    f"{key} {list(shape)} {name} cannot lie at bytes {first} to {last}"
                )
            tensors[key] = tensor
            end = last
        if start + end != size:
            raise self._corrupt(f"it is {size} bytes long and should be {start + end}")
        return tensors

    def _corrupt(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is corrupt or incomplete: {what}. Fetch it again")


class Checkpoint:
    """All tensors of a checkpoint's files, by key. A context manager that closes the files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files: list[SafetensorsFile] = []
        self.tensors: dict[str, LazyTensor] = {}
        try:
            for path in paths:
                self._files.append(SafetensorsFile(path))
                self.tensors.update(self._files[-1].tensors)
        except CheckpointError:
            self.close()
            raise

    @property
    def num_bytes_read(self) -> int:
        return sum(file.num_bytes_read for file in self._files)

    def close(self) -> None:
        """Idempotent."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(model_dir: Path, weights_name: str | None = None) -> Checkpoint:
    """Open the checkpoint in ``model_dir``: one safetensors file, or the files its index names.

    Args:
        weights_name: the file or index to use, where config.json names one.

    Raises:
        CheckpointError: there is no such file, the index cannot be used, or a file is missing or corrupt.
    """
    single, index = model_dir / SINGLE_FILE, model_dir / INDEX_FILE
    if weights_name is not None:
        single = index = model_dir / weights_name
    if single.is_file() and not single.name.endswith(".json"):
        return Checkpoint([single])
    if not index.is_file():
        hint = ""
        if any(model_dir.glob("*.bin")):
            hint = ". Its *.bin weights have to be converted to safetensors first"
        raise CheckpointError(f"{model_dir} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")
    weight_map = _read_weight_map(index)
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (model_dir / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{model_dir} lacks {missing[0]}, one of {len(missing)} missing of the {len(names)} files "
            f"that {index.name} names. Fetch the checkpoint again"
        )
    checkpoint = Checkpoint([model_dir / name for name in names])
    absent = [key for key in weight_map if key not in checkpoint.tensors]
    if absent:
        checkpoint.close()
        raise CheckpointError(
            f"{index} says that {absent[0]} is in {weight_map[absent[0]]}, but it is in none of its files"
        )
    return checkpoint


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; CheckpointError when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def _read_weight_map(index: Path) -> Mapping[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    for key, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} places {key} in {name!r}, which is not a file name")
    return weight_map
