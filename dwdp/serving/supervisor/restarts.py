"""When a rank that died is started again, and when it is not any more."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RestartPolicy:
    """Counts one rank's failures in a row, and spaces its starts out accordingly.

    A process that was ready for ``stable_s`` seconds has done well: whatever ended it then, the count
    begins again. So a rank that is killed now and then comes back at once, and one that cannot start is
    tried after 0.2, 0.4, 0.8 ... seconds, ``max_delay_s`` at most.

    Attributes:
        limit: failures in a row after which the rank is given up.
    """

    limit: int = 10
    first_delay_s: float = 0.2
    max_delay_s: float = 30.0
    stable_s: float = 3.0
    num_failures: int = 0

    def record_end(self, ready_s: float | None) -> None:
        """A process ended that had been ready for ``ready_s`` seconds (None: it never was)."""
        if self.is_stable(ready_s):
            self.num_failures = 0
        else:
            self.num_failures += 1

    def is_stable(self, ready_s: float | None) -> bool:
        """Whether a process that had been ready for ``ready_s`` seconds has done well."""
        return ready_s is not None and ready_s >= self.stable_s

    @property
    def is_exhausted(self) -> bool:
        return self.num_failures >= self.limit

    @property
    def delay_s(self) -> float:
        """How long to wait before the next start."""
        return float(min(self.first_delay_s * 2**self.num_failures, self.max_delay_s))
