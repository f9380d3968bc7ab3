"""Sharded loading gives bit for bit what from_pretrained gives, and reads no more than it has to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import ARCHITECTURES, make_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, conversion_mapping, modeling_utils
from transformers.core_model_loading import Chunk, Interleave, Transpose, WeightConverter

from dwdp.engines.transformers.checkpoint import open_checkpoint
from dwdp.engines.transformers.experts import ExpertLayer, ExpertTensor, UnsupportedModelError
from dwdp.engines.transformers.loading import LoadReport, inspect_checkpoint, load_sharded

RESIDENT = (1, 2, 7)


class Memory:
    """Ordinary memory for the experts ``resident``, written over with NaN first."""

    def __init__(self, resident: Sequence[int] = RESIDENT) -> None:
        self.experts: dict[tuple[str, int], torch.Tensor] = {}
        self._resident = resident

    def resident(self, layer: ExpertLayer) -> Sequence[int]:
        return self._resident

    def destination(self, tensor: ExpertTensor, expert: int) -> torch.Tensor:
        memory = torch.full(tensor.expert_shape, torch.nan, dtype=tensor.dtype)
        return self.experts.setdefault((tensor.full_name, expert), memory)


def load(
    path: Path, dtype: str = "auto", resident: Sequence[int] = RESIDENT
) -> tuple[PreTrainedModel, Memory, LoadReport]:
    memory = Memory(resident)
    model, _, report = load_sharded(path, dtype, lambda layers: memory)
    return model, memory, report


def assert_equals_from_pretrained(path: Path, dtype: str = "auto") -> None:
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    model, memory, report = load(path, dtype)
    expert_names = {name for name, _ in memory.experts}
    assert len(memory.experts) == len(RESIDENT) * len(expert_names)
    weights = expected.state_dict()
    for (name, expert), destination in memory.experts.items():
        assert destination.dtype == weights[name].dtype, name
        assert torch.equal(destination, weights[name][expert]), (name, expert)
    for kind in ("named_parameters", "named_buffers"):
        found, wanted = dict(getattr(model, kind)()), dict(getattr(expected, kind)())
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            assert tensor.is_meta == (name in expert_names), name
            if name not in expert_names:
                assert tensor.dtype == wanted[name].dtype, name
                assert torch.equal(tensor, wanted[name]), name
    assert not model.training
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    assert report.loaded_expert_bytes == sum(t.nbytes for t in memory.experts.values())
    dense = {id(t): t.nbytes for t in [*model.parameters(), *model.buffers()] if not t.is_meta}
    assert report.dense_bytes == sum(dense.values())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_equals_from_pretrained(arch: str, tmp_path: Path) -> None:
    path = make_checkpoint(arch, tmp_path)
    assert_equals_from_pretrained(path)


# Some keep parameters in float32 whatever the rest is in; gpt_oss stores experts stacked, with biases.
@pytest.mark.parametrize("arch", ["deepseek_v3", "ernie4_5_moe", "gpt_oss", "hy_v4", "nemotron_h"])
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [(torch.float32, "bfloat16"), (torch.bfloat16, "float16"), (torch.bfloat16, "float32")],
)
def test_dtype_conversion_equals_from_pretrained(
    arch: str, stored: torch.dtype, dtype: str, tmp_path: Path
) -> None:
    path = make_checkpoint(arch, tmp_path, dtype=stored)
    assert_equals_from_pretrained(path, dtype)
    info = inspect_checkpoint(path, dtype)
    _, _, report = load(path, dtype)
    assert info.dtype == getattr(torch, dtype)
    assert info.dense_bytes == report.dense_bytes


def test_checkpoint_in_several_files(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint("qwen3_moe", tmp_path / "one"))
    model.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert_equals_from_pretrained(tmp_path / "many")


def test_checkpoint_that_stores_experts_stacked(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint("mixtral", tmp_path / "split"))
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    keys = load_file(tmp_path / "stacked/model.safetensors").keys()
    assert "model.layers.0.mlp.experts.gate_up_proj" in keys
    assert_equals_from_pretrained(tmp_path / "stacked")


GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"


def stacked_checkpoint(path: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A qwen3_moe checkpoint with stacked experts, their first layer's gate_up_proj changed."""
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint("qwen3_moe", path / "split"))
    model.save_pretrained(path / "stacked", save_original_format=False)
    edit_weights(path / "stacked", lambda w: w | {GATE_UP: change(w[GATE_UP]).contiguous()})
    return path / "stacked"


def edit_weights(
    path: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    file = path / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})


