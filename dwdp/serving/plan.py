"""What a run is going to do, worked out and checked before any process is started or weight is read."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwdp.config import DwdpConfig
from dwdp.fabric.base import FabricError
from dwdp.fabric.cuda_devices import list_devices
from dwdp.launch import discover_launch
from dwdp.memory_plan import (
    ExpertTensorSize,
    GroupPools,
    MemoryPlan,
    available_memory_bytes,
    check_group_memory,
    plan_memory,
)
from dwdp.observability.report import ModelReport, SamplingReport
from dwdp.serving.generation import quiet_transformers
from dwdp.serving.messages import Request
from dwdp.serving.prompts import Prompt, tokenize
from dwdp.system_memory import MemoryPool

if TYPE_CHECKING:
    from dwdp.engines.transformers.loading import CheckpointInfo

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
        prompt_ids: the user's names for the prompts, in the order of ``requests``.
        tokenizer: a Transformers tokenizer, or None if the checkpoint has none.
    """

    model: ModelReport
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
    check_memory(memory, device)
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
    return RunPlan(model, tuple(prompt.id for prompt in tokenized), requests, tokenizer)


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


def check_memory(plan: MemoryPlan, device: str) -> None:
    """Refuse ``plan`` if the ranks that this command starts on ``device`` cannot hold it.

    Raises:
        NotEnoughMemoryError: the text names the sum needed, what is available, and what to change.
        ValueError: ``device`` is ``"cuda"``, and there is no GPU.
    """
    check_group_memory(pools_of_ranks(len(plan.dense_bytes), device), plan)


def pools_of_ranks(num_ranks: int, device: str) -> GroupPools:
    """The memory that each of the ranks started here is going to draw on, on ``"cpu"`` or ``"cuda"``.

    A launcher may show every rank a GPU of its own, so that theirs are not known here: {}.

    Raises:
        ValueError: ``device`` is ``"cuda"``, and there is no GPU.
    """
    if device == "cpu":
        here = MemoryPool("here", "to this command", available_memory_bytes())
        return {rank: [here] for rank in range(num_ranks)}
    try:
        gpus = list_devices()
    except FabricError as error:
        raise ValueError(f"--device cuda: {error}") from error
    if not gpus:
        raise ValueError("--device cuda: there is no GPU that this process may use")
    if discover_launch() is not None:
        return {}
    pools = [
        MemoryPool(gpu.uuid, f"on GPU {gpu.ordinal} ({gpu.name})", gpu.memory_bytes) for gpu in gpus
    ]
    return {rank: [pools[rank % len(pools)]] for rank in range(num_ranks)}


def plan_group_memory(
    info: CheckpointInfo, config: DwdpConfig, device: str, *, kv_cache_bytes: int = 0
) -> MemoryPlan:
    """What the ranks of a checkpoint hold on ``device``, ``"cpu"`` or ``"cuda"``.

    Args:
        kv_cache_bytes: key-value cache that every rank sets aside.
    """
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
        kv_cache_bytes=kv_cache_bytes,
    )
