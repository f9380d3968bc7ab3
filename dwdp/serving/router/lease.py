"""A request's place on a rank, and how long it may take."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from dwdp.serving.openai.errors import ApiError, deadline_exceeded
from dwdp.serving.router.cost import Cost
from dwdp.serving.supervisor.link import RankLink
from dwdp.serving.supervisor.ranks import Rank


@dataclass(frozen=True)
class Deadline:
    """When a request is given up: ``timeout_s`` seconds after it came, at the loop's time ``at_s``."""

    timeout_s: float
    at_s: float

    @classmethod
    def after(cls, timeout_s: float) -> Deadline:
        return cls(timeout_s, asyncio.get_running_loop().time() + timeout_s)

    @property
    def left_s(self) -> float:
        return max(0.0, self.at_s - asyncio.get_running_loop().time())

    def error(self) -> ApiError:
        return deadline_exceeded(self.timeout_s)


@dataclass
class RankLoad:
    """What one rank process has been given and not finished."""

    outstanding_tokens: int = 0
    num_sequences: int = 0
    leases: set[Lease] = field(default_factory=set)
    paused_until_s: float = 0.0


class Lease:
    """A request's place on a rank, until :meth:`release`.

    Args:
        link: to the process that the place is on; ``rank`` may have another one later.
        load: of that process.
        on_release: called once, when the place is given back.

    Attributes:
        cut_reason: why somebody cut the request off before it was done; None: nobody has.
    """

    def __init__(
        self,
        rank: Rank,
        link: RankLink,
        load: RankLoad,
        cost: Cost,
        on_release: Callable[[Lease], object],
    ) -> None:
        self.rank = rank
        self.link = link
        self.load = load
        self.cut_reason: ApiError | None = None
        self._cost = cost
        self._on_release = on_release
        self._prompt_tokens = cost.prompt_tokens
        self._cut: Callable[[], object] | None = None
        self._is_answered = False
        load.leases.add(self)
        load.num_sequences += cost.num_sequences
        load.outstanding_tokens += cost.prompt_tokens + cost.new_tokens

    def on_cut(self, cut: Callable[[], object]) -> None:
        """What ends the wait for the rank from now on."""
        self._cut = cut
        if self.cut_reason is not None:
            cut()

    def cut(self, reason: ApiError) -> None:
        """End the request on this rank. The first reason stays."""
        if self.cut_reason is None:
            self.cut_reason = reason
            if self._cut is not None:
                self._cut()

    def note_first_token(self) -> None:
        """The prompt is behind the rank."""
        self._is_answered = True
        self.load.outstanding_tokens -= self._prompt_tokens
        self._prompt_tokens = 0

    @property
    def is_answered(self) -> bool:
        """Whether the rank has produced anything."""
        return self._is_answered

    def release(self) -> None:
        """Give the place back. Idempotent."""
        if self in self.load.leases:
            self.load.leases.discard(self)
            self._cut = None
            self.load.num_sequences -= self._cost.num_sequences
            self.load.outstanding_tokens -= self._prompt_tokens + self._cost.new_tokens
            self._on_release(self)
