"""What can be found wrong with a checkpoint before any process is started or weight is read."""

from __future__ import annotations

from pathlib import Path

from dwdp.config import DwdpConfig
from dwdp.memory_plan import available_memory_bytes
from dwdp.serving.generation import quiet_transformers
from dwdp.serving.plan import check_memory, load_tokenizer, plan_group_memory


def check_servable(model_dir: Path, config: DwdpConfig, dtype: str) -> None:
    """Check files, model, placement, tokenizer and memory, in that order.

    Raises:
        ValueError: one of them will not do; the text says which and what to change.
    """
    from dwdp.engines.transformers.loading import inspect_checkpoint

    quiet_transformers()
    info = inspect_checkpoint(model_dir, dtype)
    memory = plan_group_memory(info, config, "cpu")
    if load_tokenizer(model_dir) is None:
        raise ValueError(f"{model_dir} has no tokenizer, and an endpoint for text needs one")
    check_memory(memory, available_memory_bytes())
