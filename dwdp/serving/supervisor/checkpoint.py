"""What can be found wrong with a checkpoint before any process is started or weight is read."""

from __future__ import annotations

import logging
from pathlib import Path

from dwdp.config import DwdpConfig
from dwdp.memory_plan import check_group_memory, describe_rejoin_shortage
from dwdp.serving.generation import quiet_transformers
from dwdp.serving.plan import load_tokenizer, plan_group_memory, pools_of_ranks
from dwdp.serving.rank_server.batching import planned_kv_cache_bytes
from dwdp.serving.rank_server.options import RankOptions

log = logging.getLogger(__name__)


def check_servable(
    model_dir: Path, config: DwdpConfig, options: RankOptions, *, dtype: str, device: str
) -> None:
    """Check device, files, model, placement, tokenizer, limits and memory, in that order.

    Memory that only a rank that is started again would lack is no reason to refuse: it is logged.

    Raises:
        ValueError: one of them will not do; the text says which and what to change.
    """
    from dwdp.engines.transformers.loading import inspect_checkpoint

    quiet_transformers()
    pools = pools_of_ranks(config.dwdp_size, device)
    info = inspect_checkpoint(model_dir, dtype)
    kv_cache_bytes = planned_kv_cache_bytes(info.config, info.dtype, options)
    memory = plan_group_memory(info, config, device, kv_cache_bytes=kv_cache_bytes)
    if load_tokenizer(model_dir) is None:
        raise ValueError(f"{model_dir} has no tokenizer, and an endpoint for text needs one")
    check_group_memory(pools, memory)
    shortage = describe_rejoin_shortage(pools, memory)
    if shortage is not None:
        log.warning("%s: until there is more, a rank that is lost may not come back", shortage)
