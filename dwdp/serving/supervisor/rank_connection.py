"""One connection to a rank, and the responses that come on it.

HTTP/1.1 with httptools' parser, and of it only what talking to ranks needs: one request at a time. Every
event of every stream passes here: it costs one parse and one write.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import Any, cast

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
        is_complete: the rank has said everything; what of it was not read yet can be.
        connection: what it comes on; None before, and once there is no more to come.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.is_complete = False
        self.failure: Exception | None = None
        self.connection: RankConnection | None = None
        self.num_held_bytes = 0
        self._pieces: list[bytes] = []
        self._write: Callable[[bytes], bool] | None = None
        self._wake: asyncio.Future[None] | None = None

    @property
    def content_type(self) -> bytes:
        """Without its parameters."""
        return self.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()

    async def begin(self) -> None:
        """Wait for the status and the headers.

        Raises:
            RankUnreachable: the rank was not given the request.
            ConnectionError: the connection broke, or :meth:`close` was called.
        """
        while not self.status:
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
        """Want no more: a rank that is not done sees the connection closed, and stops. Idempotent.

        If it is done, what has come can still be read.
        """
        if self.is_complete:
            return
        self._pieces.clear()
        self.fail(ConnectionAbortedError(errno.ECONNABORTED, "the request was given up"))
        if self.connection is not None:
            self.connection.abort()
            self.connection = None

    def add(self, piece: bytes) -> None:
        """A piece of the body has come."""
        self._pieces.append(piece)
        self.num_held_bytes += len(piece)

    def fail(self, error: Exception) -> None:
        """There will be no more. What has come can be read first. Without effect at the end."""
        if not self.is_complete and self.failure is None:
            self.failure = error
        self._wake_up()

    def note_arrival(self) -> None:
        """Something has come: give it to who waits."""
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


class RankConnection(asyncio.Protocol):
    """A connection that takes one request after another; the protocol of its parser, too.

    Args:
        on_made: called when it is open.
        on_idle: called when a response is complete and the next request may be sent.
        on_lost: called when it is closed.
    """

    def __init__(
        self,
        on_made: Callable[[RankConnection], object],
        on_idle: Callable[[RankConnection], object],
        on_lost: Callable[[RankConnection], object],
    ) -> None:
        self._on_made = on_made
        self._on_idle = on_idle
        self._on_lost = on_lost
        self._transport: asyncio.Transport
        self._parser: Any = httptools.HttpResponseParser(self)
        self._response: RankResponse | None = None
        self._is_interim = False

    @property
    def is_open(self) -> bool:
        return not self._transport.is_closing()

    def send(self, head: bytes, body: bytes, response: RankResponse) -> None:
        """Send a request, and have ``response`` filled."""
        self._response = response
        response.connection = self
        self._transport.writelines((head, body))

    def read_on(self) -> None:
        """Somebody has taken what a response held."""
        if self._response is not None:
            self._transport.resume_reading()

    def abort(self) -> None:
        """Close the connection now, whatever is on its way. Idempotent."""
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass
        self._on_made(self)

    def data_received(self, data: bytes) -> None:
        response = self._response
        if response is None:  # nothing was asked
            self.abort()
            return
        trouble = None
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as caught:
            trouble = caught
        if response.is_complete:
            response.note_arrival()
            self._finish(response, has_more=trouble is not None)
        elif trouble is not None:
            error = ConnectionError(errno.EPROTO, f"no response of HTTP/1.1: {trouble}")
            self._end(response, error)
        else:
            response.note_arrival()
            if response.num_held_bytes > _MAX_HELD_BYTES:
                self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        response = self._response
        if response is not None and exc is None and _ends_with_connection(response):
            response.is_complete = True
            response.note_arrival()
        elif response is not None:
            self._end(
                response, exc or ConnectionResetError(errno.ECONNRESET, "the connection was closed")
            )
        self._response = None
        self._parser = None  # it knows this as its protocol
        self._on_lost(self)

    # What the parser calls.

    def on_message_begin(self) -> None:
        if self._response is None or self._response.is_complete:
            raise ValueError("there is more than was asked for")

    def on_header(self, name: bytes, value: bytes) -> None:
        response = self._response
        if response is not None and not response.status:  # later ones follow the body
            response.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        assert self._response is not None
        status = self._parser.get_status_code()
        self._is_interim = 100 <= status < 200
        if self._is_interim:  # the answer is the one after
            self._response.headers.clear()
        else:
            self._response.status = status

    def on_body(self, body: bytes) -> None:
        assert self._response is not None
        self._response.add(body)

    def on_message_complete(self) -> None:
        if self._response is not None and not self._is_interim:
            self._response.is_complete = True

    def _finish(self, response: RankResponse, *, has_more: bool) -> None:
        self._response = None
        response.connection = None
        # What the parser says of keeping the connection it says before the end alone.
        if has_more or b"close" in response.headers.get(b"connection", b"").lower():
            self.abort()
        else:
            self._transport.resume_reading()
            self._on_idle(self)

    def _end(self, response: RankResponse, error: Exception) -> None:
        self._response = None
        response.connection = None
        response.fail(error)
        self.abort()


def _ends_with_connection(response: RankResponse) -> bool:
    """Whether the body of a response that is not complete has no other end (RFC 9112, section 6.3)."""
    lengths = (b"content-length", b"transfer-encoding")
    return response.status > 0 and not any(name in response.headers for name in lengths)
