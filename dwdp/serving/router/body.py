"""Reads request bodies: not too long, not too slowly, and not too many at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from dwdp.serving.openai.errors import ApiError, overloaded, too_large

Receive = Callable[[], Awaitable[dict[str, Any]]]
"""ASGI's receive."""

_DISCARD_S = 5.0
_RETRY_S = 1.0


class ClientGone(Exception):
    """The client closed the connection."""


class BodyReader:
    """Holds bodies within limits.

    Args:
        max_body_bytes: of one request.
        max_buffered_bytes: of all requests together, until they are answered.
        timeout_s: from the end of the headers to the end of the body.
    """

    def __init__(self, max_body_bytes: int, max_buffered_bytes: int, timeout_s: float) -> None:
        self._max_body_bytes = max_body_bytes
        self._max_buffered_bytes = max_buffered_bytes
        self._timeout_s = timeout_s
        self.buffered_bytes = 0

    @asynccontextmanager
    async def read(self, headers: dict[bytes, bytes], receive: Receive) -> AsyncIterator[bytes]:
        """The body; its room is given back at the end of the block.

        Raises:
            ApiError: 413 too long, 408 too slow, 429 no room for another one.
            ClientGone: the client closed the connection.
        """
        held = 0
        try:
            length = headers.get(b"content-length", b"")
            if length.isdigit() and int(length) > self._max_body_bytes:
                await self._refuse_length(receive)
            body = bytearray()
            deadline_s = asyncio.get_running_loop().time() + self._timeout_s
            is_complete = False
            while not is_complete:
                data, is_complete = await self._next(receive, deadline_s)
                body += data
                held += len(data)
                self.buffered_bytes += len(data)
                if len(body) > self._max_body_bytes:
                    await self._refuse_length(receive)
                if self.buffered_bytes > self._max_buffered_bytes:
                    raise overloaded("The bodies of running requests take all room", _RETRY_S)
            yield bytes(body)
        finally:
            self.buffered_bytes -= held

    async def _next(self, receive: Receive, deadline_s: float) -> tuple[bytes, bool]:
        left_s = deadline_s - asyncio.get_running_loop().time()
        try:
            message = await asyncio.wait_for(receive(), max(0.0, left_s))
        except (asyncio.TimeoutError, TimeoutError):
            raise ApiError(
                408,
                f"The request's body did not arrive within {self._timeout_s:g} s",
                code="body_timeout",
            ) from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        return message.get("body", b""), not message.get("more_body", False)

    async def _refuse_length(self, receive: Receive) -> None:
        """Read on for a moment, because a client that is still sending does not see an answer."""
        deadline_s = asyncio.get_running_loop().time() + _DISCARD_S
        try:
            while not (await self._next(receive, deadline_s))[1]:
                pass
        except ApiError:
            pass
        raise too_large(self._max_body_bytes)
