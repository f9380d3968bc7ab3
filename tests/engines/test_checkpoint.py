"""A checkpoint that is missing, cut short or wrong gets one line that names the file or key."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dwdp.engines.transformers.checkpoint import CheckpointError, SafetensorsFile, open_checkpoint
from dwdp.engines.transformers.experts import UnsupportedModelError
from dwdp.engines.transformers.loading import inspect_checkpoint, load_sharded

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.0.mlp.experts"
Edit = Callable[[Path], Any]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("original") / "model")


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    make_model("qwen3_moe").save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    return tmp_path / "sharded"


def assert_refused(path: Path, error: type[ValueError], *parts: str) -> None:
    """Both entry points refuse, in one line that has all ``parts``, before memory is allocated."""

    def allocate(layers: Any) -> Any:
        raise AssertionError("memory was allocated")

    for call in (lambda: inspect_checkpoint(path), lambda: load_sharded(path, "auto", allocate)):
        with pytest.raises(error) as caught:
            call()
        text = str(caught.value)
        assert "\n" not in text
        assert [part for part in parts if part not in text] == [], text


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in settings.items() if v is not ...}))


def edit_weights(path: Path, **changes: Any) -> None:
    """Replace tensors, or drop those that are ``...``; keys are given with ``__`` for dots."""
    tensors = load_file(path / WEIGHTS)
    tensors |= {key.replace("__", "."): value for key, value in changes.items()}
    kept = {key: value for key, value in tensors.items() if value is not ...}
    save_file(kept, path / WEIGHTS, metadata={"format": "pt"})


def edit_header(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    data = (path / WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    edit(header)
    text = json.dumps(header).encode()
    (path / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def test_no_directory(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere", CheckpointError, "nowhere is not a directory")


def test_a_file_in_place_of_the_directory(path: Path) -> None:
    assert_refused(path / WEIGHTS, CheckpointError, "is not a directory")


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (Path.unlink, ["cannot read", "config.json", "No such file"]),
        (lambda file: file.write_text("{"), ["config.json is not valid JSON", "line 1"]),
        (lambda file: file.write_bytes(b"\xff\xfe\x00"), ["config.json is not valid JSON"]),
        (lambda file: file.write_text("[1]"), ["config.json holds a JSON list"]),
        (lambda file: file.write_text("{}"), ["config.json has no model_type"]),
    ],
)
def test_unusable_config(edit: Edit, parts: list[str], path: Path) -> None:
    edit(path / "config.json")
    assert_refused(path, CheckpointError, *parts)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"hidden_size": "wide"}, ["config.json is not usable", "hidden_size"]),
        ({"hidden_act": "no_such"}, ["does not describe a model that can be built", "no_such"]),
    ],
)
def test_wrong_config_values(changes: dict[str, Any], parts: list[str], path: Path) -> None:
    edit_config(path, **changes)
    assert_refused(path, CheckpointError, *parts)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "no_such_model"}, ["no_such_model is not known"]),
        ({"model_type": "vit"}, ["vit is not a causal language model"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantised with fp8"]),
        ({"compression_config": {}, "quantization_config": {"bits": 4}}, ["with unnamed"]),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, ["with awq"]),
    ],
)
def test_unsupported_config(changes: dict[str, Any], parts: list[str], path: Path) -> None:
    edit_config(path, **changes)
    assert_refused(path, UnsupportedModelError, *parts)


def test_dense_model(path: Path) -> None:
    edit_config(path, mlp_only_layers=[0, 1, 2, 3])
    assert_refused(path, UnsupportedModelError, "qwen3_moe is a dense model")


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated_file(size: int, path: Path) -> None:
    file = path / WEIGHTS
    data = file.read_bytes()
    file.write_bytes(data[:size])
    assert_refused(path, CheckpointError, str(file), "corrupt or incomplete", "bytes long")


def test_file_that_goes_on(path: Path) -> None:
    with (path / WEIGHTS).open("ab") as file:
        file.write(b"more")
    assert_refused(path, CheckpointError, WEIGHTS, "bytes long and should be")


def test_file_cut_short_while_it_is_read(path: Path) -> None:
    file = SafetensorsFile(path / WEIGHTS)
    tensor = file.tensors["model.embed_tokens.weight"]
    assert torch.equal(tensor[...], load_file(path / WEIGHTS)[tensor.key])
    (path / WEIGHTS).write_bytes(b"")
    with pytest.raises(CheckpointError, match="it ends at byte"):
        tensor[...]
    file.close()


def test_header_that_is_not_json(path: Path) -> None:
    (path / WEIGHTS).write_bytes(struct.pack("<Q", 4) + b"abcd")
    assert_refused(path, CheckpointError, WEIGHTS, "its header is not valid")


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (lambda entry: entry.update(dtype="F4", data_offsets=[8, 0]), ["F4 cannot lie at bytes"]),
        (lambda entry: entry.update(shape=[3, 3]), ["[3, 3] F32 cannot lie at bytes"]),
        (lambda entry: entry.pop("shape"), ["its header is not valid ('shape')"]),
        (lambda entry: entry.update(data_offsets=[0, 8]), ["cannot lie at bytes"]),
        (lambda entry: entry.update(data_offsets=None), ["its header is not valid"]),
        (lambda entry: entry.update(data_offsets=[0.0, 8.0]), ["are no whole numbers"]),
        (lambda entry: entry.update(shape="64"), ["are no whole numbers"]),
        (lambda entry: entry.update(shape=[float("inf")]), ["are no whole numbers"]),
    ],
)
def test_header_that_contradicts_itself(
    edit: Callable[[dict[str, Any]], Any], parts: list[str], path: Path
) -> None:
    edit_header(path, lambda header: edit(header["model.norm.weight"]))
    assert_refused(path, CheckpointError, WEIGHTS, *parts)


@pytest.mark.parametrize("key", ["model.norm.weight", f"{EXPERT}.3.up_proj.weight"])
def test_unknown_dtype_of_a_tensor_that_is_needed(key: str, path: Path) -> None:
    edit_header(path, lambda header: header[key].update(dtype="F8_E8M0"))
    parts = (f"{key} in ", WEIGHTS, "has dtype F8_E8M0, which dwdp does not load: use a float32")
    assert_refused(path, CheckpointError, *parts)


def test_unknown_dtype_of_a_tensor_that_the_model_does_not_use(path: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(path)
    edit_weights(path, extra__scale=torch.zeros(3, dtype=torch.complex64))
    assert "C64" in (path / WEIGHTS).read_bytes()[:1_000_000].decode("latin1")
    inspect_checkpoint(path)
    model, *_ = load_sharded(path, "auto", lambda layers: NoExperts())
    assert torch.equal(model.lm_head.weight, expected.lm_head.weight)


class NoExperts:
    """A rank that stores no experts."""

    def resident(self, layer: Any) -> list[int]:
        return []

    def destination(self, tensor: Any, expert: int) -> torch.Tensor:
        raise AssertionError("an expert was loaded")


@pytest.mark.parametrize("text", ["[]", "null", "[" * 100_000])
def test_header_that_is_no_object(text: str, path: Path) -> None:
    (path / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text.encode())
    assert_refused(path, CheckpointError, WEIGHTS, "header")


@pytest.mark.parametrize("top_k", [0, 99])
def test_more_experts_per_token_than_there_are(top_k: int, path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": top_k}))
    assert_refused(path, CheckpointError, f"num_experts_per_tok is {top_k}")


@pytest.mark.parametrize("field", ["num_hidden_layers", "num_local_experts"])
def test_sizes_beyond_the_checkpoint(field: str, path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    assert field in config
    (path / "config.json").write_text(json.dumps({**config, field: 10**9, "layer_types": None}))
    assert_refused(path, CheckpointError, " is 1000000000", "room for")


def test_no_weights(path: Path) -> None:
    (path / WEIGHTS).unlink()
    assert_refused(path, CheckpointError, f"neither {WEIGHTS} nor {INDEX}")
    (path / "pytorch_model.bin").touch()
    assert_refused(path, CheckpointError, "converted to safetensors")


def test_missing_file_of_several(sharded: Path) -> None:
    name = sorted(file.name for file in sharded.glob("*.safetensors"))[1]
    (sharded / name).unlink()
    assert_refused(sharded, CheckpointError, f"lacks {name}", "one of 1 missing")


@pytest.mark.parametrize(
    ("index", "part"),
    [
        ("{", "is not valid JSON"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": "../other.safetensors"}}', "is not a file name"),
        ('{"weight_map": {"a": 3}}', "is not a file name"),
    ],
)
def test_unusable_index(index: str, part: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(index)
    assert_refused(sharded, CheckpointError, INDEX, part)


def test_index_that_names_a_tensor_no_file_has(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.extra"] = next(iter(index["weight_map"].values()))
    (sharded / INDEX).write_text(json.dumps(index))
    assert_refused(sharded, CheckpointError, "model.extra", "none of its files")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model__norm__weight": ...}, ["lacks model.norm.weight:"]),
        ({f"{EXPERT}.3.up_proj.weight": ...}, ["10 experts", "up_proj", "expert 3 is missing"]),
        (
            {f"{EXPERT}.10.up_proj.weight": torch.zeros(48, 64)},
            ["10 experts", "11 experts are there"],
        ),
        (
            {f"{EXPERT}.{i}.up_proj.weight": ... for i in range(10)},
            ["nothing that matches mlp.experts.*.up_proj.weight"],
        ),
        (
            {f"{EXPERT}.{i}.down_proj.weight": ... for i in range(10)},
            [f"lacks {EXPERT}.down_proj:"],
        ),
        ({"model__norm__weight": torch.zeros(3)}, ["model.norm.weight", "[3]", "[64]"]),
        (
            {f"{EXPERT}.4.down_proj.weight": torch.zeros(64, 47)},
            [".4.down_proj.weight is [64, 47]"],
        ),
        (
            {f"{EXPERT}.{i}.down_proj.weight": torch.zeros(64, 47) for i in range(10)},
            [f"one expert of {EXPERT}.down_proj would be [64, 47]", "[64, 48]"],
        ),
        (
            {f"{EXPERT}.{i}.up_proj.weight": torch.zeros(48, 63) for i in range(10)},
            ["do not convert into", f"{EXPERT}.gate_up_proj"],
        ),
    ],
)
def test_weights_that_do_not_fit_the_config(
    changes: dict[str, Any], parts: list[str], path: Path
) -> None:
    edit_weights(path, **changes)
    assert_refused(path, CheckpointError, *parts)


def test_stacked_experts_of_another_number(tmp_path: Path) -> None:
    path = make_checkpoint("gpt_oss", tmp_path)
    edit_config(path, num_local_experts=12)
    router = {
        f"model.layers.{i}.mlp.router.{name}": torch.zeros(shape)
        for i in range(4)
        for name, shape in (("weight", (12, 64)), ("bias", (12,)))
    }
    edit_weights(path, **router)
    assert_refused(path, CheckpointError, "first dimension should be the 12 experts")


def test_rows_and_casts(tmp_path: Path) -> None:
    stored = {
        "matrix": torch.randn(7, 5, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "half": torch.randn(9).bfloat16(),
        "flags": torch.tensor([True, False]),
    }
    save_file(stored, tmp_path / WEIGHTS)
    with open_checkpoint(tmp_path) as checkpoint:
        for key, tensor in stored.items():
            assert torch.equal(checkpoint.tensors[key][...], tensor)
        matrix = checkpoint.tensors["matrix"]
        before = checkpoint.num_bytes_read
        assert torch.equal(matrix.read_rows(2, 4), stored["matrix"][2:4])
        assert checkpoint.num_bytes_read - before == 2 * 5 * 3 * 4
        matrix.cast_to = torch.float16
        assert torch.equal(matrix[...], stored["matrix"].half())


def test_cast_of_a_tensor_larger_than_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dwdp.engines.transformers.checkpoint._CAST_BLOCK_BYTES", 64)
    stored = torch.randn(7, 11)
    save_file({"a": stored}, tmp_path / WEIGHTS)
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.tensors["a"].cast_to = torch.bfloat16
        assert torch.equal(checkpoint.tensors["a"][...], stored.bfloat16())
