"""Serves an application on an abstract unix socket until it is told to end, and then ends in good order."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from dwdp.process_identity import is_own_user
from dwdp.serving.openai.errors import unavailable
from dwdp.serving.rank_server.engine import RETRY_AFTER_S, Engine

logger = logging.getLogger(__name__)

_BACKLOG = 1024
_KEEP_ALIVE_S = 75
_FAREWELL_S = 2.0
"""Seconds to send the last words to clients that read them slowly."""


class GuardedSocket(socket.socket):
    """A listening unix socket that takes connections of this user's processes only."""

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection.

        Raises:
            BlockingIOError: there is none, or it was somebody else's, who was turned away. Event loops
                take it for "none right now" and come back after everything else has had its turn: so
                nobody can keep one busy by connecting again and again.
        """
        connection, address = super().accept()
        if is_own_user(connection):
            return connection, address
        connection.close()
        raise BlockingIOError(errno.EAGAIN, "a connection of another user was turned away")


def listen(name: str) -> GuardedSocket:
    """A socket listening at the abstract name ``name``, which vanishes with the process.

    Raises:
        OSError: the name is taken.
    """
    listener = GuardedSocket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(f"\0{name}")
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen at @{name}: {error.strerror}") from error
    return listener


class RankServer:
    """Runs an application over ``engine`` until SIGTERM, or until the engine fails.

    Args:
        application: an ASGI application.
        grace_s: seconds that running requests get to finish.
    """

    def __init__(self, application: Any, engine: Engine, grace_s: float) -> None:
        self._engine = engine
        self._grace_s = grace_s
        self._server = _Server(
            uvicorn.Config(
                application,
                lifespan="off",
                access_log=False,
                log_config=None,
                log_level="warning",
                timeout_keep_alive=_KEEP_ALIVE_S,
                server_header=False,
                ws="none",
            )
        )
        self._end_task: asyncio.Task[None] | None = None

    async def run(self, listener: socket.socket) -> None:
        """Serve until it ends. Closes ``listener``, and leaves the engine to be stopped."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.end)
        try:
            self._engine.start(loop)
            await self._server.serve(sockets=[listener])
        finally:
            loop.remove_signal_handler(signal.SIGTERM)
            listener.close()
            if self._end_task is not None:
                self._end_task.cancel()

    def end(self) -> None:
        """Stop accepting, let running requests finish within the grace time, then give up. Idempotent."""
        if self._end_task is None:
            self._engine.is_draining = True
            self._server.should_exit = True
            self._end_task = asyncio.get_running_loop().create_task(self._give_up_later())

    async def _give_up_later(self) -> None:
        await asyncio.sleep(self._grace_s)
        if self._engine.num_unfinished:
            logger.warning(
                "%d answers were not finished within %g s",
                self._engine.num_unfinished,
                self._grace_s,
            )
        self._engine.give_up(
            unavailable("The server ended before this was finished", "draining", RETRY_AFTER_S)
        )
        await asyncio.sleep(_FAREWELL_S)
        self._server.force_exit = True


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: RankServer has its own idea of them."""
        yield
