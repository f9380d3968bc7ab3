"""Connections: how many there may be, and how long and how large what precedes a request's body may be.

uvicorn parses HTTP with httptools, which bounds neither. Here a connection has a few seconds to send the
headers of a request, and so many bytes for them; and there is a limit on connections. When it is
reached, the connection that has been idle for longest makes room, so that a guest who opens thousands
and says nothing keeps nobody else out.

A request that comes while another one is answered is left unparsed, and the connection is read on, so that
the client's leaving is seen. An answer may come before its request has arrived in full (a wrong key): the
rest is thrown away for a few seconds, because a client that is still sending may not see the answer if
the connection is closed on it, and what it sends is no new request.
"""

from __future__ import annotations

import asyncio
import enum
import fcntl
import json
import struct
import termios
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from dwdp.serving.openai.errors import ApiError, invalid, unavailable
from dwdp.serving.router.outlet import EXTENSION, Outlet

_OVERFLOW = 64
"""Connections above the limit that are still told so; beyond these they are closed without a word."""

_PIECE_BYTES = 4096
"""What is parsed at a time: bounds the requests that are found before parsing can be held."""

_MAX_AHEAD_BYTES = 1 << 16
"""Once a client has sent more ahead of an answer, it is not read any more. (One read may bring 256 KiB.)"""

_QUEUED_BYTES = struct.Struct("i")
_RETRY_S = 5.0


@dataclass
class ConnectionLimits:
    """What all connections of one router share.

    Attributes:
        header_timeout_s: for the headers of a request, and for the rest of one that is answered already.
        write_timeout_s: for a client to read something of what it is sent, again and again.
        refuse: the ASGI application that answers on a connection above the limit.
        on_refusal: called with the reason when a connection is closed by a limit.
        idle: connections that are not answering a request, longest idle first; they give way to others.
        num_open: connections of any kind.
    """

    max_connections: int
    max_header_bytes: int
    header_timeout_s: float
    write_timeout_s: float
    refuse: Callable[..., Any]
    on_refusal: Callable[[str], object]
    idle: dict[GuardedProtocol, None] = field(default_factory=dict)
    num_open: int = 0


