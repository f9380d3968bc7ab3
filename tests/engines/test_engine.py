"""Transformers models under DWDP: the same tokens and the same bits as the whole model."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint, make_model
from ranks import run_ranks
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from dwdp.config import DwdpConfig
from dwdp.engines.transformers import Attachment, attach, load
from dwdp.engines.transformers.experts import UnsupportedModelError
from dwdp.group import Group
from dwdp.rendezvous import PeerFailure

ARCHITECTURES = (
    "qwen3_moe",
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "olmoe",
    "glm4_moe",
    "qwen2_moe",
    "granitemoe",
    "ernie4_5_moe",
    "minimax_m2",
)
PROMPT = torch.tensor([[5, 17, 3, 88, 41, 9, 60, 23, 71, 12, 34]])
NEW_TOKENS = 6


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(request.param, tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(autouse=True, scope="module")
def one_thread_per_rank() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


class Expected:
    """What the whole model answers."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.logits = logits(model)
        self.tokens = greedy(model)

    def check(self, model: PreTrainedModel) -> None:
        assert torch.equal(logits(model), self.logits)
        assert greedy(model) == self.tokens


@torch.inference_mode()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(PROMPT, use_cache=False).logits


def greedy(model: PreTrainedModel) -> list[int]:
    output = model.generate(PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    return output[0].tolist()


def whole_model(checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


def on_ranks(
    config: DwdpConfig,
    start: Callable[[Group], Attachment],
    check: Callable[[PreTrainedModel], None],
) -> None:
    def body(group: Group) -> None:
        with start(group) as attachment:
            check(attachment.model)

    run_ranks(config.dwdp_size, body)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5])
