"""``dwdp serve`` in small: the real router and supervisor over stand-in ranks. Options: one JSON argument.

``num_ranks``, ``max_running``, ``limits`` (more that the ranks say), ``settings`` (of the router), ``keys``,
``watch``, ``max_groups`` (how often there is a place for the ranks to meet), and ``exit_with``: by
``"RANK/START"`` the exit code with which that start of that rank fails.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
from pathlib import Path
from typing import Any

from dwdp.cli.main import describe_error
from dwdp.rendezvous import GroupError
from dwdp.serving.router.service import Service, run_service
from dwdp.serving.router.settings import RouterSettings
from dwdp.serving.supervisor.interface import RankEndpoint, RankStart
from dwdp.serving.supervisor.life import Watch


class StandInRanks:
    """A launcher of stand-in ranks. Says on standard error which group and incarnation it starts."""

    exit_bad_input = 2
    exit_peer_failed = 3

    def __init__(self, options: dict[str, Any]) -> None:
        self.num_ranks = options["num_ranks"]
        self._options = options
        self._num_groups = 0
        self._num_starts = [0] * self.num_ranks

    def new_group(self) -> None:
        if self._num_groups == self._options["max_groups"]:
            raise GroupError("no place to meet")
        self._num_groups += 1

    def start(self, rank: int, incarnation: int) -> RankStart:
        print(
            f"start rank {rank} group {self._num_groups} incarnation {incarnation}", file=sys.stderr
        )
        start = self._num_starts[rank]
        self._num_starts[rank] += 1
        name, token = f"dwdp-test-{secrets.token_hex(8)}", secrets.token_hex(8)
        job = {
            "socket": name,
            "token": token,
            "rank": rank,
            "parent_pid": os.getpid(),
            "max_running": self._options["max_running"],
            "limits": self._options["limits"],
            "exit_with": self._options["exit_with"].get(f"{rank}/{start}", 0),
        }
        return RankStart(
            arguments=[sys.executable, str(Path(__file__).with_name("stand_in_rank.py"))],
            environment=dict(os.environ),
            stdin=json.dumps(job).encode() + b"\n",
            endpoint=RankEndpoint(socket=name, headers={"Authorization": f"Bearer {token}"}),
        )

    def report_death(self, rank: int, message: str) -> None:
        print(f"reported: rank {rank} {message}", file=sys.stderr)


def new_service(options: dict[str, Any]) -> Service:
    return Service(
        StandInRanks(options),
        "stand-in",
        RouterSettings(**options["settings"]),
        host="127.0.0.1",
        port=0,
        keys=options["keys"],
        watch=Watch(**options["watch"]),
        announce=lambda url, num_ranks: print(f"ready {url} {num_ranks}", flush=True),
    )


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        options = json.loads(sys.argv[1])
        return run_service(lambda: new_service(options))
    except Exception as error:
        text, code = describe_error(error)
        print(f"error: {text}", file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(main())
