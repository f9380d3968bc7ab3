"""What the supervisor has to know about an engine's rank processes. Nothing here names an engine.

An engine brings one :class:`RankLauncher`. It says how to start a rank, where that rank answers HTTP, and
what its exit codes mean. The rank process keeps these rules:

* it answers ``live_path`` with 200 while it can still compute, and ``ready_path`` with 200 while it takes
  requests; until it can do either it does not listen at all;
* on SIGTERM it stops accepting, finishes what it has and exits with 0;
* when it fails, the last line on standard error is ``error: <one line>``;
* started with ``DWDP_INCARNATION`` above 0 it rejoins the group that its predecessor was part of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

TIMELINE_QUERY = "timeline"
"""Asks ``stats_path`` for the timeline as well, while somebody looks at the page."""


@dataclass(frozen=True)
class RankEndpoint:
    """Where one rank process answers HTTP, and what has to be sent along.

    Attributes:
        base_url: scheme, host and port of a TCP endpoint; with ``socket`` the host is only a name.
        socket: abstract unix socket, without the leading NUL. None: TCP.
        headers: sent with every request.
        live_path, ready_path: health; see the module.
        stats_path: JSON about the rank's work (``docs/serving.md`` has its keys), with
            :data:`TIMELINE_QUERY` about its last seconds too. None: there is none.
    """

    base_url: str = "http://rank"
    socket: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    live_path: str = "/health/live"
    ready_path: str = "/health/ready"
    stats_path: str | None = "/internal/stats"


@dataclass(frozen=True)
class RankStart:
    """How to start one rank process.

    Attributes:
        arguments: program and arguments.
        environment: the whole environment.
        stdin: what it is given on standard input, after which that is closed.
    """

    arguments: Sequence[str]
    environment: Mapping[str, str]
    stdin: bytes
    endpoint: RankEndpoint


class RankLauncher(Protocol):
    """An engine's rank processes, as the supervisor sees them.

    Attributes:
        num_ranks: ranks of the group.
        exit_bad_input: exit code of a rank that refuses what the user gave.
        exit_peer_failed: exit code of a rank with which nothing is wrong but a peer's set-up.
    """

    num_ranks: int
    exit_bad_input: int
    exit_peer_failed: int

    def new_group(self) -> None:
        """Prepare a meeting point for a group that starts from nothing; the one before is given up.

        Raises:
            GroupError: there is no place for it (a port is taken).
        """

    def start(self, rank: int, incarnation: int) -> RankStart:
        """How to start ``rank`` in the current group for the ``incarnation``-th time (0: the first)."""

    def report_death(self, rank: int, message: str) -> None:
        """``rank`` died, and is not started again in this group: its peers must not wait for it."""