def convert_by(monkeypatch: pytest.MonkeyPatch, operation: Any) -> None:
    """Let Transformers convert qwen3_moe's stacked gate_up_proj by ``operation``."""
    conversion_mapping.get_checkpoint_conversion_mapping("qwen3_moe")
    cache = conversion_mapping._checkpoint_conversion_mapping_cache
    name = "mlp.experts.gate_up_proj"
    monkeypatch.setitem(cache, "qwen3_moe", [WeightConverter(name, name, [operation])])


@pytest.mark.parametrize(
    ("operation", "change"),
    [
        (Transpose(1, 2, check_dims=True), lambda w: w.transpose(1, 2)),
        (Interleave(dim=1), lambda w: w),
    ],
)
def test_conversion_of_stacked_experts(
    operation: Any,
    change: Callable[[torch.Tensor], torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = stacked_checkpoint(tmp_path, change)
    convert_by(monkeypatch, operation)
    assert_equals_from_pretrained(path)


@pytest.mark.parametrize("operation", [Transpose(0, 2), Interleave(dim=0), Chunk(dim=-3)])
def test_refuses_conversion_that_mixes_experts(
    operation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stacked_checkpoint(tmp_path, lambda w: w)
    convert_by(monkeypatch, operation)
    with pytest.raises(UnsupportedModelError, match="not known to keep experts apart"):
        inspect_checkpoint(path)


@pytest.mark.parametrize("arch", ["qwen3_moe", "gpt_oss"])
def test_reads_only_what_the_rank_needs(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_checkpoint(arch, tmp_path)
    expert_bytes, num_experts = whole_experts(path)
    with open_checkpoint(path) as checkpoint:
        file_bytes = sum(tensor.num_bytes for tensor in checkpoint.tensors.values())
    dense_file_bytes = file_bytes - expert_bytes

    def mapped(*_: Any, **__: Any) -> None:
        raise AssertionError("a file was mapped")

    monkeypatch.setattr(modeling_utils, "safe_open", mapped)
    before = num_bytes_read_by_process()
    _, _, report = load(path, resident=[3])
    read = num_bytes_read_by_process() - before
    assert report.read_bytes == dense_file_bytes + expert_bytes // num_experts
    assert report.read_bytes <= read <= report.read_bytes + (1 << 20)


def whole_experts(path: Path) -> tuple[int, int]:
    """Bytes of all experts of a checkpoint, and their number in each layer."""
    layers = inspect_checkpoint(path).expert_layers
    (num_experts,) = {layer.num_experts for layer in layers}
    return sum(layer.num_bytes for layer in layers), num_experts


def num_bytes_read_by_process() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_peak_memory_is_what_is_kept(tmp_path: Path) -> None:
    path = make_checkpoint(
        "qwen3_moe", tmp_path, hidden_size=256, moe_intermediate_size=512, num_experts=32
    )
    _, _, report = load(path, resident=range(4))
    kept = report.dense_bytes + report.loaded_expert_bytes
    limit = 1.1 * kept + (48 << 20)
    assert whole_experts(path)[0] > 2 * limit
    assert report.peak_rss_bytes - report.rss_before_bytes < limit


def test_inspection_agrees_with_the_model(tmp_path: Path) -> None:
    path = make_checkpoint("deepseek_v3", tmp_path, dtype=torch.bfloat16)
    info = inspect_checkpoint(path)
    assert (info.model_type, info.num_layers) == ("deepseek_v3", 4)
    assert info.dtype == torch.bfloat16
    assert [layer.num_experts for layer in info.expert_layers] == [10] * 3
    model = AutoModelForCausalLM.from_pretrained(path)
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    for layer in info.expert_layers:
        assert layer.num_bytes == sum(sizes[tensor.full_name] for tensor in layer.tensors)


def test_other_threads_load_as_ever_meanwhile(tmp_path: Path) -> None:
    path = make_checkpoint("qwen3_moe", tmp_path)
    models: list[PreTrainedModel] = []

    def allocate(layers: list[ExpertLayer]) -> Memory:
        thread = threading.Thread(
            target=lambda: models.append(AutoModelForCausalLM.from_pretrained(path))
        )
        thread.start()
        thread.join()
        return Memory()

    load_sharded(path, "auto", allocate)
    assert not any(parameter.is_meta for parameter in models[0].parameters())


def test_from_pretrained_is_restored_when_loading_fails(tmp_path: Path) -> None:
    path = make_checkpoint("qwen3_moe", tmp_path)
    original = PreTrainedModel._load_pretrained_model

    def allocate(layers: list[ExpertLayer]) -> Memory:
        assert PreTrainedModel._load_pretrained_model is not original
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        load_sharded(path, "auto", allocate)
    assert PreTrainedModel._load_pretrained_model is original


@pytest.mark.parametrize("dtype", ["int8", "float64", torch.int8])
def test_refuses_other_dtypes(dtype: str | torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use one of auto, float32, bfloat16, float16"):
        inspect_checkpoint(tmp_path, dtype)
