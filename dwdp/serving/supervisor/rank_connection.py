"""One connection to a rank, and the responses that come on it.

HTTP/1.1 with httptools' parser, and of it only what talking to ranks needs: one request at a time, bodies
with a length or in chunks. Every event of every stream passes here: it costs one parse and one wake-up.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import cast

import httptools

_MAX_HELD_BYTES = 1 << 16
"""Once a response has so many that nobody has taken, no more are read."""


class RankUnreachable(ConnectionError):
    """A request could not be given to the rank: there was no connection to be had."""


class RankResponse:
    """A response on its way. Has to be read to its end or closed.

    Attributes:
        status: of HTTP; 0 until :meth:`begin` returns.
        headers: names in lower case.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.is_complete = False
        self.failure: Exception | None = None
        self.connection: RankConnection | None = None
        self.num_held_bytes = 0
        self._has_begun = False
        self._pieces: list[bytes] = []
        self._write: Callable[[bytes], bool] | None = None
        self._wake: asyncio.Future[None] | None = None

    @property
    def content_type(self) -> bytes:
        """Without its parameters."""
        return self.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()

    @property
    def is_last(self) -> bool:
        """Whether the rank closes the connection after it. (The parser knows until the end alone.)"""
        return b"close" in self.headers.get(b"connection", b"").lower()

    async def begin(self) -> None:
        """Wait for the status and the headers.

        Raises:
            RankUnreachable: the rank was not given the request.
            ConnectionError: the connection broke, or :meth:`close` was called.
        """
        while not self._has_begun:
            await self._wait()

    async def read_some(self) -> bytes:
        """What has come of the body, waited for if need be; b"" at the end.

        Raises:
            ConnectionError: the connection broke before the end, or :meth:`close` was called.
        """
        while not self._pieces:
            if self.is_complete:
                return b""
            await self._wait()
        return self._take()

    async def pipe(
        self, write: Callable[[bytes], bool], drain: Callable[[], Awaitable[None]]
    ) -> None:
        """Have ``write`` called with what comes, at once, until the end.

        Args:
            write: False from it says that ``drain`` has to be waited for first.

        Raises:
            ConnectionError: as :meth:`read_some`.
        """
        while True:
            await drain()
            if self._pieces and not write(self._take()):
                continue
            if self.is_complete:
                return
            self._write = write
            try:
                await self._wait()
            finally:
                self._write = None

    def close(self) -> None:
        """Want no more: a rank that is not done sees the connection closed, and stops. Idempotent."""
        self._pieces.clear()
        self.fail(ConnectionAbortedError(errno.ECONNABORTED, "the request was given up"))
        if self.connection is not None:
            self.connection.abort()
            self.connection = None

    def fail(self, error: Exception) -> None:
        """There will be no more. What has come can be read first. Without effect at the end."""
        if not self.is_complete and self.failure is None:
            self.failure = error
            self._wake_up()

    def note_arrival(self) -> None:
        """Some more has been parsed: give it to who waits."""
        if self._write is not None and self._pieces and not self._write(self._take()):
            self._write = None
        if self._write is None or self.is_complete:
            self._wake_up()

    def _take(self) -> bytes:
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        if self.num_held_bytes > _MAX_HELD_BYTES and self.connection is not None:
            self.connection.read_on()
        self.num_held_bytes = 0
        return data

    def _wake_up(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def _wait(self) -> None:
        if self.failure is not None:
            raise self.failure.with_traceback(None)
        self._wake = asyncio.get_running_loop().create_future()
        try:
            await self._wake
        finally:
            self._wake = None

    # What the parser calls.

    def on_message_begin(self) -> None:
        if self.is_complete:
            raise ValueError("there is more than was asked for")

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._has_begun = True

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)
        self.num_held_bytes += len(body)

    def on_message_complete(self) -> None:
        self.is_complete = True


class RankConnection(asyncio.Protocol):
    """A connection that takes one request after another.

    Args:
        on_idle: called when a response is complete and the next request may be sent.
        on_lost: called when the connection is closed.
    """

    def __init__(
        self,
        on_idle: Callable[[RankConnection], object],
        on_lost: Callable[[RankConnection], object],
    ) -> None:
        self._on_idle = on_idle
        self._on_lost = on_lost
        self._transport: asyncio.Transport
        self._response: RankResponse | None = None
        self._parser: httptools.HttpResponseParser

    @property
    def is_open(self) -> bool:
        return not self._transport.is_closing()

    def send(self, request: bytes, response: RankResponse) -> None:
        """Send ``request``, and have ``response`` filled."""
        self._parser = httptools.HttpResponseParser(response)
        self._response = response
        response.connection = self
        self._transport.write(request)

    def read_on(self) -> None:
        """Somebody has taken what a response held."""
        if self._response is not None:
            self._transport.resume_reading()

    def abort(self) -> None:
        """Close the connection now, whatever is on its way. Idempotent."""
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        response = self._response
        if response is None:  # nothing was asked
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._end(response, ConnectionError(errno.EPROTO, f"no response of HTTP/1.1: {error}"))
            return
        response.status = self._parser.get_status_code()
        response.note_arrival()
        if response.is_complete:
            self._finish(response)
        elif response.num_held_bytes > _MAX_HELD_BYTES:
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._response is not None:
            self._end(
                self._response,
                exc or ConnectionResetError(errno.ECONNRESET, "the connection was closed"),
            )
        self._on_lost(self)

    def _finish(self, response: RankResponse) -> None:
        self._response = None
        response.connection = None
        if not response.is_last:
            self._transport.resume_reading()
            self._on_idle(self)
        else:
            self._transport.close()

    def _end(self, response: RankResponse, error: Exception) -> None:
        self._response = None
        response.connection = None
        response.fail(error)
        self.abort()
