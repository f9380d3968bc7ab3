"""What a rank tells about itself at ``/internal/stats``."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dwdp.serving.rank_server.engine import Engine
from dwdp.serving.rank_server.timeline import Timeline
from dwdp.system_memory import peak_rss_bytes, rss_bytes

if TYPE_CHECKING:
    from dwdp.engines.transformers import Attachment


@dataclass(frozen=True)
class RankFacts:
    """What stays as it is while a rank serves."""

    rank: int
    dwdp_size: int
    model: str
    max_batch_tokens: int
    max_waiting: int


class Statistics:
    """Gathers the counters of a rank.

    Args:
        attachment: the rank's model.
    """

    def __init__(
        self, facts: RankFacts, engine: Engine, attachment: Attachment, timeline: Timeline
    ) -> None:
        self._facts = facts
        self._engine = engine
        self._attachment = attachment
        self._timeline = timeline
        self._started_s = time.monotonic()

    def snapshot(self, *, with_timeline: bool) -> dict[str, Any]:
        """A JSON document; counters are totals since the start, requests are counted by answers.

        Args:
            with_timeline: what only the page shows, and what takes longest to gather, besides.
        """
        engine, backend = self._engine, self._engine.backend
        counters = engine.counters
        load_report = self._attachment.load_report
        num_running = engine.num_running
        document = {
            "rank": self._facts.rank,
            "dwdp_size": self._facts.dwdp_size,
            "pid": os.getpid(),
            "engine": "transformers",
            "batching": backend.name,
            "model": self._facts.model,
            "state": engine.state,
            "uptime_s": time.monotonic() - self._started_s,
            "requests": {
                "running": num_running,
                "waiting": engine.num_unfinished - num_running,
                "finished": counters.finished,
                "failed": counters.failed,
                "cancelled": counters.cancelled,
                "rejected": counters.rejected,
            },
            "tokens": {
                "prompt": counters.prompt_tokens,
                "generated": counters.generated_tokens,
                "outstanding": engine.outstanding_tokens,
            },
            "limits": {
                "max_sequence_length": backend.max_sequence_length,
                "max_batch_tokens": self._facts.max_batch_tokens,
                "max_running": backend.max_running,
                "max_waiting": self._facts.max_waiting,
                "kv_cache_tokens": backend.kv_cache_tokens,
            },
            "memory": {
                "rss_bytes": rss_bytes(),
                "peak_rss_bytes": peak_rss_bytes(),
                "dense_bytes": load_report.dense_bytes if load_report is not None else 0,
                "kv_cache_bytes": backend.kv_cache_bytes,
            },
            "runtime": asdict(self._attachment.runtime.stats()),
            "load_s": load_report.seconds if load_report is not None else 0.0,
        }
        if with_timeline:
            document["timeline"] = self._timeline.snapshot(self._attachment.runtime)
        return document
