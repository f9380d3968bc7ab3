"""What a rank reads of a checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dwdp.engines.tensorrt_llm import checkpoint, sharding

EXPERT_BYTES = 256 << 10


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """A dense weight; six experts of one layer, spread over two files, with a small scale each."""
    large = torch.ones(EXPERT_BYTES, dtype=torch.uint8)
    name = "model.layers.0.mlp.experts"
    first = {f"{name}.{e}.up_proj.weight": large * e for e in range(4)}
    second = {f"{name}.{e}.up_proj.weight": large * e for e in range(4, 6)}
    scales = {f"{name}.{e}.up_proj.input_scale": torch.tensor(float(e)) for e in range(6)}
    save_file(
        {**first, "model.embed.weight": large * 9}, tmp_path / "1.safetensors", {"format": "pt"}
    )
    save_file({**second, **scales}, tmp_path / "2.safetensors")
    return [str(tmp_path / "1.safetensors"), str(tmp_path / "2.safetensors")]


def wanted(files: list[str], resident_of: sharding.ResidentOf) -> set[str]:
    """Names of the tensors that lie in the wanted ranges, whole."""
    indexes = [checkpoint.read_index(Path(file)) for file in files]
    return {
        tensor.name
        for tensors, ranges in zip(
            indexes, checkpoint.wanted_ranges(indexes, resident_of), strict=True
        )
        for tensor in tensors
        if any(start <= tensor.start and tensor.stop <= stop for start, stop in ranges)
    }


def test_the_index_says_where_tensors_lie(files: list[str]) -> None:
    for tensor in checkpoint.read_index(Path(files[0])):
        data = Path(files[0]).read_bytes()[tensor.start : tensor.stop]
        value = 9 if "embed" in tensor.name else int(tensor.name.split(".")[5])
        assert tensor.name and len(data) == EXPERT_BYTES and set(data) == {value}


def test_large_tensors_of_remote_experts_are_left_out(files: list[str]) -> None:
    counts = []

    def resident_of(num_experts: int) -> list[int]:
        counts.append(num_experts)
        return [0, 5]

    names = wanted(files, resident_of)
    assert counts == [6]
    assert {name for name in names if name.endswith("weight")} == {
        "model.embed.weight",
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.0.mlp.experts.5.up_proj.weight",
    }
    assert sum(name.endswith("input_scale") for name in names) == 6


def test_experts_that_cannot_be_placed_are_read(files: list[str]) -> None:
    def resident_of(_: int) -> list[int]:
        raise ValueError("7 ranks cannot share 6 experts")

    assert len(wanted(files, resident_of)) == 13


@pytest.mark.parametrize(
    "content", [b"", b"\x08", (1 << 40).to_bytes(8, "little"), b"\x04" + bytes(7) + b"null"]
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"not a safetensors file|Expecting value"):
        checkpoint.read_index(path)


def test_neighbours_are_read_in_one_go(tmp_path: Path) -> None:
    entries = {f"t{k}": {"data_offsets": [4 * k, 4 * k + 4]} for k in range(3)}
    header = json.dumps({"__metadata__": {}, **entries}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    index = checkpoint.read_index(path)
    data = 8 + len(header)
    assert checkpoint.wanted_ranges([index], lambda _: ()) == [[(data, data + 12)]]


@pytest.mark.trtllm
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_rank_reads_its_share_and_holds_no_copy_of_the_checkpoint(tmp_path: Path) -> None:
    """TensorRT-LLM's own loader: what it returns is mapped, and prefetching leaves remote experts out."""
    from tensorrt_llm._torch.models.checkpoints.hf.weight_loader import HfWeightLoader
    from tensorrt_llm.mapping import Mapping

    expert = torch.ones(8 << 20, dtype=torch.uint8)
    tensors = {f"layers.0.mlp.experts.{e}.down_proj.weight": expert * e for e in range(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    held_before = _proc_bytes("status", "RssAnon") * 1024
    read = []
    for resident_of in (None, lambda _: (3,)):
        read_before = _proc_bytes("io", "rchar")
        if resident_of is None:
            weights = HfWeightLoader().load_weights(str(tmp_path), Mapping())
        else:
            with sharding.resident_experts_only(resident_of):
                weights = HfWeightLoader().load_weights(str(tmp_path), Mapping())
        read.append(_proc_bytes("io", "rchar") - read_before)
        assert int(weights["layers.0.mlp.experts.3.down_proj.weight"][-1]) == 3
        assert len(weights) == 8
    held = _proc_bytes("status", "RssAnon") * 1024 - held_before
    whole, share = read
    assert whole > 64 << 20
    assert 8 << 20 <= share < 16 << 20
    assert held < 32 << 20


def _proc_bytes(file: str, key: str) -> int:
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
