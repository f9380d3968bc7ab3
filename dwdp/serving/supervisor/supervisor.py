"""Keeps the ranks of one group running."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress

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

    A rank that dies rejoins its group: the survivors still have its share of the experts mapped. One that
    fails to too often is given up, and so are ranks that die after it, because there is nobody to take its
    share from. If no rank is left that is set up, there is nothing to rejoin, and all start anew from the
    checkpoint: with all their attempts before them if the group that ended had served for a while.

    Made and used inside one event loop of the main thread.

    Args:
        new_policy: makes what decides about the restarts of one rank.
    """

    def __init__(
        self,
        launcher: RankLauncher,
        table: RankTable,
        *,
        watch: Watch | None = None,
        new_policy: Callable[[], RestartPolicy] = RestartPolicy,
    ) -> None:
        self._launcher = launcher
        self._table = table
        self._watch = watch or Watch()
        self._lives: dict[int, RankLife] = {}
        self._new_policy = new_policy
        self._policies = [new_policy() for _ in table.ranks]
        self._num_starts = [0] * launcher.num_ranks
        self._group_number = 0
        self._has_served = False
        self._is_first_set_up = True
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
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
        """Wait as long as ranks are kept running.

        Raises:
            SetupFailed: no rank is left, and they failed to start anew too often.
            GroupError: there is no place for them to meet.
        """
        done, _ = await asyncio.wait(self._keepers, return_when=asyncio.FIRST_EXCEPTION)
        for keeper in done:
            keeper.result()

    async def stop(self, grace_s: float) -> None:
        """Ask every rank to finish, and end those that have not after ``grace_s``. Idempotent.

        No process is left, and none is started any more.
        """
        self._stopping.set()
        self._note_change()
        for life in self._running():
            life.process.send_signal(signal.SIGTERM)
        await _all_done(self._keepers, grace_s)
        for life in self._running():
            pid = life.process.pid
            log.warning("process %d did not end within %.0f s: killed", pid, grace_s)
            life.process.send_signal(signal.SIGKILL)
        await _all_done(self._keepers, _KILL_S)
        for task in (*self._keepers, *self._closing):
            task.cancel()
        await asyncio.gather(*self._keepers, *self._closing, return_exceptions=True)

    async def _keep(self, rank: Rank) -> None:
        """Run ``rank`` again and again."""
        while True:
            group_number = self._group_number
            end = await self._run_once(rank, group_number)
            if self._stopping.is_set():
                return
            if self._is_first_set_up:
                await self._fail_set_up(rank, end)
            if end.code == self._launcher.exit_peer_failed and not self._table.holders():
                await self._pause(_PEERS_SPEAK_S)  # the peer's own end comes first
            if group_number == self._group_number:
                self._note_end(rank, end)
            if rank.state is RankState.GIVEN_UP:
                await self._pause(None)
            else:
                delay_s = self._policies[rank.rank].delay_s
                log.info("rank %d is started again in %.1f s", rank.rank, delay_s)
                await self._pause(delay_s)
            if self._stopping.is_set():
                return
            rank.num_restarts += 1

    def _note_end(self, rank: Rank, end: LifeEnd) -> None:
        """Decide what becomes of ``rank``, whose process in the present group has ended.

        Raises:
            SetupFailed: no rank is left, and starting anew has failed too often.
            GroupError: there is no place for a new group to meet.
        """
        policy, holders = self._policies[rank.rank], self._table.holders()
        if end.code != self._launcher.exit_peer_failed or not holders:
            policy.record_end(end.ready_s)
        self._has_served = self._has_served or policy.is_stable(end.ready_s)
        if not holders:
            if self._has_served:
                self._policies = [self._new_policy() for _ in self._policies]
            exhausted = [one for one, other in enumerate(self._policies) if other.is_exhausted]
            if exhausted:
                raise SetupFailed(
                    f"no rank is left, and rank {exhausted[0]} failed to start too often (the last to end "
                    f"was rank {rank.rank}: {end.reason})"
                )
            self._start_anew()
        elif policy.is_exhausted:
            reason = f"failed {policy.num_failures} times in a row (the last time: {end.reason})"
            self._give_up(rank, reason)
        elif missing := [one.rank for one in self._table.ranks if one.state is RankState.GIVEN_UP]:
            reason = (
                f"{end.reason}, and cannot rejoin without rank {missing[0]}, which was given up"
            )
            self._give_up(rank, reason)

    def _give_up(self, rank: Rank, reason: str) -> None:
        log.error("rank %d is given up: it %s", rank.rank, reason)
        self._table.set_state(rank, RankState.GIVEN_UP, reason)
        self._launcher.report_death(rank.rank, reason)

    async def _fail_set_up(self, rank: Rank, end: LifeEnd) -> None:
        """Nothing is started again in the first set-up: the first rank with a reason ends the command."""
        if end.code < 0:
            message = f"{end.reason} during set-up"
            self._launcher.report_death(rank.rank, message)
            raise SetupFailed(f"rank {rank.rank} {message}")
        if end.code == self._launcher.exit_bad_input:
            raise BadInput(f"rank {rank.rank}: {end.reason}")
        if end.code == self._launcher.exit_peer_failed:
            await self._pause(_PEERS_SPEAK_S)  # what the peer says comes first
        raise SetupFailed(f"rank {rank.rank}: {end.reason}")

    def _start_anew(self) -> None:
        """No process has the experts' memory any more: all ranks form a new group."""
        log.error(
            "no rank is left that has the experts' memory: all ranks load from the checkpoint again"
        )
        self._group_number += 1
        self._has_served = False
        self._num_starts = [0] * len(self._num_starts)
        for life in self._running():
            life.process.send_signal(signal.SIGKILL)
        self._launcher.new_group()
        self._note_change()

    async def _run_once(self, rank: Rank, group_number: int) -> LifeEnd:
        """Start a process for ``rank`` and see it to its end."""
        start = self._launcher.start(rank.rank, self._num_starts[rank.rank])
        self._num_starts[rank.rank] += 1
        try:
            process = await RankProcess.start(rank.rank, start)
        except OSError as error:
            reason = f"cannot run {start.arguments[0]}: {error.strerror or error}"
            self._table.set_state(rank, RankState.DEAD, reason)
            return LifeEnd(1, reason, None)
        if self._stopping.is_set() or group_number != self._group_number:  # it came too late
            process.send_signal(signal.SIGKILL)
        link = RankLink(start.endpoint)
        life = self._lives[rank.rank] = RankLife(rank, self._table, process, link, self._watch)
        rank.link, rank.pid = link, process.pid
        rank.note_stats({})
        self._table.set_state(rank, RankState.STARTING)
        try:
            end = await life.run()
        finally:
            rank.link = rank.pid = None
            self._close_later(link)
        self._table.set_state(rank, RankState.DEAD, end.reason)
        return end

    def _running(self) -> list[RankLife]:
        return [life for life in self._lives.values() if life.process.is_running]

    def _note_change(self) -> None:
        """Wake those who pause: the group is another one, or all is over."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _pause(self, seconds: float | None) -> None:
        """Wait for ``seconds`` (None: without end), or until :meth:`_note_change`."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)

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
        was_fine = rank.state in (RankState.STARTING, RankState.READY) or self._stopping.is_set()
        level = logging.INFO if was_fine else logging.WARNING
        log.log(level, "rank %d: %s -> %s%s", rank.rank, before.value, rank.state.value, reason)
        if self._stopping.is_set() or before.holds_memory == rank.state.holds_memory:
            return
        holders = self._table.holders()
        if self._table.is_memory_at_risk() and before.holds_memory:
            log.warning(
                "rank %d is the last that has the experts' memory: until another rank is back, losing "
                "it means that every rank loads from the checkpoint again",
                holders[0],
            )
        elif len(holders) == 2 and rank.state.holds_memory and rank.num_restarts:
            log.info("the experts' memory is held by %d ranks again", len(holders))


async def _all_done(tasks: Sequence[asyncio.Task[None]], seconds: float) -> None:
    if tasks:
        await asyncio.wait(tasks, timeout=seconds)
