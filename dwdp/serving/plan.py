"""What a run is going to do, worked out and checked before any process is started or weight is read."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwdp.config import DwdpConfig
from dwdp.fabric.cuda_devices import list_devices
from dwdp.launch import discover_launch
from dwdp.memory_plan import (
    ExpertTensorSize,
    MemoryPlan,
    available_memory_bytes,
    plan_memory,
)
from dwdp.observability.report import ModelReport, SamplingReport
from dwdp.serving.generation import quiet_transformers
from dwdp.serving.messages import Request
from dwdp.serving.prompts import Prompt, tokenize

if TYPE_CHECKING:
    from dwdp.engines.transformers.loading import CheckpointInfo

_GIB = 1 << 30
_DEVICE_PAGE_BYTES = 2 << 20
"""The mapping granularity of today's GPUs; asking one would take memory on it."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "tiktoken.model",
    "vocab.json",
    "vocab.txt",
)


@dataclass(frozen=True)
class RunPlan:
    """A run that can start.

    Attributes:
        model: for the report.
        memory: what the ranks are going to hold.
        prompt_ids: the user's names for the prompts, in the order of ``requests``.
        tokenizer: a Transformers tokenizer, or None if the checkpoint has none.
    """

    model: ModelReport
    memory: MemoryPlan
    prompt_ids: tuple[str | int, ...]
    requests: tuple[Request, ...]
    tokenizer: Any | None


def plan_run(
    model_dir: Path,
    config: DwdpConfig,
    prompts: Sequence[Prompt],
    sampling: SamplingReport,
    *,
    dtype: str,
    device: str,
) -> RunPlan:
    """Check the model, the placement, the prompts and the memory, in that order.

    Raises:
        ValueError: one of them will not do; the text says which and what to change.
    """
    from dwdp.engines.transformers.loading import inspect_checkpoint

    quiet_transformers()
    info = inspect_checkpoint(model_dir, dtype)
    memory = plan_group_memory(info, config, device)
    tokenizer = load_tokenizer(model_dir)
    tokenized = tokenize(
        prompts,
        tokenizer,
        vocab_size=info.config.vocab_size,
        max_positions=getattr(info.config, "max_position_embeddings", None),
        max_new_tokens=sampling.max_new_tokens,
    )
    if device == "cpu":
        check_memory(memory, available_memory_bytes())
    else:
        check_device_memory(memory)
    model = ModelReport(
        path=str(model_dir),
        model_type=info.model_type,
        num_layers=info.num_layers,
        num_moe_layers=len(info.expert_layers),
        num_experts=max(layer.num_experts for layer in info.expert_layers),
        dtype=str(info.dtype).removeprefix("torch."),
    )
    requests = tuple(
        Request(
            index=index,
            token_ids=prompt.token_ids,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            seed=sampling.seed + index,
        )
        for index, prompt in enumerate(tokenized)
    )
    return RunPlan(model, memory, tuple(prompt.id for prompt in tokenized), requests, tokenizer)


def load_tokenizer(model_dir: Path) -> Any | None:
    """The checkpoint's tokenizer, or None if it has none.

    Raises:
        ValueError: it has one that cannot be used.
    """
    from transformers import AutoTokenizer

    if not any((model_dir / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(
            str(model_dir), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the tokenizer in {model_dir} cannot be loaded: {reason}") from error


def check_memory(plan: MemoryPlan, available_bytes: int) -> None:
    """Raises ValueError, with the sum that does not fit, if ``plan`` needs more than ``available_bytes``."""
    if plan.total_bytes <= available_bytes:
        return
    num_ranks = len(plan.dense_bytes)
    raise ValueError(
        f"{num_ranks} rank(s) need {_gib(plan.total_bytes)}: "
        f"{num_ranks} x {_gib(plan.dense_bytes[0])} of dense weights, "
        f"{_gib(sum(plan.resident_expert_bytes))} of resident experts and "
        f"{_gib(sum(plan.staging_bytes))} of staging slots; {_gib(available_bytes)} are available. "
        "Use fewer ranks, less redundancy, --fetch-mode direct or a smaller --dtype"
    )


def check_device_memory(plan: MemoryPlan) -> None:
    """Raises ValueError if the ranks that share a GPU need more than it has.

    A launcher may show every rank a GPU of its own: there, only that one is found.
    """
    devices = list_devices()
    if not devices:
        raise ValueError("--device cuda: there is no GPU that this process may use")
    if discover_launch() is not None:
        return
    for device in devices:
        ranks = range(device.ordinal, len(plan.dense_bytes), len(devices))
        needed = sum(
            plan.dense_bytes[rank] + plan.resident_expert_bytes[rank] + plan.staging_bytes[rank]
            for rank in ranks
        )
        if needed > device.memory_bytes:
            raise ValueError(
                f"{len(ranks)} rank(s) on GPU {device.ordinal} ({device.name}) need {_gib(needed)}; it "
                f"has {_gib(device.memory_bytes)}. Use more GPUs, less redundancy, or a smaller --dtype"
            )


def plan_group_memory(info: CheckpointInfo, config: DwdpConfig, device: str) -> MemoryPlan:
    """What the ranks of a checkpoint hold on ``device``, ``"cpu"`` or ``"cuda"``."""
    modes = ("staged", "demand") if device == "cpu" else ("staged", "demand", "auto")
    return plan_memory(
        [
            [ExpertTensorSize(tensor.num_experts, tensor.expert_bytes) for tensor in layer.tensors]
            for layer in info.expert_layers
        ],
        config,
        dense_bytes=info.dense_bytes,
        staged=config.fetch_mode in modes,
        granularity=mmap.PAGESIZE if device == "cpu" else _DEVICE_PAGE_BYTES,
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"
