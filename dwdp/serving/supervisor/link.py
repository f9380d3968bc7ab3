"""HTTP to one rank process, over an abstract unix socket or TCP."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from dwdp.process_identity import is_own_user
from dwdp.serving.supervisor.interface import TIMELINE_QUERY, RankEndpoint
from dwdp.serving.supervisor.rank_connection import RankConnection, RankResponse, RankUnreachable

_MAX_STATS_BYTES = 4 << 20
_CONNECT_S = 5.0
# Shorter than the 5 s after which uvicorn closes an idle connection: a request must not meet the closing.
_KEEP_ALIVE_S = 3.0

LINK_ERRORS = (OSError, asyncio.TimeoutError)
"""What talking to a rank that is gone, or going, raises."""


def listens_no_more(error: BaseException) -> bool:
    """Whether one of :data:`LINK_ERRORS` says that no process of this user's listens at an endpoint."""
    return isinstance(error, OSError) and error.errno in (errno.ECONNREFUSED, errno.EPERM)


class RankLink:
    """Connections to one rank process; made and used inside one event loop.

    Raises:
        ValueError: the endpoint is not one of plain HTTP.
    """

    def __init__(self, endpoint: RankEndpoint) -> None:
        self.endpoint = endpoint
        address = urlsplit(endpoint.base_url)
        if address.scheme != "http" or not address.hostname or address.path.strip("/"):
            raise ValueError(f"a rank's address is http://HOST:PORT, not {endpoint.base_url!r}")
        self._host, self._port = address.hostname, address.port or 80
        self._head = _headers({"Host": address.netloc, **endpoint.headers})
        self._connections: set[RankConnection] = set()
        self._idle: list[tuple[float, RankConnection]] = []  # since when; the latest is last
        self._connecting: set[asyncio.Task[None]] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._is_closed = False

    def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> RankResponse:
        """The response, to be waited for. Closing it before its end makes the rank stop the work."""
        return self._ask("POST", path, {**headers, "Content-Length": str(len(body))}, body)

    async def is_healthy(self, path: str, timeout_s: float) -> bool:
        """Whether ``path`` answers 200.

        Raises:
            LINK_ERRORS: there is no answer within ``timeout_s``.
        """
        status, _ = await self._get(path, timeout_s)
        return status == 200

    async def stats(self, timeout_s: float, *, with_timeline: bool) -> dict[str, Any]:
        """What the rank says about its work; {} where it says nothing that can be read.

        Args:
            with_timeline: what it did in the last seconds as well.

        Raises:
            LINK_ERRORS: there is no answer within ``timeout_s``.
        """
        if self.endpoint.stats_path is None:
            return {}
        query = f"?{TIMELINE_QUERY}" if with_timeline else ""
        status, body = await self._get(self.endpoint.stats_path + query, timeout_s)
        if status != 200:
            return {}
        try:
            stats = json.loads(body)
        except ValueError:
            return {}
        return stats if isinstance(stats, dict) else {}

    async def close(self) -> None:
        """Close all connections; what waits on one fails."""
        self._is_closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for task in self._connecting:
            task.cancel()
        for connection in list(self._connections):
            connection.abort()
        await asyncio.gather(*self._connecting, return_exceptions=True)

    async def _get(self, path: str, timeout_s: float) -> tuple[int, bytes]:
        """Status and body; of one that is too long nothing."""
        response = self._ask("GET", path, {}, b"")
        try:
            body = await asyncio.wait_for(_read(response), timeout_s)
            return response.status, body
        finally:
            response.close()

    def _ask(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> RankResponse:
        line = f"{method} {path} HTTP/1.1\r\n".encode()
        head = b"".join((line, self._head, _headers(headers), b"\r\n"))
        response = RankResponse()
        if self._is_closed:
            response.fail(RankUnreachable(errno.ECONNABORTED, "the link is closed"))
        elif (connection := self._take_idle()) is not None:
            connection.send(head, body, response)
        else:
            send = partial(_send, head, body, response, self._keep)
            task = asyncio.ensure_future(self._connect_in_time(send))
            self._connecting.add(task)
            task.add_done_callback(partial(self._note_connected, response))
        return response

    def _take_idle(self) -> RankConnection | None:
        while self._idle:
            since_s, connection = self._idle.pop()
            if connection.is_open:
                if asyncio.get_running_loop().time() - since_s < _KEEP_ALIVE_S:
                    return connection
                connection.abort()
        return None

    async def _connect_in_time(self, on_made: Callable[[RankConnection], object]) -> None:
        await asyncio.wait_for(self._connect(on_made), _CONNECT_S)

    async def _connect(self, on_made: Callable[[RankConnection], object]) -> None:
        """Raises OSError, with EPERM when another user's process listens at an abstract name."""
        loop = asyncio.get_running_loop()

        def new_connection() -> RankConnection:
            return RankConnection(note_made, self._keep, self._connections.discard)

        def note_made(connection: RankConnection) -> None:
            self._connections.add(connection)
            on_made(connection)

        if self.endpoint.socket is None:
            await loop.create_connection(new_connection, self._host, self._port)
            return
        plug = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            plug.setblocking(False)
            await loop.sock_connect(plug, f"\0{self.endpoint.socket}")
            if not is_own_user(plug):  # an abstract name that is free is anybody's to take
                raise PermissionError(errno.EPERM, "another user's process listens there")
            await loop.create_unix_connection(new_connection, sock=plug)
        except BaseException:
            plug.close()
            raise

    def _note_connected(self, response: RankResponse, task: asyncio.Task[None]) -> None:
        self._connecting.discard(task)
        if task.cancelled():
            response.fail(RankUnreachable(errno.ECONNABORTED, "the link is closed"))
        elif (error := task.exception()) is not None:
            number = getattr(error, "errno", None) or errno.ETIMEDOUT
            response.fail(RankUnreachable(number, str(error) or "it takes no connection"))

    def _keep(self, connection: RankConnection) -> None:
        """Keep an idle connection for the next request, for a while."""
        self._idle.append((asyncio.get_running_loop().time(), connection))
        if self._sweeper is None:
            self._sweep_later()

    def _sweep_later(self) -> None:
        self._sweeper = asyncio.get_running_loop().call_later(_KEEP_ALIVE_S, self._sweep)

    def _sweep(self) -> None:
        """Close those that have been idle for too long."""
        self._sweeper = None
        oldest_s = asyncio.get_running_loop().time() - _KEEP_ALIVE_S
        for since_s, connection in self._idle:
            if since_s <= oldest_s:
                connection.abort()
        self._idle = [one for one in self._idle if one[0] > oldest_s and one[1].is_open]
        if self._idle:
            self._sweep_later()


def _send(
    head: bytes,
    body: bytes,
    response: RankResponse,
    keep: Callable[[RankConnection], object],
    connection: RankConnection,
) -> None:
    """Send a request on a new connection, if it is still wanted."""
    if response.failure is None:
        connection.send(head, body, response)
    else:
        keep(connection)


async def _read(response: RankResponse) -> bytes:
    """The whole body, or b"" if it is too long."""
    await response.begin()
    body = bytearray()
    while data := await response.read_some():
        body += data
        if len(body) > _MAX_STATS_BYTES:
            return b""
    return bytes(body)


def _headers(headers: Mapping[str, str]) -> bytes:
    lines = (f"{name}: {value}\r\n" for name, value in headers.items())
    return "".join(lines).encode("latin-1")
