"""Ends what a task is waiting for from outside, with an error of the caller's choice."""

from __future__ import annotations

import asyncio
from types import TracebackType


class Interruption:
    """A block of the current task that :meth:`interrupt` ends; the block then raises the error given.

    Cheaper than a task of its own to be cancelled, which every request would need several of.
    """

    def __init__(self) -> None:
        self._task: asyncio.Task[object] | None = None
        self._error: Exception | None = None

    def __enter__(self) -> Interruption:
        self._task = asyncio.current_task()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._task = None
        if kind is asyncio.CancelledError and self._error is not None:
            raise self._error.with_traceback(None) from None

    def interrupt(self, error: Exception) -> None:
        """End the block. The first error stays; without effect before or after the block.

        Called from outside the block's task, which therefore waits inside the block.
        """
        if self._task is not None and self._error is None:
            self._error = error
            self._task.cancel()
