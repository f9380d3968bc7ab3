"""Random-weight checkpoints: real loaders read them, seeds fix them, failures leave nothing behind."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from dwdp.cli.main import run
from dwdp.engines.transformers import make_model
from dwdp.engines.transformers.architectures import ARCHITECTURES
from dwdp.engines.transformers.experts import find_expert_layers
from dwdp.engines.transformers.make_model import write_checkpoint

PROMPT = torch.tensor([[3 + byte for byte in b"expert weights travel"]])


def load(folder: Path) -> Any:
    """The model that ``from_pretrained`` makes; every tensor must come from the files, and be used."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    model, info = loaded
    assert not any(info.values()), info
    return model.eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_loads_and_generates(arch: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", arch)
    model = load(checkpoint.path)
    assert model.config.model_type == arch
    assert sum(p.numel() for p in model.parameters()) == checkpoint.num_parameters
    layers = find_expert_layers(model)
    assert len(layers) == checkpoint.num_moe_layers
    assert sum(layer.num_bytes for layer in layers) == checkpoint.expert_bytes

    tokens = model.generate(PROMPT, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert tokens.shape == (1, PROMPT.shape[1] + 3)

    with torch.no_grad():
        logits = model(PROMPT).logits
        assert logits.isfinite().all()
        for layer in layers:
            for parameter in layer.module.parameters(recurse=False):
                parameter.zero_()
        # Otherwise tests with these checkpoints could not tell right experts from wrong ones.
        change = (model(PROMPT).logits - logits).std() / logits.std()
    assert change > 0.05


@pytest.mark.parametrize("arch", ["deepseek_v3", "gpt_oss", "jamba", "mixtral", "qwen3_moe"])
def test_format_is_the_one_that_transformers_saves(arch: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", arch).path
    load(folder).save_pretrained(tmp_path / "saved")
    ours, theirs = tensors(folder), tensors(tmp_path / "saved")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_seed_fixes_every_byte(tmp_path: Path) -> None:
    first, again, other = (
        contents(write_checkpoint(tmp_path / name, "qwen3_moe", seed=seed).path)
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert first == again
    assert first.keys() == other.keys()
    assert [name for name in first if first[name] != other[name]] == ["model.safetensors"]


def test_several_files_hold_the_same_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tensors(write_checkpoint(tmp_path / "one", "olmoe").path)
    monkeypatch.setattr(make_model, "SHARD_BYTES", 500_000)
    seen: list[tuple[int, int]] = []
    checkpoint = write_checkpoint(
        tmp_path / "many", "olmoe", progress=lambda *counts: seen.append(counts)
    )
    assert checkpoint.num_files > 1
    names = sorted(path.name for path in checkpoint.path.glob("*.safetensors"))
    count = checkpoint.num_files
    assert names == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    parts = tensors(checkpoint.path)
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    index = json.loads((checkpoint.path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == checkpoint.num_bytes
    assert sum(tensor.nbytes for tensor in whole.values()) == checkpoint.num_bytes
    assert seen == sorted(seen)
    assert seen[-1] == (checkpoint.num_bytes, checkpoint.num_bytes)
    load(checkpoint.path)


def test_tokenizer_gives_back_any_text(tmp_path: Path) -> None:
    for arch in ("qwen3_moe", "mixtral", "gpt_oss"):
        folder = write_checkpoint(tmp_path / arch, arch).path
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = load(folder)
        for text in ("", " two  spaces\r\n\ttab", "h\u00e9llo \u4f60\u597d \U0001f600", "<0x41>"):
            ids = tokenizer(text)["input_ids"]
            assert ids == [3 + byte for byte in text.encode()]
            assert tokenizer.decode(ids) == text
        assert tokenizer("a<|eos|>")["input_ids"] == [3 + ord("a"), tokenizer.eos_token_id]
        assert len(tokenizer) == model.config.vocab_size
        for settings in (model.config, model.generation_config):
            assert settings.eos_token_id == tokenizer.eos_token_id
            assert settings.pad_token_id == tokenizer.pad_token_id


def test_bfloat16(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", "mixtral", dtype="bfloat16")
    assert {tensor.dtype for tensor in tensors(checkpoint.path).values()} == {torch.bfloat16}
    assert load(checkpoint.path).dtype == torch.bfloat16


@pytest.mark.parametrize("arch", ["deepseek_v3", "gpt_oss", "mixtral", "qwen3_moe"])
def test_sizes_can_be_chosen(arch: str, tmp_path: Path) -> None:
    target = 24 << 20
    checkpoint = write_checkpoint(
        tmp_path / "model",
        arch,
        expert_bytes=target,
        overrides={"num_experts": 6, "num_hidden_layers": 3, "hidden_size": 128},
    )
    assert abs(checkpoint.expert_bytes - target) < 0.05 * target
    model = load(checkpoint.path)
    assert checkpoint.num_layers == model.config.num_hidden_layers == 3
    assert model.config.hidden_size == 128
    assert {layer.num_experts for layer in find_expert_layers(model)} == {6}
    assert checkpoint.num_experts == 6


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"arch": "llama"}, "'llama' is not known: use one of .*deepseek_v3.*qwen3_moe"),
        ({"overrides": {"num_expert": 4}}, "qwen3_moe has no field num_expert"),
        ({"overrides": {"vocab_size": 512}}, "vocab_size"),
        ({"overrides": {"num_hidden_layers": "four"}}, "num_hidden_layers='four'"),
        ({"expert_bytes": 1 << 50}, "needs 1048576.* GiB"),
        ({"expert_bytes": 1 << 20, "overrides": {"moe_intermediate_size": 64}}, "one of the two"),
    ],
)
def test_bad_choices_are_refused(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=text):
        write_checkpoint(tmp_path / "model", **({"arch": "qwen3_moe"} | options))
    assert not list(tmp_path.iterdir())


def test_only_a_checkpoint_is_replaced_and_only_if_asked(tmp_path: Path) -> None:
    out = tmp_path / "model"
    out.mkdir()
    first = contents(write_checkpoint(out, "qwen3_moe").path)
    with pytest.raises(ValueError, match=r"model is not empty: .*--force"):
        write_checkpoint(out, "mixtral")
    assert contents(out) == first
    write_checkpoint(out, "mixtral", force=True)
    assert load(out).config.model_type == "mixtral"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    (out / "config.json").unlink()
    before = contents(out)
    with pytest.raises(ValueError, match=r"no config\.json"):
        write_checkpoint(out, "qwen3_moe", force=True)
    assert contents(out) == before

    (tmp_path / "file").write_text("text")
    with pytest.raises(ValueError, match="is a file"):
        write_checkpoint(tmp_path / "file", "qwen3_moe", force=True)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_failure_leaves_things_as_they_were(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    before = contents(write_checkpoint(kept, "qwen3_moe").path)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(make_model, "save_file", fail)
    with pytest.raises(type(error)):
        write_checkpoint(kept, "mixtral", force=True)
    with pytest.raises(type(error)):
        write_checkpoint(tmp_path / "new", "mixtral")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert contents(kept) == before


def test_random_state_of_the_caller_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    write_checkpoint(tmp_path / "model", "qwen3_moe")
    assert torch.equal(torch.rand(4), expected)


def test_command_prints_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model"
    options = ["--num-experts", "12", "--set", "num_experts_per_tok=3", "--num-layers", "2"]
    assert run(["make-model", str(out), "--arch", "glm4_moe", *options]) == 0
    text = capsys.readouterr().out
    assert "2, 1 of them MoE" in text
    assert "float32" in text
    config = load(out).config
    assert (config.n_routed_experts, config.num_experts_per_tok) == (12, 3)


@pytest.mark.parametrize(
    "options",
    [
        ["--arch", "llama"],
        ["--arch", "qwen3_moe", "--preset", "huge"],
        ["--arch", "qwen3_moe", "--set", "num_experts"],
        ["--arch", "qwen3_moe", "--num-experts", "4", "--set", "num_experts=5"],
        ["--arch", "qwen3_moe", "--expert-gib", "0"],
        ["--arch", "qwen3_moe", "--set", "num_attention_heads=[1]"],
    ],
)
def test_command_refuses_in_one_line(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["make-model", str(tmp_path / "model"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dwdp: error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
