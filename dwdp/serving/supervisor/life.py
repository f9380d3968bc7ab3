"""One rank process from its start to its end, and how it does meanwhile."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from contextlib import suppress
from dataclasses import dataclass

from dwdp.serving.supervisor.link import LINK_ERRORS, RankLink, listens_no_more
from dwdp.serving.supervisor.process import RankProcess
from dwdp.serving.supervisor.ranks import Rank, RankState, RankTable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Watch:
    """How closely ranks are watched.

    Attributes:
        start_timeout_s: a rank that is not ready after so long is killed; that start has failed.
        starting_poll_s, poll_s: seconds between looks at a rank that starts, and at one that runs.
        timeout_s: a rank that takes longer to answer is unresponsive, and gets no new requests.
        hang_s: a rank that has been unresponsive for so long is killed and started again.
        drain_timeout_s: so is one that stopped listening so long ago and has not ended.
    """

    start_timeout_s: float = 720.0
    starting_poll_s: float = 0.1
    poll_s: float = 1.0
    timeout_s: float = 10.0
    hang_s: float = 300.0
    drain_timeout_s: float = 330.0


@dataclass(frozen=True)
class LifeEnd:
    """How a process ended.

    Attributes:
        code: exit code, or minus the number of the signal that killed it.
        reason: the same in words, or the process's own error message.
        ready_s: seconds since it first was ready; None if it never was.
    """

    code: int
    reason: str
    ready_s: float | None


class RankLife:
    """Watches ``process``, which is ``rank``'s, through ``link``, and keeps ``table`` up to date."""

    def __init__(
        self, rank: Rank, table: RankTable, process: RankProcess, link: RankLink, watch: Watch
    ) -> None:
        self.process = process
        self._rank = rank
        self._table = table
        self._link = link
        self._watch = watch
        self._ready_at_s: float | None = None
        self._answered_s = 0.0
        self._refuses_since_s: float | None = None
        self._kill_reason = ""

    async def run(self) -> LifeEnd:
        """Watch until the process ends."""
        watcher = asyncio.ensure_future(self._look_after())
        try:
            code = await self.process.ended()
        finally:
            watcher.cancel()
        ready_s = None if self._ready_at_s is None else time.monotonic() - self._ready_at_s
        return LifeEnd(code, self._kill_reason or self.process.describe_end(code), ready_s)

    async def _look_after(self) -> None:
        try:
            await asyncio.wait_for(self._until_set_up(), self._watch.start_timeout_s)
        except asyncio.TimeoutError:
            self._kill(f"was not ready within {self._watch.start_timeout_s:.0f} s")
            return
        await self._read_stats()  # the router goes by the limits in them
        self._ready_at_s = self._answered_s = time.monotonic()
        self._table.set_state(self._rank, RankState.READY)
        while not await self._is_refused():
            await asyncio.sleep(self._watch.poll_s)
        while True:  # nobody is asked any more: who would answer now is somebody else
            self._note_refusal()
            await asyncio.sleep(self._watch.poll_s)

    async def _until_set_up(self) -> None:
        while not await self._is_set_up():
            await asyncio.sleep(self._watch.starting_poll_s)

    async def _is_set_up(self) -> bool:
        try:
            return await self._link.is_healthy(
                self._link.endpoint.ready_path, self._watch.timeout_s
            )
        except LINK_ERRORS:  # it does not listen yet
            return False

    async def _read_stats(self) -> None:
        with suppress(*LINK_ERRORS):
            self._rank.note_stats(
                await self._link.stats(self._watch.timeout_s, with_timeline=self._table.is_watched)
            )

    async def _is_refused(self) -> bool:
        """Look after the rank once; whether it does not listen any more."""
        try:
            await self._look()
        except LINK_ERRORS as error:
            if listens_no_more(error):
                return True
            self._note_silence()
        return False

    async def _look(self) -> None:
        endpoint, timeout_s = self._link.endpoint, self._watch.timeout_s
        if await self._link.is_healthy(endpoint.ready_path, timeout_s):
            state = RankState.READY
        elif await self._link.is_healthy(endpoint.live_path, timeout_s):
            state = RankState.DRAINING
        else:
            self._kill("said that it could not compute any more")
            return
        self._answered_s = time.monotonic()
        self._table.set_state(self._rank, state)
        await self._read_stats()

    def _note_refusal(self) -> None:
        """It does not listen any more, and never will: it was told to end, and finishes what it has."""
        now_s = time.monotonic()
        if self._refuses_since_s is None:
            self._refuses_since_s = now_s
        self._table.set_state(self._rank, RankState.DRAINING, "it takes no new connections")
        refusing_s = now_s - self._refuses_since_s
        if refusing_s > self._watch.drain_timeout_s:
            self._kill(f"did not end within {refusing_s:.0f} s")

    def _note_silence(self) -> None:
        silent_s = time.monotonic() - self._answered_s
        if silent_s < self._watch.timeout_s:
            return
        self._table.set_state(self._rank, RankState.UNRESPONSIVE, f"no answer for {silent_s:.0f} s")
        if silent_s > self._watch.timeout_s + self._watch.hang_s:
            self._kill(f"has not answered for {silent_s:.0f} s")

    def _kill(self, reason: str) -> None:
        self._kill_reason = f"{reason}, and was killed"
        log.error("rank %d %s", self._rank.rank, self._kill_reason)
        self.process.send_signal(signal.SIGKILL)
