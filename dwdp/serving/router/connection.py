"""Connections: how many there may be, and how long and how large a request's headers may be.

uvicorn parses HTTP with httptools, which bounds neither. Here a connection has a few seconds to send the
headers of a request, and so many bytes for them; and there is a limit on connections. When it is
reached, the connection that has been idle for longest makes room, so that a guest who opens thousands
and says nothing keeps nobody else out.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from dwdp.serving.openai.errors import ApiError, invalid

_OVERFLOW = 64
"""Connections above the limit that are still told so; beyond these they are closed without a word."""


@dataclass
class ConnectionLimits:
    """What all connections of one router share.

    Attributes:
        refuse: the ASGI application that answers on a connection above the limit.
        on_refusal: called with the reason when a connection is closed by a limit.
        idle: connections that are not answering a request, longest idle first.
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


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, within ``limits``."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._is_in_headers = True
        self._received_bytes = 0
        self._header_bytes = 0
        self._refusal: ApiError | None = None
        self._is_counted = False

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
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_awaiting_headers()
        self._stop_write_timer()
        self._uncount()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._is_in_headers:
            self._received_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._is_in_headers:
            # A header that has not ended yet is inside the parser, where on_header does not see it.
            if self._received_bytes > self._limits.max_header_bytes:
                self._refuse(self._headers_too_long(), "headers too long")
            elif self._header_timer is None:
                self._await_headers()

    def on_message_begin(self) -> None:
        self._is_in_headers = True
        self._header_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count_header_bytes(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_header_bytes(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_in_headers = False
        self._received_bytes = 0
        self._stop_awaiting_headers()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and self.cycle.response_complete:
            self._is_in_headers = True
            self._limits.idle[self] = None

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(
                self._limits.write_timeout_s, self._give_up_writing
            )

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Called where the parser gives up: because of a limit of ours, or of malformed HTTP."""
        if self._refusal is not None:
            self._refuse(self._refusal, "headers too long")
        else:
            self._refuse(invalid(msg, code="invalid_http"), "malformed")

    def make_room(self) -> None:
        """Close this connection, which is idle, for another one."""
        self._limits.idle.pop(self, None)
        self._uncount()
        self.transport.close()

    def _await_headers(self) -> None:
        self._limits.idle[self] = None
        self._header_timer = self.loop.call_later(
            self._limits.header_timeout_s, self._give_up_headers
        )

    def _stop_awaiting_headers(self) -> None:
        self._limits.idle.pop(self, None)
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _uncount(self) -> None:
        if self._is_counted:
            self._is_counted = False
            self._limits.num_open -= 1

    def _give_up_headers(self) -> None:
        self._header_timer = None
        seconds = self._limits.header_timeout_s
        if self._received_bytes == 0:
            self.transport.close()
            return
        message = f"The request's headers did not arrive within {seconds:g} s"
        self._refuse(ApiError(408, message, code="header_timeout"), "headers too slow")

    def _give_up_writing(self) -> None:
        self._limits.on_refusal("client does not read")
        self.transport.abort()

    def _count_header_bytes(self, num_bytes: int) -> None:
        self._header_bytes += num_bytes
        if self._header_bytes > self._limits.max_header_bytes:
            self._refusal = self._headers_too_long()
            raise ValueError("headers too long")

    def _headers_too_long(self) -> ApiError:
        message = f"The request's headers are longer than {self._limits.max_header_bytes} bytes"
        return ApiError(431, message, code="headers_too_large")

    def _refuse(self, error: ApiError, reason: str) -> None:
        """Answer in place of the application, and close."""
        self._limits.on_refusal(reason)
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(_plain_response(error))
        self.transport.close()


def _plain_response(error: ApiError) -> bytes:
    body = json.dumps(error.body()).encode()
    head = (
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        "connection: close\r\n\r\n"
    )
    return head.encode() + body
