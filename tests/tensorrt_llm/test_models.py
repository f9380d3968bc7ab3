"""Whole models of several families, from checkpoints as Hugging Face writes them, by TensorRT-LLM's code.

Each model's way from checkpoint to MoE backend is its own: names, one tensor for all experts or one for each,
threads that load modules at the same time.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import assert_same_state
from pretend_cuda import PretendCuda, pretend_gpu
from ranks import run_ranks
from torch import nn

from dwdp import DwdpConfig, Group
from dwdp.engines.tensorrt_llm import sharding
from dwdp.engines.tensorrt_llm.sharing import share_experts
from dwdp.fabric import create_fabric

pytestmark = pytest.mark.trtllm

CONFIG = DwdpConfig(dwdp_size=3, num_experts_per_worker=3)

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=7))


def qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {**SIZES, "head_dim": 16, "moe_intermediate_size": 96, "num_experts": 7}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))


def glm4_moe() -> Any:
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    sizes = {**SIZES, "head_dim": 16, "moe_intermediate_size": 96, "n_routed_experts": 7}
    # The first layer has no experts.
    return Glm4MoeForCausalLM(Glm4MoeConfig(**sizes, first_k_dense_replace=1))


def gpt_oss() -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(GptOssConfig(**SIZES, head_dim=16, num_local_experts=7))


def deepseek_v3() -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4},
        moe_intermediate_size=128,
        moe_layer_freq=1,
        n_routed_experts=7,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
    )
    return DeepseekV3ForCausalLM(config)


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from tensorrt_llm._torch.distributed import ops
    from tensorrt_llm._torch.models import modeling_utils

    run_concurrently = modeling_utils.run_concurrently

    def pretend_in_threads(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        def pretending(*task: Any) -> Any:
            with PretendCuda():
                return function(*task)

        run_concurrently(pretending, *args, **kwargs)

    monkeypatch.setattr(modeling_utils, "run_concurrently", pretend_in_threads)
    monkeypatch.setattr(ops, "get_allreduce_workspace", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda *_: None)
    with pretend_gpu(90):
        yield


@pytest.mark.parametrize(
    ("make", "backend"),
    [
        (mixtral, "CUTLASS"),
        (qwen3_moe, "CUTLASS"),
        (qwen3_moe, "VANILLA"),
        (glm4_moe, "CUTLASS"),
        (gpt_oss, "CUTLASS"),
        (gpt_oss, "TRITON"),
        (deepseek_v3, "CUTLASS"),
        (deepseek_v3, "VANILLA"),
    ],
)
def test_every_rank_looks_as_if_it_had_loaded_the_model(
    make: Callable[[], Any], backend: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    make().to(torch.bfloat16).save_pretrained(tmp_path)
    full = load_model(tmp_path, backend)
    one_at_a_time = threading.Lock()

    def body(group: Group) -> int:
        resident_of = sharding.placed_experts(CONFIG, group.rank)
        with one_at_a_time, sharding.resident_experts_only(resident_of):
            model = load_model(tmp_path, backend)
        shared = share_experts(model, group, CONFIG, create_fabric("host"))
        wanted = dict(full.named_modules())
        names = {module: name for name, module in model.named_modules()}
        for layer in shared.layers:
            assert_same_state(layer.moe, wanted[names[layer.moe]])
            assert all(
                parameter.any() for parameter in layer.backend.parameters() if parameter.dim() > 2
            )
        num_layers = len(shared.layers)
        shared.close()
        return num_layers

    dense = 1 if make in (glm4_moe, deepseek_v3) else 0
    assert run_ranks(CONFIG.dwdp_size, body) == [SIZES["num_hidden_layers"] - dense] * 3


def load_model(checkpoint: Path, backend: str) -> nn.Module:
    """As TensorRT-LLM's ``ModelLoader``: on ``meta``, then on the device, then the checkpoint."""
    from tensorrt_llm._torch.model_config import ModelConfig
    from tensorrt_llm._torch.models import AutoModelForCausalLM
    from tensorrt_llm._torch.models.checkpoints.hf.checkpoint_loader import HfCheckpointLoader
    from tensorrt_llm._torch.models.modeling_utils import MetaInitMode
    from tensorrt_llm.mapping import Mapping

    with PretendCuda():
        config = ModelConfig.from_pretrained(
            str(checkpoint), mapping=Mapping(), moe_backend=backend, max_num_tokens=64
        )
        with MetaInitMode():
            model = AutoModelForCausalLM.from_config(config)
        model._apply(lambda t: torch.zeros_like(t, device="cpu") if t.is_meta else t)
        loader = HfCheckpointLoader()
        weights = loader.load_weights(str(checkpoint), mapping=Mapping())
        mapper = loader.get_initialized_weight_mapper(model, config)
        takes_mapper = "weight_mapper" in inspect.signature(model.load_weights).parameters
        model.load_weights(weights, **({"weight_mapper": mapper} if takes_mapper else {}))
        for module in model.modules():
            if hasattr(module, "post_load_weights") and not getattr(
                module, "_weights_removed", False
            ):
                module.post_load_weights()
    return model