def test_tokens_and_logits_equal_the_whole_models(checkpoint: Path, num_ranks: int) -> None:
    expected = Expected(whole_model(checkpoint))
    num_experts = whole_experts(checkpoint)
    for mode in ("staged", "direct"):
        for share in (None, min(num_experts, -(-num_experts // num_ranks) + 2)):
            config = DwdpConfig(
                dwdp_size=num_ranks,
                fetch_mode=mode,
                num_experts_per_worker=share,
                slice_bytes=4096,
            )
            on_ranks(config, lambda group, c=config: load(checkpoint, group, c), expected.check)


def whole_experts(checkpoint: Path) -> int:
    from dwdp.engines.transformers.loading import inspect_checkpoint

    return min(layer.num_experts for layer in inspect_checkpoint(checkpoint).expert_layers)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_are_exact_too(tmp_path: Path, dtype: str) -> None:
    checkpoint = make_checkpoint("qwen3_moe", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
    expected = Expected(model)
    config = DwdpConfig(dwdp_size=2, fetch_mode="staged")
    on_ranks(config, lambda group: load(checkpoint, group, config, dtype=dtype), expected.check)


@pytest.mark.parametrize("mode", ["staged", "direct"])
def test_attach_and_detach_a_loaded_model(tmp_path: Path, mode: str) -> None:
    checkpoint = make_checkpoint("gpt_oss", tmp_path / "model")
    original = whole_model(checkpoint)
    expected = Expected(original)
    config = DwdpConfig(dwdp_size=3, fetch_mode=mode)

    def body(group: Group) -> None:
        model = copy.deepcopy(original)
        attachment = attach(model, group, config)
        assert attachment.model is model
        expected.check(model)
        attachment.detach()
        expected.check(model)
        for name, parameter in original.named_parameters():
            restored = model.get_parameter(name)
            assert torch.equal(restored, parameter)
            assert restored.requires_grad == parameter.requires_grad
        assert not any("forward" in vars(module) for module in model.modules())
        attachment.detach()

    run_ranks(3, body)


@pytest.mark.parametrize("mode", ["staged", "direct"])
def test_detach_keeps_a_forward_of_the_users_own(tmp_path: Path, mode: str) -> None:
    checkpoint = make_checkpoint("qwen3_moe", tmp_path / "model")
    original = whole_model(checkpoint)
    config = DwdpConfig(dwdp_size=2, fetch_mode=mode)

    def body(group: Group) -> int:
        model = copy.deepcopy(original)
        experts = model.model.layers[0].mlp.experts
        forward, calls = experts.forward, []

        def counted(*args: object) -> object:
            calls.append(args)
            return forward(*args)

        experts.forward = counted
        attachment = attach(model, group, config)
        logits(model)
        attachment.detach()
        assert experts.forward is counted
        logits(model)
        return len(calls)

    assert run_ranks(2, body) == [2, 2]


def test_a_staged_model_refuses_to_be_trained(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("qwen3_moe", tmp_path / "model")
    config = DwdpConfig(dwdp_size=2, fetch_mode="staged")

    def check(model: PreTrainedModel) -> None:
        with pytest.raises(RuntimeError, match="staged experts are for inference"):
            model(PROMPT, use_cache=False)
        logits(model)

    on_ranks(config, lambda group: load(checkpoint, group, config), check)


@pytest.mark.parametrize("mode", ["staged", "demand", "direct"])
def test_what_shared_experts_do_not_stand_is_refused(tmp_path: Path, mode: str) -> None:
    checkpoint = make_checkpoint("qwen3_moe", tmp_path / "model")
    original = whole_model(checkpoint)
    weights = original.state_dict()
    config = DwdpConfig(dwdp_size=2, fetch_mode=mode)

    def body(group: Group) -> None:
        model = copy.deepcopy(original)
        with attach(model, group, config):
            with pytest.raises(RuntimeError, match="read-only: detach the model"):
                model.load_state_dict(weights)
            if mode == "direct":
                for name, value in model.state_dict().items():
                    assert torch.equal(value, weights[name])
            else:
                for copied in (model.state_dict, model.model.layers[0].mlp.experts.bfloat16):
                    with pytest.raises(RuntimeError, match="staged experts cannot be copied"):
                        copied()
            logits(model)
        model.load_state_dict(weights)
        assert torch.equal(logits(model.float()), logits(original))

    run_ranks(2, body)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_tokens_are_exact_on_demand(tmp_path: Path, num_ranks: int) -> None:
    checkpoint = make_checkpoint("gpt_oss", tmp_path / "model")
    expected = Expected(whole_model(checkpoint))
    config = DwdpConfig(dwdp_size=num_ranks, fetch_mode="demand")
    on_ranks(config, lambda group: load(checkpoint, group, config), expected.check)


def test_an_exception_in_a_forward_leaves_the_ring_usable(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("qwen3_moe", tmp_path / "model")
    expected = Expected(whole_model(checkpoint))
    config = DwdpConfig(dwdp_size=2, fetch_mode="staged")

    def check(model: PreTrainedModel) -> None:
        broken = model.model.layers[1].mlp.experts
        activation = broken.act_fn
        broken.act_fn = None
        with pytest.raises(TypeError):
            logits(model)
        broken.act_fn = activation
        expected.check(model)

    on_ranks(config, lambda group: load(checkpoint, group, config), check)


@pytest.mark.parametrize("mode", ["staged", "direct"])
def test_a_failure_after_attaching_leaves_the_model_as_it_was(tmp_path: Path, mode: str) -> None:
    checkpoint = make_checkpoint("qwen3_moe", tmp_path / "model")
    original = whole_model(checkpoint)
    expected = Expected(original)
    config = DwdpConfig(dwdp_size=2, fetch_mode=mode)

    def fail(*_: object) -> None:
        raise TypeError("hooks are out of order")

    def body(group: Group) -> None:
        model = copy.deepcopy(original)
        broken = model.model.layers[2].mlp.experts
        broken.register_load_state_dict_pre_hook = fail
        with pytest.raises(TypeError, match="out of order"):
            attach(model, group, config)
        expected.check(model)
        assert not any("forward" in vars(module) for module in model.modules())

    run_ranks(2, body)
    gc.collect()
    assert "memfd:" not in Path("/proc/self/maps").read_text()
    assert not [target for target in open_descriptors() if "memfd:" in target]


class OneArgument(Qwen3MoeExperts):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


def test_a_forward_without_a_choice_is_refused_where_experts_are_staged() -> None:
    def body(group: Group, config: DwdpConfig) -> None:
        model = make_model("qwen3_moe")
        model.model.layers[1].mlp.experts.__class__ = OneArgument
        attach(model, group, config).detach()

    run_ranks(2, lambda group: body(group, DwdpConfig(dwdp_size=2, fetch_mode="direct")))
    with pytest.raises(
        (UnsupportedModelError, PeerFailure),
        match=r"layers.1.mlp.experts \(OneArgument\) has a forward that takes hidden_states: .*'direct'",
    ):
        run_ranks(2, lambda group: body(group, DwdpConfig(dwdp_size=2, fetch_mode="staged")))


def test_several_groups_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"num_groups is 2: .* leave it out"):
        attach(make_model("qwen3_moe"), Group.single(), DwdpConfig(num_groups=2))


def test_expert_memory_is_the_share_and_nothing_is_left(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("mixtral", tmp_path / "model")
    model = whole_model(checkpoint)
    num_expert_bytes = sum(
        p.nbytes for n, p in model.named_parameters() if ".experts." in n and p.ndim == 3
    )
    config = DwdpConfig(dwdp_size=2, fetch_mode="direct")

    def body(group: Group) -> int:
        with load(checkpoint, group, config) as attachment:
            assert attachment.load_report is not None
            assert attachment.load_report.loaded_expert_bytes <= num_expert_bytes
            return attachment.runtime.stats().resident_expert_bytes

    resident = run_ranks(2, body)
    shared_pages = 2 * model.config.num_hidden_layers * os.sysconf("SC_PAGESIZE")
    assert num_expert_bytes <= sum(resident) <= num_expert_bytes + 2 * shared_pages
    gc.collect()
    assert "memfd:" not in Path("/proc/self/maps").read_text()
    assert not [target for target in open_descriptors() if "memfd:" in target]


def open_descriptors() -> Iterator[str]:
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # The one that lists the folder.
            yield os.readlink(descriptor)
