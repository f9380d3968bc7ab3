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
import uvloop

from dwdp.fabric.descriptor_limit import raise_descriptor_limit
from dwdp.serving.openai.errors import ApiError, unavailable
from dwdp.serving.router.app import Router, send_error
from dwdp.serving.router.body import Receive
from dwdp.serving.router.connection import (
    ConnectionLimits,
    GuardedProtocol,
    too_many_connections,
)
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
_CLOSING_S = 1.0
_RANK_GRACE_S = 10.0
_RETRY_S = 5.0


class Service:
    """One router over the ranks of one launcher. Made and run inside one event loop of the main thread.

    Args:
        model: what requests call the model.
        keys: API keys; none: everybody who can connect may ask.
        relays: whether ranks check requests themselves, and may know more options than dwdp's own.
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
        relays: bool = False,
        watch: Watch | None = None,
        announce: Callable[[str, int], object] = lambda url, num_ranks: None,
    ) -> None:
        self._settings = settings
        self._announce = announce
        self._first_signal: asyncio.Future[signal.Signals] = (
            asyncio.get_running_loop().create_future()
        )
        self._hurry = asyncio.Event()  # nothing is waited for any more
        self._is_ending = False
        self._table = RankTable.of_size(launcher.num_ranks)
        self._supervisor = Supervisor(launcher, self._table, watch=watch)
        self._router = Router(self._table, model, settings, ApiKeys(keys), relays=relays)
        self._listener = listen(host, port)
        if not keys and not is_loopback(self._listener):
            log.warning("%s can be reached from other machines, without an API key", host)
        self._server = _Server(self._uvicorn_config())

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT; the exit code of the command.

        Raises:
            BadInput, SetupFailed, GroupError: the group could not be set up, or no rank is left of it.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._note_signal, number)
        url = url_of(self._listener)
        server = asyncio.ensure_future(self._server.serve(sockets=[self._listener]))
        grouped = asyncio.ensure_future(self._supervise(url))
        reason = unavailable("No rank is left: the server is ending", "no_rank", _RETRY_S)
        first: set[asyncio.Future[Any]] = {server, self._first_signal, grouped}
        try:
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if not self._first_signal.done():
                await (grouped if grouped.done() else server)
                raise RuntimeError("the HTTP server ended by itself")
            reason = unavailable("The server is ending", "draining", _RETRY_S)
            await self._drain(server, reason)
        finally:
            self._is_ending = True
            await self._end_server(server, reason)
            await self._stop_ranks()
            grouped.cancel()
            await asyncio.gather(grouped, return_exceptions=True)
        was_interrupted = self._first_signal.result() == signal.SIGINT
        return EXIT_INTERRUPTED if was_interrupted else EXIT_DONE

    def _note_signal(self, number: signal.Signals) -> None:
        """The first signal ends the command; any other one, or one while it ends, cuts the waiting short."""
        if self._is_ending:
            self._hurry.set()
        else:
            self._is_ending = True
            self._first_signal.set_result(number)

    async def _supervise(self, url: str) -> None:
        await self._supervisor.start()
        if not self._is_ending:
            self._router.balancer.open()
            with contextlib.suppress(OSError):  # nobody reads it, which is no reason to end
                self._announce(url, len(self._table.ranks))
        await self._supervisor.wait()

    async def _drain(self, server: asyncio.Task[None], reason: ApiError) -> None:
        """Accept nothing more and let running requests finish; a second signal cuts that short."""
        log.info("draining: %.0f s for what is running", self._settings.grace_s)
        self._router.drain(reason)
        self._server.should_exit = True
        await self._unless_hurried(server, self._settings.grace_s)
        if not server.done():
            log.warning("requests that are still running are ended")

    async def _end_server(self, server: asyncio.Task[None], reason: ApiError) -> None:
        """End what is left, and give clients a moment to be told so."""
        self._router.end(reason)
        self._server.should_exit = True
        await asyncio.wait({server}, timeout=_LAST_WORDS_S)
        self._server.force_exit = True
        await asyncio.wait({server}, timeout=_CLOSING_S)
        server.cancel()
        await asyncio.gather(server, return_exceptions=True)
        self._listener.close()

    async def _stop_ranks(self) -> None:
        """Let the ranks finish, which have nothing to do any more; a second signal cuts that short."""
        log.info("ending the ranks")
        stopping = asyncio.ensure_future(self._supervisor.stop(_RANK_GRACE_S))
        await self._unless_hurried(stopping, None)
        if stopping.done():
            stopping.result()
            return
        stopping.cancel()
        await asyncio.gather(stopping, return_exceptions=True)
        await self._supervisor.stop(0.0)

    async def _unless_hurried(self, work: asyncio.Task[None], timeout_s: float | None) -> None:
        """Wait for ``work``, at most so long, and not once there is a second signal."""
        hurry = asyncio.ensure_future(self._hurry.wait())
        try:
            await asyncio.wait(
                {work, hurry}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            hurry.cancel()

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


def run_service(make: Callable[[], Service]) -> int:
    """Make a service and run it, inside an event loop of its own; see :meth:`Service.run`.

    uvloop's takes a fifth less of the processor for a token than asyncio's.
    """

    async def run() -> int:
        return await make().run()

    return uvloop.run(run())


class _Server(uvicorn.Server):
    """uvicorn's server, with the signals left to the service."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _refuse_connection(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Answers on a connection above the limit."""
    await send_error(too_many_connections(), send)
