"""What a rank did in the last seconds, for a live display: its forwards, fetch lanes and exposed wait."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from dwdp.observability.spans import COMPUTE, EXPOSED_WAIT, Span

if TYPE_CHECKING:
    from dwdp.runtime import DwdpRuntime

WINDOW_S = 5.0
"""How far back a snapshot of fetches and waits goes."""

MAX_BARS = 2000
"""Of fetches and waits in a snapshot, on all lanes together: as many as a display may tell apart."""

_NUM_FORWARDS = 512
_NUM_SPANS = 8192


class Bar(NamedTuple):
    """A stretch of time on one lane, in seconds of the monotonic clock."""

    start_s: float
    end_s: float
    label: str


class Timeline:
    """Records the forwards of ``model`` until :meth:`close`. Costs two clock readings per forward."""

    def __init__(self, model: nn.Module) -> None:
        self._forwards: deque[Bar] = deque(maxlen=_NUM_FORWARDS)
        self._spans: dict[str, deque[Span]] = {}
        self._lock = threading.Lock()
        self._start_s = 0.0
        self._hooks = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, with_kwargs=True),
        ]

    def close(self) -> None:
        """Leave the model as it was. Idempotent."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def snapshot(self, runtime: DwdpRuntime) -> dict[str, Any]:
        """The model's forwards, and what the spans of ``runtime``, which this takes, say of the rest.

        Returns:
            ``{"now_s": s, "fetch_mode": mode, "lanes": [{"name": name, "spans": [[start_s, end_s,
            label], ...]}, ...]}``. Lanes are ``compute``, and unless the mode is ``direct``
            ``exposed wait`` and those of :attr:`DwdpRuntime.lanes`.
        """
        self._take(runtime.drain_spans())
        now_s = time.monotonic()
        with self._lock:
            forwards = [bar for bar in self._forwards if bar.end_s > now_s - WINDOW_S]
        lanes = {COMPUTE: forwards}
        names = (EXPOSED_WAIT, *runtime.lanes) if runtime.lanes else ()
        for name in names:
            spans = [span for span in self._spans.get(name, ()) if span.end_s > now_s - WINDOW_S]
            lanes[name] = bars(spans, max(1, MAX_BARS // len(names)))
        return {
            "now_s": _rounded(now_s),
            "fetch_mode": runtime.fetch_mode,
            "lanes": [
                {
                    "name": name,
                    "spans": [
                        (_rounded(bar.start_s), _rounded(bar.end_s), bar.label) for bar in row
                    ],
                }
                for name, row in lanes.items()
            ],
        }

    def _take(self, spans: Sequence[Span]) -> None:
        for span in spans:
            self._spans.setdefault(span.lane, deque(maxlen=_NUM_SPANS)).append(span)

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._start_s = time.monotonic()

    def _end(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        input_ids = kwargs.get("input_ids")
        label = "" if input_ids is None else f"{input_ids.numel()} tokens"
        with self._lock:
            self._forwards.append(Bar(self._start_s, time.monotonic(), label))


def bars(spans: Sequence[Span], max_bars: int) -> list[Bar]:
    """At most ``max_bars`` bars for the spans of one lane, which are in order and do not overlap.

    Where there are more spans, those with the least time between them share a bar.
    """
    if not spans:
        return []
    gaps = [after.start_s - span.end_s for span, after in pairwise(spans)]
    widest = sorted(range(len(gaps)), key=gaps.__getitem__, reverse=True)[: max_bars - 1]
    cuts = [0, *sorted(gap + 1 for gap in widest), len(spans)]
    return [_bar(spans[start:stop]) for start, stop in pairwise(cuts)]


def _bar(spans: Sequence[Span]) -> Bar:
    first, last = spans[0], spans[-1]
    label = f"layer {first.layer}" if len(spans) == 1 else f"{len(spans)} layers"
    if first.lane == EXPOSED_WAIT:
        label = f"waiting for {label}"
    else:
        label += f", {sum(span.num_bytes for span in spans) / 2**20:.2f} MiB"
    return Bar(first.start_s, last.end_s, label)


def _rounded(seconds: float) -> float:
    """To 10 microseconds, which keeps a document of many times short."""
    return round(seconds, 5)
