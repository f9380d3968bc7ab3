"""The group at one moment, for ``/health`` and for the page."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from dwdp.serving.router.balancer import Balancer
from dwdp.serving.router.metrics import reported
from dwdp.serving.supervisor.limits import RankLimits
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


class SnapshotFeed:
    """The page's events, each made once for all pages that are open.

    Args:
        make: what the page shows now.
        max_age_s: of an event that is given to another page as well.
    """

    def __init__(self, make: Callable[[], dict[str, Any]], *, max_age_s: float) -> None:
        self._make = make
        self._max_age_s = max_age_s
        self._made_s = 0.0
        self._event = b""

    def fresh(self) -> bytes:
        """How things are now, for a page that has just been opened."""
        self._made_s = time.monotonic()
        self._event = b"data: " + json.dumps(self._make()).encode() + b"\n\n"
        return self._event

    def latest(self) -> bytes:
        """How things were not long ago."""
        is_old = time.monotonic() - self._made_s >= self._max_age_s
        return self.fresh() if is_old or not self._event else self._event


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
        "window": (rank.limits or RankLimits()).window,
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
        "timeline": rank.stats.get("timeline") if rank.pid is not None else None,
    }
