"""Finds stop strings in text that arrives in pieces. No piece of one is ever let through."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Lets text through up to the first occurrence of any stop string.

    Args:
        stops: strings to look for, none empty.

    Attributes:
        is_stopped: whether one was found.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.is_stopped = False

    def add(self, text: str) -> str:
        """The text that can be let through now. What might be the beginning of a stop string is held back."""
        if self.is_stopped:
            return ""
        self._held += text
        found = [begin for stop in self._stops if (begin := self._held.find(stop)) >= 0]
        if found:
            passed, self._held = self._held[: min(found)], ""
            self.is_stopped = True
            return passed
        keep = self._num_held()
        passed = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return passed

    def finish(self) -> str:
        """What was held back: no more text will come to complete it."""
        passed, self._held = self._held, ""
        return passed

    def _num_held(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
