"""Reads request bodies: not too long, not too slowly, and not too many at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from typing import Any

from dwdp.serving.openai.errors import ApiError, too_large
from dwdp.serving.router.room import ByteRoom, RoomShare

Receive = Callable[[], Awaitable[dict[str, Any]]]
"""ASGI's receive."""


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
        self._room = ByteRoom(max_buffered_bytes, "The bodies of running requests take all room")
        self._timeout_s = timeout_s
        self._ended: asyncio.Future[ApiError] = asyncio.get_running_loop().create_future()

    def end(self, reason: ApiError) -> None:
        """Wait for no body any more. The first reason stays."""
        if not self._ended.done():
            self._ended.set_result(reason)

    @asynccontextmanager
    async def read(self, headers: dict[bytes, bytes], receive: Receive) -> AsyncIterator[bytes]:
        """The body; its room is given back at the end of the block.

        Raises:
            ApiError: 413 too long, 408 too slow, 429 no room for another one, or the reason given to
                :meth:`end`.
            ClientGone: the client closed the connection.
        """
        share = RoomShare(self._room)
        body = bytearray()
        with closing(share):
            length = headers.get(b"content-length", b"")
            if length.isdigit() and int(length) > self._max_body_bytes:
                raise too_large(self._max_body_bytes)
            deadline_s = asyncio.get_running_loop().time() + self._timeout_s
            is_complete = False
            while not is_complete:
                data, is_complete = await self._next(receive, deadline_s)
                body += data
                if len(body) > self._max_body_bytes:
                    raise too_large(self._max_body_bytes)
                share.take(len(data))
            whole = bytes(body)
            body.clear()  # one copy is enough
            yield whole

    async def _next(self, receive: Receive, deadline_s: float) -> tuple[bytes, bool]:
        receiving = asyncio.ensure_future(receive())
        either: set[asyncio.Future[Any]] = {receiving, self._ended}
        left_s = max(0.0, deadline_s - asyncio.get_running_loop().time())
        try:
            await asyncio.wait(either, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            receiving.cancel()
        if not receiving.done():
            raise self._late()
        message = receiving.result()
        if message["type"] == "http.disconnect":
            raise ClientGone
        return message.get("body", b""), not message.get("more_body", False)

    def _late(self) -> ApiError:
        """Why a body is not waited for any longer."""
        if self._ended.done():
            return self._ended.result().with_traceback(None)
        return ApiError(
            408,
            f"The request's body did not arrive within {self._timeout_s:g} s",
            code="body_timeout",
        )
