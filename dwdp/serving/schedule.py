"""Which rank gets which prompt: the one with the least left to do. No I/O, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

MAX_IN_FLIGHT = 2
"""Prompts a rank holds at most: one to work on, one to start next without waiting for the dispatcher.
A rank that stops keeps no more than these from the others."""


class Schedule:
    """Hands out prompts ``0 .. len(costs) - 1`` in order.

    A rank's outstanding tokens are the costs of the prompts that it holds and has not finished.

    Args:
        costs: per prompt, its own tokens plus the most it may generate.
        ranks: who takes part.
        max_in_flight: prompts that a rank holds at most.
    """

    def __init__(
        self, costs: Sequence[int], ranks: Iterable[int], *, max_in_flight: int = MAX_IN_FLIGHT
    ) -> None:
        self._costs = tuple(costs)
        self._pending = deque(range(len(costs)))
        self._held: dict[int, list[int]] = {rank: [] for rank in ranks}
        self._max_in_flight = max_in_flight
        self.num_finished = 0

    @property
    def is_finished(self) -> bool:
        return self.num_finished == len(self._costs)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that are still there."""
        return tuple(self._held)

    def outstanding_tokens(self, rank: int) -> int:
        return sum(self._costs[prompt] for prompt in self._held[rank])

    def assign(self) -> list[tuple[int, int]]:
        """The (rank, prompt) pairs to start now; they count as held from here on."""
        assigned = []
        while self._pending:
            free = [rank for rank, held in self._held.items() if len(held) < self._max_in_flight]
            if not free:
                break
            rank = min(free, key=lambda rank: (self.outstanding_tokens(rank), rank))
            prompt = self._pending.popleft()
            self._held[rank].append(prompt)
            assigned.append((rank, prompt))
        return assigned

    def finish(self, rank: int, prompt: int) -> None:
        """``rank`` has finished ``prompt``."""
        self._held[rank].remove(prompt)
        self.num_finished += 1

    def lose(self, rank: int) -> tuple[int, ...]:
        """``rank`` is gone. Returns the prompts it held: they are next in line for the others."""
        held = tuple(self._held.pop(rank))
        self._pending.extendleft(reversed(held))
        return held