class _Phase(enum.Enum):
    """Where in a client's requests the parser is."""

    BETWEEN = enum.auto()
    HEADERS = enum.auto()
    BODY = enum.auto()


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, within ``limits``."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._served_app = self.app
        self._phase = _Phase.BETWEEN
        self._ahead = bytearray()  # arrived and not parsed
        self._unanswered: deque[RequestResponseCycle] = deque()
        self._arrival_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._unread_bytes = 0  # when that timer was set
        self._header_bytes = 0
        # Parsed since the last headers or piece of a body that was complete: the parser keeps it.
        self._pending_bytes = 0
        self._refusal: ApiError | None = None
        self._is_counted = False
        self._is_ending = False
        self._has_given_way = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        limits = self._limits
        limits.num_open += 1
        self._is_counted = True
        if limits.num_open > limits.max_connections:
            limits.on_refusal("too many connections")
            if limits.idle:
                next(iter(limits.idle)).make_room()
            elif limits.num_open > limits.max_connections + _OVERFLOW:
                transport.abort()
                return
            else:
                self.app = limits.refuse
        self._await_arrival()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_awaiting_arrival()
        self._stop_write_timer()
        self._uncount()
        self._ahead.clear()
        # uvicorn tells the last one alone.
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)
        self._unanswered.clear()
        self.cycle = None  # type: ignore[assignment]  # it holds this by its transport

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._ahead += data
        self._parse()
        if not self._unanswered and not self.transport.is_closing():
            self._await_arrival()

    def on_message_begin(self) -> None:
        self._phase = _Phase.HEADERS
        self._header_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count_header_bytes(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_header_bytes(len(name) + len(value) + 4)
        if self._phase is not _Phase.BODY:  # what follows a chunked body is dropped
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._pending_bytes = 0
        self._stop_awaiting_arrival()
        if self._limits.num_open <= self._limits.max_connections:
            self.app = self._served_app
        super().on_headers_complete()
        self._phase = _Phase.BODY
        self.cycle.transport = _AnswerTransport(self)
        self.scope["extensions"] = cast(Any, {EXTENSION: Outlet(self.cycle)})
        if self.expect_100_continue:
            # One that is answered without being asked for its body may send it, or the next request.
            self.cycle.keep_alive = False
        self._unanswered.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        self._pending_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._phase = _Phase.BETWEEN
        self._pending_bytes = 0
        super().on_message_complete()
        if self._is_ending:
            self._close()
        elif not self._unanswered:  # the rest of one that was answered early: now for the next one
            self._stop_awaiting_arrival()
            self._await_arrival()

    def on_response_complete(self) -> None:
        self._unanswered.popleft()
        super().on_response_complete()  # turns to the next request that has been parsed
        if self.transport.is_closing():
            return
        self._parse()
        if self._unanswered or self.transport.is_closing():
            return
        if self._phase is _Phase.BETWEEN:
            self._limits.idle[self] = None  # uvicorn's keep-alive time runs
        else:
            self._await_arrival()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reading()

    def resume_writing(self) -> None:
        if not self.transport.is_closing():
            self._stop_write_timer()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def send_400_response(self, msg: str) -> None:
        """Called where the parser gives up: because of a limit of ours, or of malformed HTTP."""
        if self._refusal is not None:
            self._refuse(self._refusal, "headers too long")
        else:
            self._refuse(invalid(msg, code="invalid_http"), "malformed")

    def make_room(self) -> None:
        """Close this connection, which is idle, for another one; told why if it has had no answer yet."""
        self._has_given_way = True
        self._uncount()
        has_begun = self.cycle is None or self._phase is _Phase.HEADERS or self._pending_bytes > 0
        if has_begun and not self.transport.is_closing():
            self._write_refusal(too_many_connections())
        self._close()
        self._limits.idle.pop(self, None)

    def end_after_answer(self) -> None:
        """The answer is the last on this connection: close it when its request has arrived in full."""
        if self._phase is not _Phase.BODY or self.transport.is_closing():
            self._close()
        elif not self._is_ending:
            self._is_ending = True
            self.transport.write_eof()
            self._await_arrival()

    def _parse(self) -> None:
        """Parse what has arrived, up to the end of a request that is being answered."""
        while self._ahead and not self._is_held:
            piece = bytes(self._ahead[:_PIECE_BYTES])
            del self._ahead[:_PIECE_BYTES]
            self._pending_bytes += len(piece)
            super().data_received(piece)
            if self.transport.is_closing():
                return
            # A line that has not ended is inside the parser, where on_header does not see it.
            if self._pending_bytes > self._limits.max_header_bytes:
                self._refuse(self._headers_too_long(), "headers too long")
                return
        if self._is_held:
            if len(self._ahead) > _MAX_AHEAD_BYTES:
                self.flow.pause_reading()
            else:  # uvicorn does not read while a request waits, and so sees no client leave
                self.flow.resume_reading()

    @property
    def _is_held(self) -> bool:
        """Whether a request has arrived in full and its answer is not complete."""
        if self.pipeline:
            return True
        return bool(self._unanswered) and self._phase is not _Phase.BODY

    def _await_arrival(self) -> None:
        if self.app is not self._limits.refuse:  # its going makes no room for one that is served
            self._limits.idle[self] = None
        if self._arrival_timer is None:
            self._arrival_timer = self.loop.call_later(
                self._limits.header_timeout_s, self._give_up_arrival
            )

    def _stop_awaiting_arrival(self) -> None:
        self._limits.idle.pop(self, None)
        if self._arrival_timer is not None:
            self._arrival_timer.cancel()
            self._arrival_timer = None

    def _await_reading(self) -> None:
        if self._write_timer is None:
            self._unread_bytes = self._count_unread()
            self._write_timer = self.loop.call_later(
                self._limits.write_timeout_s, self._give_up_writing
            )

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _uncount(self) -> None:
        if self._is_counted:
            self._is_counted = False
            self._limits.num_open -= 1

    def _give_up_arrival(self) -> None:
        self._arrival_timer = None
        is_silent = self._phase is _Phase.BETWEEN and self._pending_bytes == 0
        if is_silent or self._phase is _Phase.BODY:
            self._close()
            return
        seconds = self._limits.header_timeout_s
        message = f"The request's headers did not arrive within {seconds:g} s"
        self._refuse(ApiError(408, message, code="header_timeout"), "headers too slow")

    def _give_up_writing(self) -> None:
        self._write_timer = None
        if self._count_unread() < self._unread_bytes and not self._has_given_way:
            self._await_reading()
            return
        self._limits.on_refusal("client does not read")
        self.transport.abort()

    def _count_unread(self) -> int:
        """Bytes that are written and not at the client, those that wait in the kernel included.

        The kernel takes more only when much of what it holds is gone: a slow client's reading would not
        be seen in the transport's buffer alone.
        """
        queued = fcntl.ioctl(
            self.transport.get_extra_info("socket").fileno(),
            termios.TIOCOUTQ,
            bytes(_QUEUED_BYTES.size),
        )
        return self.transport.get_write_buffer_size() + int(_QUEUED_BYTES.unpack(queued)[0])

    def _count_header_bytes(self, num_bytes: int) -> None:
        self._header_bytes += num_bytes
        if self._header_bytes > self._limits.max_header_bytes:
            self._refusal = self._headers_too_long()
            raise ValueError("headers too long")

    def _headers_too_long(self) -> ApiError:
        message = f"The request's headers are longer than {self._limits.max_header_bytes} bytes"
        return ApiError(431, message, code="headers_too_large")

    def _refuse(self, error: ApiError, reason: str) -> None:
        """Answer in place of the application if the request has no answer yet, and close."""
        self._limits.on_refusal(reason)
        self._write_refusal(error)
        self._close()

    def _write_refusal(self, error: ApiError) -> None:
        if self._phase is _Phase.BODY:
            may_answer = len(self._unanswered) == 1 and not self._unanswered[0].response_started
        else:
            may_answer = not self._unanswered
        if may_answer:
            self.transport.write(_plain_response(error))

    def _close(self) -> None:
        """End the connection when the client has read what is written, for which it has a while."""
        self.transport.close()
        if self.transport.get_write_buffer_size():
            if self._is_counted:
                self._limits.idle[self] = None
            self._await_reading()


class _AnswerTransport(asyncio.Transport):
    """What an answer is written to. uvicorn closes it after the last one, be the request there or not.

    The head waits for the first piece of the body, if that comes in the same turn of the loop: the client
    is woken once, by one system call.
    """

    def __init__(self, protocol: GuardedProtocol) -> None:
        super().__init__()
        self._protocol = protocol
        self._transport = protocol.transport
        self._head: bytes | None = None
        self._has_begun = False

    def write(self, data: bytes) -> None:  # type: ignore[override]
        if self._transport.is_closing():  # uvloop's would raise
            return
        if self._has_begun:
            self._transport.write(data if self._head is None else self._take_head() + data)
        else:
            self._has_begun = True
            self._head = data
            self._protocol.loop.call_soon(self._flush)

    def close(self) -> None:
        self._flush()
        self._protocol.end_after_answer()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def _flush(self) -> None:
        if (head := self._take_head()) and not self._transport.is_closing():
            self._transport.write(head)

    def _take_head(self) -> bytes:
        head, self._head = self._head, None
        return head or b""


def too_many_connections() -> ApiError:
    return unavailable("Too many connections are open", "too_many_connections", _RETRY_S)


def _plain_response(error: ApiError) -> bytes:
    body = json.dumps(error.body()).encode()
    more = "".join(f"{name}: {value}\r\n" for name, value in error.headers().items())
    head = (
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        f"connection: close\r\n{more}\r\n"
    )
    return head.encode() + body
