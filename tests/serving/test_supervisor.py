"""The supervisor over stand-in ranks: who is started again, who is given up, and what is left at the end."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import secrets
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from dwdp.serving.dispatcher import SetupFailed
from dwdp.serving.router.balancer import Balancer
from dwdp.serving.router.metrics import RouterMetrics
from dwdp.serving.router.snapshot import snapshot
from dwdp.serving.supervisor import link as rank_link
from dwdp.serving.supervisor.interface import RankEndpoint, RankStart
from dwdp.serving.supervisor.life import LifeEnd, RankLife, Watch
from dwdp.serving.supervisor.link import RankLink
from dwdp.serving.supervisor.process import RankProcess
from dwdp.serving.supervisor.rank_connection import RankUnreachable
from dwdp.serving.supervisor.ranks import RankState, RankTable
from dwdp.serving.supervisor.restarts import RestartPolicy
from dwdp.serving.supervisor.supervisor import Supervisor

STAND_IN = Path(__file__).parent / "router" / "stand_in_rank.py"
WAIT_S = 120.0
FAILS = 2
NOBODY = 65534


class Launcher:
    """Starts stand-in ranks: they serve without a model.

    Args:
        exit_with: by "RANK/START" the exit code with which that start of that rank fails.
    """

    exit_bad_input = 2
    exit_peer_failed = 3

    def __init__(self, num_ranks: int, exit_with: dict[str, int]) -> None:
        self.num_ranks = num_ranks
        self.num_groups = 0
        self.num_starts = [0] * num_ranks
        self.reported: dict[int, str] = {}
        self.on_start: Callable[[], object] = lambda: None
        self._exit_with = exit_with

    def new_group(self) -> None:
        self.num_groups += 1

    def start(self, rank: int, incarnation: int) -> RankStart:
        self.on_start()
        number = self.num_starts[rank]
        self.num_starts[rank] += 1
        job = {
            "socket": f"dwdp-test-{secrets.token_hex(8)}",
            "token": "token",
            "rank": rank,
            "parent_pid": os.getpid(),
            "max_running": 4,
            "limits": {},
            "exit_with": self._exit_with.get(f"{rank}/{number}", 0),
        }
        return RankStart(
            arguments=[sys.executable, str(STAND_IN)],
            environment=dict(os.environ),
            stdin=json.dumps(job).encode() + b"\n",
            endpoint=RankEndpoint(
                socket=str(job["socket"]), headers={"Authorization": "Bearer token"}
            ),
        )

    def report_death(self, rank: int, message: str) -> None:
        self.reported[rank] = message


class Supervision:
    """A supervisor whose ranks are ready, and its table."""

    def __init__(
        self, num_ranks: int, exit_with: dict[str, int], policy: RestartPolicy, watch: Watch
    ) -> None:
        self.launcher = Launcher(num_ranks, exit_with)
        self.table = RankTable.of_size(num_ranks)
        self.supervisor = Supervisor(
            self.launcher,
            self.table,
            watch=watch,
            new_policy=lambda: RestartPolicy(**vars(policy)),
        )

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        pid = self.table.ranks[rank].pid
        assert pid is not None
        os.kill(pid, number)

    async def until(self, condition: Callable[[], Any]) -> None:
        async def poll() -> None:
            while not condition():
                await asyncio.sleep(0.01)

        await asyncio.wait_for(poll(), WAIT_S)

    async def until_states(self, *states: RankState) -> None:
        await self.until(lambda: tuple(rank.state for rank in self.table.ranks) == states)


def run(
    num_ranks: int,
    body: Callable[[Supervision], Awaitable[None]],
    *,
    exit_with: dict[str, int] | None = None,
    watch: Watch | None = None,
    **policy: Any,
) -> None:
    """Run ``body`` once ``num_ranks`` ranks are ready. No process may be left of them afterwards."""
    values = {"limit": FAILS, "first_delay_s": 0.01, "stable_s": 0.0, **policy}

    async def main() -> None:
        one = Supervision(
            num_ranks,
            exit_with or {},
            RestartPolicy(**values),
            watch or Watch(poll_s=0.05, starting_poll_s=0.05),
        )
        try:
            await asyncio.wait_for(one.supervisor.start(), WAIT_S)
            await body(one)
        finally:
            await one.supervisor.stop(WAIT_S)
        assert not rank_processes()

    asyncio.run(main())


def rank_processes() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and STAND_IN.name in " ".join(child.cmdline())
    ]


def failing(rank: int, starts: Sequence[int], code: int = 1) -> dict[str, int]:
    return {f"{rank}/{start}": code for start in starts}


READY, GIVEN_UP = RankState.READY, RankState.GIVEN_UP


def test_ranks_that_were_given_up_are_started_with_the_next_group() -> None:
    async def body(one: Supervision) -> None:
        one.kill(1)
        await one.until_states(READY, GIVEN_UP, READY)
        assert one.launcher.reported[1].startswith(
            f"failed {FAILS} times in a row (the last time: "
        )
        # Rank 2 would find nobody to take rank 1's experts from.
        one.kill(2)
        await one.until_states(READY, GIVEN_UP, GIVEN_UP)
        assert "cannot rejoin without rank 1" in one.launcher.reported[2]
        assert "cannot rejoin without rank 1" in one.table.ranks[2].reason
        assert one.launcher.num_starts[2] == one.launcher.num_groups == 1
        one.kill(0)
        await one.until_states(READY, READY, READY)
        assert one.launcher.num_groups == 2
        # All its attempts are before rank 1 again: one failure does not exhaust them.
        one.kill(1)
        await one.until(lambda: one.launcher.num_starts[1] == FAILS + 4)
        await one.until_states(READY, READY, READY)

    run(3, body, exit_with=failing(1, [*range(1, FAILS + 1), FAILS + 2]))


def test_a_group_that_cannot_be_formed_anew_ends_the_supervision() -> None:
    """The rank that is blamed is the one that fails, though its peers may end first."""

    async def body(one: Supervision) -> None:
        one.kill(0)
        one.kill(1)
        with pytest.raises(
            SetupFailed, match="no rank is left, and rank 1 failed to start too often"
        ):
            await asyncio.wait_for(one.supervisor.wait(), WAIT_S)

    failures = failing(1, range(1, 20)) | failing(0, range(1, 20), Launcher.exit_peer_failed)
    run(2, body, exit_with=failures)


def test_nothing_is_started_after_the_end() -> None:
    async def body(one: Supervision) -> None:
        one.kill(1)
        await one.until(lambda: one.table.ranks[1].state is RankState.DEAD)
        await one.supervisor.stop(WAIT_S)  # while rank 1 waits for its next start
        assert one.launcher.num_starts[1] == 1

    run(2, body, first_delay_s=WAIT_S)


def test_a_rank_that_is_being_started_at_the_end_is_not_left_behind() -> None:
    async def body(one: Supervision) -> None:
        stops: list[asyncio.Task[None]] = []

        def stop() -> None:
            stops.append(asyncio.ensure_future(one.supervisor.stop(WAIT_S)))

        one.launcher.on_start = stop
        one.kill(1)
        await one.until(lambda: stops)
        await asyncio.wait_for(stops[0], WAIT_S)
        assert not rank_processes()

    run(2, body)


def test_what_an_ended_process_reported_is_not_reported_any_more() -> None:
    async def body(one: Supervision) -> None:
        balancer = Balancer(one.table, max_queued=1)
        metrics = RouterMetrics(one.table, balancer)
        one.table.is_watched = True
        await one.until(lambda: all("timeline" in rank.stats for rank in one.table.ranks))
        one.kill(1)
        await one.until(lambda: one.table.ranks[1].state is RankState.DEAD)
        text = metrics.text().decode()
        for name in ("rss_bytes", "running_sequences", "generated_tokens_total"):
            assert f'dwdp_rank_{name}{{rank="0"}}' in text
            assert f'dwdp_rank_{name}{{rank="1"}}' not in text
        alive, ended = snapshot(one.table, balancer, "m")["ranks"]
        for name in ("rss_bytes", "waiting", "resident_expert_bytes", "timeline"):
            assert alive[name] is not None and ended[name] is None
        limits = one.table.ranks[1].limits
        assert limits is not None and limits.max_running == 4  # the next one's will be the same

    run(2, body, first_delay_s=WAIT_S)


def life_of(
    program: str,
    watch: Watch,
    on_state: Callable[[RankState, str], object] = lambda state, name: None,
) -> tuple[list[RankState], LifeEnd]:
    """The states and the end of a rank that runs ``program``; its argument is the socket's name.

    Args:
        on_state: called with each state, and the socket's name.
    """

    async def main() -> tuple[list[RankState], LifeEnd]:
        name = f"dwdp-test-{secrets.token_hex(8)}"
        endpoint = RankEndpoint(socket=name, stats_path=None)
        start = RankStart([sys.executable, "-c", program, name], dict(os.environ), b"", endpoint)
        table = RankTable.of_size(1)
        states: list[RankState] = []
        table.on_change.append(lambda rank, before: states.append(rank.state))
        table.on_change.append(lambda rank, before: on_state(rank.state, name))
        link = RankLink(endpoint)
        process = await RankProcess.start(0, start)
        try:
            life = RankLife(table.ranks[0], table, process, link, watch)
            return states, await asyncio.wait_for(life.run(), WAIT_S)
        finally:
            await link.close()

    return asyncio.run(main())


def test_a_rank_that_hangs_while_it_starts_is_killed_and_has_failed() -> None:
    states, end = life_of("import time; time.sleep(600)", Watch(start_timeout_s=1.0))
    assert states == []
    assert end == LifeEnd(-signal.SIGKILL, "was not ready within 1 s, and was killed", None)
    policy = RestartPolicy()
    policy.record_end(end.ready_s)
    assert policy.num_failures == 1


DRAINS_WITHOUT_END = """\
import socket, sys, time
listener = socket.socket(socket.AF_UNIX)
listener.bind("\\0" + sys.argv[1])
listener.listen()
connection = listener.accept()[0]
connection.recv(4096)
connection.sendall(b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Length: 0\\r\\n\\r\\n")
connection.close()
listener.close()
time.sleep(600)
"""


def test_a_rank_that_stops_listening_and_does_not_end_is_killed() -> None:
    watch = Watch(poll_s=0.02, starting_poll_s=0.02, timeout_s=60.0, drain_timeout_s=0.2)
    states, end = life_of(DRAINS_WITHOUT_END, watch)
    assert states == [RankState.READY, RankState.DRAINING]
    assert end.code == -signal.SIGKILL and "did not end within" in end.reason


def test_a_rank_that_listens_no_more_takes_no_requests_whoever_has_its_name() -> None:
    listeners = []

    async def serve(name: str) -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

        listeners.append(await asyncio.start_unix_server(answer, f"\0{name}"))

    def take_name(state: RankState, name: str) -> None:
        if state is RankState.DRAINING:
            listeners.append(asyncio.ensure_future(serve(name)))

    watch = Watch(poll_s=0.02, starting_poll_s=0.02, timeout_s=60.0, drain_timeout_s=1.0)
    states, end = life_of(DRAINS_WITHOUT_END, watch, take_name)
    assert len(listeners) == 2
    assert states == [RankState.READY, RankState.DRAINING]
    assert "did not end within" in end.reason


def test_nothing_is_sent_to_another_users_process(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"dwdp-test-{secrets.token_hex(8)}"
    endpoint = RankEndpoint(socket=name, headers={"Authorization": "Bearer token"})

    async def ask() -> None:
        link = RankLink(endpoint)
        try:
            with pytest.raises(RankUnreachable, match="another user"):
                await link.is_healthy("/health/ready", 5.0)
            with pytest.raises(RankUnreachable, match="another user"):
                await link.post("/v1/completions", b"{}", {}).begin()
        finally:
            await link.close()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        if os.geteuid() == 0:
            os.seteuid(NOBODY)  # a listener's user is the one that calls this
            try:
                listener.listen()
            finally:
                os.seteuid(0)
        else:
            listener.listen()
            monkeypatch.setattr(rank_link, "is_own_user", lambda connection: False)
        asyncio.run(ask())
        for _ in range(2):
            connection, _ = listener.accept()
            with connection:
                assert connection.recv(4096) == b""


class FullDisk(io.TextIOBase):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_rank_is_read_on_when_its_words_cannot_be_passed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise it stands still as soon as the pipe is full."""
    monkeypatch.setattr(sys, "stderr", FullDisk())
    talk = "for _ in range(20_000): print('more than a pipe holds')"
    start = RankStart([sys.executable, "-c", talk], dict(os.environ), b"", RankEndpoint())

    async def main() -> int:
        process = await RankProcess.start(0, start)
        return await asyncio.wait_for(process.ended(), WAIT_S)

    assert asyncio.run(main()) == 0
