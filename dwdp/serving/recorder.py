"""What a rank did while it answered a request, for a trace."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dwdp.observability.spans import COMPUTE, Span

if TYPE_CHECKING:
    from torch import nn

    from dwdp.runtime import DwdpRuntime


@contextmanager
def recording(model: nn.Module, runtime: DwdpRuntime) -> Iterator[list[Span]]:
    """Collect, in the list that this gives, the spans of the forwards inside and of their fetches.

    The runtime keeps the last thousand or so of each lane, so they are taken at every forward.
    """
    spans: list[Span] = []
    start_s = 0.0

    def begin(module: nn.Module, args: Any) -> None:
        nonlocal start_s
        start_s = time.monotonic()

    def end(module: nn.Module, args: Any, output: Any) -> None:
        spans.append(Span(COMPUTE, start_s, time.monotonic(), -1, 0))
        spans.extend(runtime.drain_spans())

    hooks = [model.register_forward_pre_hook(begin), model.register_forward_hook(end)]
    try:
        yield spans
    finally:
        for hook in hooks:
            hook.remove()
        spans.extend(runtime.drain_spans())
