"""Keeps the ranks of one group running."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Sequence

from dwdp.serving.dispatcher import BadInput, SetupFailed
from dwdp.serving.supervisor.interface import RankLauncher
from dwdp.serving.supervisor.life import LifeEnd, RankLife, Watch
from dwdp.serving.supervisor.link import RankLink
from dwdp.serving.supervisor.process import RankProcess
from dwdp.serving.supervisor.ranks import Rank, RankState, RankTable
from dwdp.serving.supervisor.restarts import RestartPolicy

log = logging.getLogger(__name__)

_KILL_S = 2.0
_PEERS_SPEAK_S = 2.0
_LAST_BYTES_S = 1.0
_POLL_S = 0.05


class Supervisor:
    """Starts ``launcher``'s ranks, keeps ``table`` up to date, and starts ranks that die again.

    A rank that dies rejoins its group: the survivors still have its share of the experts mapped. If no
    rank is left that is set up, there is nothing to rejoin, and all start anew from the checkpoint.

    Made and used inside one event loop of the main thread.
    """

    def __init__(
        self, launcher: RankLauncher, table: RankTable, *, watch: Watch | None = None
    ) -> None:
        self._launcher = launcher
        self._table = table
        self._watch = watch or Watch()
        self._lives: dict[int, RankLife] = {}
        self._num_starts = [0] * launcher.num_ranks
        self._group_number = 0
        self._is_first_set_up = True
        self._is_stopping = False
        self._keepers: list[asyncio.Task[None]] = []
        self._closing: set[asyncio.Task[None]] = set()
        table.on_change.append(self._log_change)

    async def start(self) -> None:
        """Start every rank and wait until all are ready.

        Raises:
            BadInput, SetupFailed: one could not be set up; the text is that rank's message.
            GroupError: there is no place for the ranks to meet.
        """
        self._launcher.new_group()
        self._keepers = [asyncio.ensure_future(self._keep(rank)) for rank in self._table.ranks]
        while not all(rank.state is RankState.READY for rank in self._table.ranks):
            done, _ = await asyncio.wait(
                self._keepers, timeout=_POLL_S, return_when=asyncio.FIRST_COMPLETED
            )
            for keeper in done:
                keeper.result()
        self._is_first_set_up = False

    async def wait(self) -> None:
        """Wait as long as any rank is kept running.

        Raises:
            SetupFailed: every rank has been given up.
        """
        await asyncio.gather(*self._keepers)
        if not self._is_stopping:
            raise SetupFailed("no rank is left: each failed to start too often")

    async def stop(self, grace_s: float) -> None:
        """Ask every rank to finish, and end those that have not after ``grace_s``. Idempotent."""
        self._is_stopping = True
        running = [life.process for life in self._lives.values() if life.process.is_running]
        for process in running:
            process.send_signal(signal.SIGTERM)
        await _all_ended(running, grace_s)
        for process in running:
            if process.is_running:
                log.warning("process %d did not end within %.0f s: killed", process.pid, grace_s)
                process.send_signal(signal.SIGKILL)
        await _all_ended(running, _KILL_S)
        for task in (*self._keepers, *self._closing):
            task.cancel()
        await asyncio.gather(*self._keepers, *self._closing, return_exceptions=True)

    async def _keep(self, rank: Rank) -> None:
        """Run ``rank`` again and again."""
        policy = RestartPolicy()
        while True:
            group_number = self._group_number
            end = await self._run_once(rank)
            if self._is_stopping:
                return
            if self._is_first_set_up:
                await self._fail_set_up(rank, end)
            is_same_group = group_number == self._group_number
            if is_same_group and end.code != self._launcher.exit_peer_failed:
                policy.record_end(end.ready_s)
            if is_same_group and not self._table.holders():
                self._start_anew()
            if policy.is_exhausted:
                log.error("rank %d failed %d times in a row: given up", rank.rank, policy.limit)
                self._table.set_state(rank, RankState.GIVEN_UP, end.reason)
                return
            log.info("rank %d is started again in %.1f s", rank.rank, policy.delay_s)
            await asyncio.sleep(policy.delay_s)
            rank.num_restarts += 1

    async def _fail_set_up(self, rank: Rank, end: LifeEnd) -> None:
        """Nothing is started again in the first set-up: the first rank with a reason ends the command."""
        if end.code < 0:
            message = f"{end.reason} during set-up"
            self._launcher.report_death(rank.rank, message)
            raise SetupFailed(f"rank {rank.rank} {message}")
        if end.code == self._launcher.exit_bad_input:
            raise BadInput(f"rank {rank.rank}: {end.reason}")
        if end.code == self._launcher.exit_peer_failed:
            await asyncio.sleep(_PEERS_SPEAK_S)  # what the peer says comes first
        raise SetupFailed(f"rank {rank.rank}: {end.reason}")

    def _start_anew(self) -> None:
        """No process has the experts' memory any more: the ranks form a new group."""
        log.error(
            "no rank is left that has the experts' memory: all ranks load from the checkpoint again"
        )
        self._group_number += 1
        self._num_starts = [0] * len(self._num_starts)
        for life in self._lives.values():
            life.process.send_signal(signal.SIGKILL)
        self._launcher.new_group()

    async def _run_once(self, rank: Rank) -> LifeEnd:
        """Start a process for ``rank`` and see it to its end."""
        start = self._launcher.start(rank.rank, self._num_starts[rank.rank])
        self._num_starts[rank.rank] += 1
        try:
            process = await RankProcess.start(rank.rank, start)
        except OSError as error:
            reason = f"cannot run {start.arguments[0]}: {error.strerror or error}"
            self._table.set_state(rank, RankState.DEAD, reason)
            return LifeEnd(1, reason, None)
        link = RankLink(start.endpoint)
        life = self._lives[rank.rank] = RankLife(rank, self._table, process, link, self._watch)
        rank.link, rank.pid, rank.stats = link, process.pid, {}
        self._table.set_state(rank, RankState.STARTING)
        try:
            end = await life.run()
        finally:
            rank.link = rank.pid = None
            self._close_later(link)
        self._table.set_state(rank, RankState.DEAD, end.reason)
        return end

    def _close_later(self, link: RankLink) -> None:
        """Leave requests the time to read what the process wrote before it ended."""

        async def close() -> None:
            try:
                await asyncio.sleep(_LAST_BYTES_S)
            finally:
                await link.close()

        task = asyncio.ensure_future(close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _log_change(self, rank: Rank, before: RankState) -> None:
        reason = f" ({rank.reason})" if rank.reason else ""
        was_fine = rank.state in (RankState.STARTING, RankState.READY) or self._is_stopping
        level = logging.INFO if was_fine else logging.WARNING
        log.log(level, "rank %d: %s -> %s%s", rank.rank, before.value, rank.state.value, reason)
        if self._is_stopping or before.holds_memory == rank.state.holds_memory:
            return
        holders = self._table.holders()
        if self._table.is_memory_at_risk() and holders and before.holds_memory:
            log.warning(
                "rank %d is the last that has the experts' memory: until another rank is back, losing "
                "it means that every rank loads from the checkpoint again",
                holders[0],
            )
        elif len(holders) == 2 and rank.state.holds_memory and rank.num_restarts:
            log.info("the experts' memory is held by %d ranks again", len(holders))


async def _all_ended(processes: Sequence[RankProcess], seconds: float) -> None:
    if processes:
        await asyncio.gather(*(process.ended_within(seconds) for process in processes))
