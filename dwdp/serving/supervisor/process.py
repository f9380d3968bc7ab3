"""One rank process: started, read, waited for, ended."""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import suppress

from dwdp.serving.supervisor.interface import RankStart

_ERROR_PREFIX = "error: "
_MAX_LINE_BYTES = 8192
_READ_BYTES = 1 << 14
_LAST_LINES_S = 1.0


class RankProcess:
    """A process that :meth:`start` has made. Started from the main thread, it ends when that does.

    What it writes appears on this process's standard error with the rank in front of each line.
    """

    def __init__(self, rank: int, process: asyncio.subprocess.Process) -> None:
        self.pid = process.pid
        self._rank = rank
        self._process = process
        self._error = ""
        self._reader = asyncio.ensure_future(self._read())
        self._end = asyncio.ensure_future(self._wait())

    @classmethod
    async def start(cls, rank: int, start: RankStart) -> RankProcess:
        """Raises OSError when the program cannot be run."""
        process = await asyncio.create_subprocess_exec(
            *start.arguments,
            env=dict(start.environment),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            # A terminal's signals are for this process: uvloop's children do not ignore what nohup ignores.
            start_new_session=True,
        )
        assert process.stdin is not None
        try:
            # It may have ended already, and its exit code says so. uvloop raises RuntimeError then.
            with suppress(ConnectionError, RuntimeError):
                process.stdin.write(start.stdin)
                await process.stdin.drain()
        except asyncio.CancelledError:
            with suppress(ProcessLookupError):
                process.kill()
            raise
        with suppress(RuntimeError):
            process.stdin.close()
        return cls(rank, process)

    @property
    def is_running(self) -> bool:
        return not self._end.done()

    async def ended(self) -> int:
        """Wait for the end; the exit code, or minus the signal's number. May be cancelled and repeated."""
        return await asyncio.shield(self._end)

    async def ended_within(self, seconds: float) -> bool:
        done, _ = await asyncio.wait({self._end}, timeout=seconds)
        return bool(done)

    def send_signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    def describe_end(self, code: int) -> str:
        """How it ended, in one line: its own error message if it left one."""
        if self._error and code > 0:
            return self._error
        if code >= 0:
            return f"ended with exit code {code}"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"was killed by {name}"

    async def _wait(self) -> int:
        code = await self._process.wait()
        if code > 0:
            # It may have said why. A child of its own could hold the pipe open for longer than it lived.
            await asyncio.wait({self._reader}, timeout=_LAST_LINES_S)
        return code

    async def _read(self) -> None:
        """Pass lines on; of one that is too long only the beginning, so that memory is bounded."""
        assert self._process.stdout is not None
        pending = b""
        while data := await self._process.stdout.read(_READ_BYTES):
            *lines, pending = (pending + data).split(b"\n")
            pending = pending[:_MAX_LINE_BYTES]
            for line in lines:
                self._show(line)
        self._show(pending)

    def _show(self, raw: bytes) -> None:
        line = raw[:_MAX_LINE_BYTES].decode(errors="replace").rstrip()
        if not line:
            return
        if line.startswith(_ERROR_PREFIX):
            self._error = line.removeprefix(_ERROR_PREFIX)
        prefix = f"rank {self._rank}: "
        with suppress(OSError):  # nobody reads it any more, or the disk is full: the rank goes on
            print(prefix + line.removeprefix(prefix), file=sys.stderr, flush=True)
