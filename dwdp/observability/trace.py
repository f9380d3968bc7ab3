"""Spans as a trace: Chrome's trace-event format, which https://ui.perfetto.dev and chrome://tracing open.

A process of the trace is a rank, a thread of it one lane. Format: "Trace Event Format", Google,
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dwdp.observability.spans import COMPUTE, EXPOSED_WAIT, Span

_FIRST_ROWS = (COMPUTE, EXPOSED_WAIT)


def trace_text(ranks: Mapping[int, Iterable[Span]]) -> str:
    """The trace of a group, as JSON.

    Args:
        ranks: the spans of every rank, in any order. Their clock is the machine's, so that those of
            ranks on one machine are beside each other as they were. The first span starts at 0.
    """
    spans = {rank: sorted(given, key=lambda span: span.start_s) for rank, given in ranks.items()}
    origin_s = min((own[0].start_s for own in spans.values() if own), default=0.0)
    events = [event for rank, own in spans.items() for event in _events(rank, own, origin_s)]
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}) + "\n"


def _events(rank: int, spans: list[Span], origin_s: float) -> Iterator[dict[str, Any]]:
    others = {span.lane for span in spans} - set(_FIRST_ROWS)
    rows = {lane: row for row, lane in enumerate((*_FIRST_ROWS, *sorted(others, key=_by_number)))}
    yield _metadata(rank, 0, "process_name", {"name": f"rank {rank}"})
    yield _metadata(rank, 0, "process_sort_index", {"sort_index": rank})
    for lane, row in rows.items():
        yield _metadata(rank, row, "thread_name", {"name": lane})
        yield _metadata(rank, row, "thread_sort_index", {"sort_index": row})
    for span in spans:
        yield {
            "ph": "X",
            "pid": rank,
            "tid": rows[span.lane],
            "name": "forward" if span.lane == COMPUTE else f"layer {span.layer}",
            "cat": span.lane,
            "ts": _microseconds(span.start_s - origin_s),
            "dur": _microseconds(span.end_s - span.start_s),
            "args": _arguments(span),
        }


def _by_number(lane: str) -> tuple[int, str]:
    """``fetch 2`` comes before ``fetch 10``, and both before ``fetch on demand``."""
    return len(lane), lane


def _metadata(rank: int, row: int, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "pid": rank, "tid": row, "name": name, "args": arguments}


def _arguments(span: Span) -> dict[str, Any]:
    if span.lane in _FIRST_ROWS:
        return {}
    seconds = span.end_s - span.start_s
    speed = {"gbs": round(span.num_bytes / seconds / 1e9, 3)} if seconds > 0 else {}
    return {"bytes": span.num_bytes, **speed}


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)
