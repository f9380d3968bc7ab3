"""When the model computed: the last forwards of a rank, for a live display."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any, NamedTuple

from torch import nn

_NUM_SPANS = 512


class Span(NamedTuple):
    """A stretch of time on one lane, in seconds of the monotonic clock."""

    start_s: float
    end_s: float
    label: str


class Timeline:
    """Records the forwards of ``model`` until :meth:`close`. Costs two clock readings per forward."""

    def __init__(self, model: nn.Module) -> None:
        self._spans: deque[Span] = deque(maxlen=_NUM_SPANS)
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

    def snapshot(self) -> dict[str, Any]:
        """``{"now_s": s, "lanes": [{"name": "compute", "spans": [[start_s, end_s, label], ...]}]}``."""
        with self._lock:
            spans = list(self._spans)
        return {"now_s": time.monotonic(), "lanes": [{"name": "compute", "spans": spans}]}

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._start_s = time.monotonic()

    def _end(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        input_ids = kwargs.get("input_ids")
        label = "" if input_ids is None else f"{input_ids.numel()} tokens"
        with self._lock:
            self._spans.append(Span(self._start_s, time.monotonic(), label))
