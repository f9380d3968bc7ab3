"""What becomes of a request that ranks refuse."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection

from dwdp.serving.openai.errors import ApiError, overloaded, unavailable
from dwdp.serving.router.balancer import MAX_RETRY_AFTER_S

_BUSY = 429
_NOT_TAKING = 503
REFUSAL_STATUSES = frozenset({_BUSY, _NOT_TAKING})
"""With these a rank says that it has not begun: it is full, or ending."""

_TIMES = 2
_RETRY_AFTER_S = 1.0


class RankRefused(Exception):
    """A rank did not begin a request.

    Args:
        status: one of :data:`REFUSAL_STATUSES`.
        retry_after: its ``Retry-After`` header.
    """

    def __init__(self, status: int, retry_after: str | None) -> None:
        super().__init__(f"refused with status {status}")
        self.status = status
        self.retry_after_s = _RETRY_AFTER_S
        if retry_after is not None and retry_after.isascii() and retry_after.isdigit():
            self.retry_after_s = min(float(retry_after), MAX_RETRY_AFTER_S)


class Refusals:
    """The refusals of one request so far."""

    def __init__(self) -> None:
        self._num_refusals: Counter[int] = Counter()
        self._is_busy = False
        self._retry_after_s = MAX_RETRY_AFTER_S

    def add(self, rank: int, refusal: RankRefused) -> None:
        self._num_refusals[rank] += 1
        self._is_busy |= refusal.status == _BUSY
        self._retry_after_s = min(self._retry_after_s, refusal.retry_after_s)

    def verdict(self, ready: Collection[int]) -> ApiError | None:
        """What the client is told when every rank in ``ready`` has refused; None: one may still take it.

        A rank is asked twice: it may not have noticed yet that a client left, whose place it then has.
        429 if any was full, 503 if all were ending, or none is ready any more.
        """
        if not self._num_refusals or any(self._num_refusals[rank] < _TIMES for rank in ready):
            return None
        if self._is_busy and ready:
            return overloaded("The queues of all ranks are full", self._retry_after_s)
        return unavailable("No rank takes requests now", "no_rank", self._retry_after_s)


def has_failed(status: int, body: bytes) -> bool:
    """Whether an answer means that the rank's model broke down over this request or another one."""
    if status != _NOT_TAKING:
        return False
    try:
        error = json.loads(body)["error"]
    except (ValueError, LookupError, TypeError):
        return False
    return isinstance(error, dict) and error.get("code") == "engine_failed"
