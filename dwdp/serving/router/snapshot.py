"""The group at one moment, for ``/health`` and for the page."""

from __future__ import annotations

import time
from typing import Any

from dwdp.serving.router.balancer import Balancer
from dwdp.serving.router.metrics import reported
from dwdp.serving.router.rank_limits import RankLimits
from dwdp.serving.supervisor.ranks import Rank, RankTable


def health(table: RankTable, *, is_ready: bool) -> dict[str, Any]:
    """What ``/health`` says: states only."""
    return {
        "status": "ready" if is_ready else "unavailable",
        "ranks": [
            {"rank": rank.rank, "state": rank.state.value, "reason": rank.reason}
            for rank in table.ranks
        ],
        "expert_memory": _expert_memory(table),
    }


def snapshot(table: RankTable, balancer: Balancer, model: str) -> dict[str, Any]:
    """Everything that the page shows. Times are in seconds, sizes in bytes."""
    return {
        "model": model,
        "now_s": time.monotonic(),
        "queued": balancer.num_queued,
        "expert_memory": _expert_memory(table),
        "ranks": [_rank(rank, balancer) for rank in table.ranks],
    }


def _expert_memory(table: RankTable) -> dict[str, Any]:
    return {"holders": table.holders(), "at_risk": table.is_memory_at_risk()}


def _rank(rank: Rank, balancer: Balancer) -> dict[str, Any]:
    load = balancer.load_of(rank.rank)
    return {
        "rank": rank.rank,
        "state": rank.state.value,
        "reason": rank.reason,
        "pid": rank.pid,
        "state_s": time.monotonic() - rank.since_s,
        "restarts": rank.num_restarts,
        "recovery_s": rank.recovery_s,
        "sequences": load.num_sequences,
        "window": RankLimits.of(rank).window,
        "outstanding_tokens": load.outstanding_tokens,
        "waiting": reported(rank, ("requests", "waiting")),
        "generated_tokens": reported(rank, ("tokens", "generated")),
        "prompt_tokens": reported(rank, ("tokens", "prompt")),
        "rss_bytes": reported(rank, ("memory", "rss_bytes")),
        "dense_bytes": reported(rank, ("memory", "dense_bytes")),
        "kv_cache_bytes": reported(rank, ("memory", "kv_cache_bytes")),
        "resident_expert_bytes": reported(rank, ("runtime", "resident_expert_bytes")),
        "staging_bytes": reported(rank, ("runtime", "staging_bytes")),
        "exposed_wait_s": reported(rank, ("runtime", "exposed_wait_s")),
        "timeline": rank.stats.get("timeline"),
    }
