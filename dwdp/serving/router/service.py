"""The whole of ``dwdp serve``: ranks, router and signals, from start to end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import uvicorn

from dwdp.fabric.descriptor_limit import raise_descriptor_limit
from dwdp.serving.openai.errors import unavailable
from dwdp.serving.router.app import Router, send_error
from dwdp.serving.router.body import Receive
from dwdp.serving.router.connection import ConnectionLimits, GuardedProtocol
from dwdp.serving.router.forwarder import Send
from dwdp.serving.router.keys import ApiKeys
from dwdp.serving.router.listening import (
    BACKLOG,
    affordable_connections,
    is_loopback,
    listen,
    url_of,
)
from dwdp.serving.router.settings import RouterSettings
from dwdp.serving.supervisor.interface import RankLauncher
from dwdp.serving.supervisor.life import Watch
from dwdp.serving.supervisor.ranks import RankTable
from dwdp.serving.supervisor.supervisor import Supervisor

log = logging.getLogger(__name__)

EXIT_DONE = 0
EXIT_INTERRUPTED = 130

_LAST_WORDS_S = 2.0
_RANK_GRACE_S = 10.0
_RETRY_S = 5.0


class Service:
    """One router over the ranks of one launcher. Made and run inside one event loop of the main thread.

    Args:
        model: what requests call the model.
        keys: API keys; none: everybody who can connect may ask.
        announce: called with the base URL and the number of ranks when requests are taken.

    Raises:
        ValueError: the address cannot be used.
    """

    def __init__(
        self,
        launcher: RankLauncher,
        model: str,
        settings: RouterSettings,
        *,
        host: str,
        port: int,
        keys: Sequence[str] = (),
        watch: Watch | None = None,
        announce: Callable[[str, int], object] = lambda url, num_ranks: None,
    ) -> None:
        self._settings = settings
        self._announce = announce
        self._signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
        self._table = RankTable.of_size(launcher.num_ranks)
        self._supervisor = Supervisor(launcher, self._table, watch=watch)
        self._router = Router(self._table, model, settings, ApiKeys(keys))
        self._listener = listen(host, port)
        if not keys and not is_loopback(self._listener):
            log.warning("%s can be reached from other machines, without an API key", host)
        self._server = _Server(self._uvicorn_config())

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT; the exit code of the command.

        Raises:
            BadInput, SetupFailed, GroupError: the group could not be set up, or no rank is left of it.
        """
        url = url_of(self._listener)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signals.put_nowait, number)
        server = asyncio.ensure_future(self._server.serve(sockets=[self._listener]))
        signalled = asyncio.ensure_future(self._signals.get())
        grouped = asyncio.ensure_future(self._supervise(url))
        try:
            await asyncio.wait({server, signalled, grouped}, return_when=asyncio.FIRST_COMPLETED)
            if not signalled.done():
                (grouped if grouped.done() else server).result()
            await self._drain(server)
        finally:
            for task in (grouped, signalled):
                task.cancel()
            await self._supervisor.stop(_RANK_GRACE_S if self._signals.empty() else 0.0)
            await self._end_server(server)
        return EXIT_INTERRUPTED if signalled.result() == signal.SIGINT else EXIT_DONE

    async def _supervise(self, url: str) -> None:
        await self._supervisor.start()
        self._router.balancer.open()
        self._announce(url, len(self._table.ranks))
        await self._supervisor.wait()

    async def _drain(self, server: asyncio.Task[None]) -> None:
        """Accept nothing more and let running requests finish; a second signal cuts that short."""
        log.info("draining: %.0f s for what is running", self._settings.grace_s)
        reason = unavailable("The server is ending", "draining", _RETRY_S)
        self._router.balancer.close(reason)
        self._router.end_pages()
        self._server.should_exit = True
        again = asyncio.ensure_future(self._signals.get())
        await asyncio.wait(
            {server, again},
            timeout=self._settings.grace_s,
            return_when=asyncio.FIRST_COMPLETED,
        )
        again.cancel()
        if not server.done():
            log.warning("requests that are still running are ended")
            self._router.balancer.cut_all(reason)
            await asyncio.wait({server}, timeout=_LAST_WORDS_S)

    async def _end_server(self, server: asyncio.Task[None]) -> None:
        self._server.should_exit = self._server.force_exit = True
        await asyncio.wait({server}, timeout=_LAST_WORDS_S)
        server.cancel()
        await asyncio.gather(server, return_exceptions=True)
        self._listener.close()

    def _uvicorn_config(self) -> uvicorn.Config:
        settings = self._settings
        affordable = affordable_connections(raise_descriptor_limit())
        limits = ConnectionLimits(
            max_connections=min(settings.max_connections or affordable, affordable),
            max_header_bytes=settings.max_header_bytes,
            header_timeout_s=settings.header_timeout_s,
            write_timeout_s=settings.write_timeout_s,
            refuse=_refuse_connection,
            on_refusal=lambda reason: self._router.metrics.refused_connections.labels(reason).inc(),
        )
        return uvicorn.Config(
            cast(Any, self._router),
            http=cast(Any, partial(GuardedProtocol, limits=limits)),
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level=logging.ERROR,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=settings.keep_alive_s,
            backlog=BACKLOG,
        )


class _Server(uvicorn.Server):
    """uvicorn's server, with the signals left to the service."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _refuse_connection(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Answers on a connection above the limit."""
    await send_error(
        unavailable("Too many connections are open", "too_many_connections", _RETRY_S), send
    )
