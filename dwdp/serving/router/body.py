"""Reads request bodies: not too long, not too slowly, and not too many at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from dwdp.serving.openai.errors import ApiError, too_large
from dwdp.serving.router.interruption import Interruption
from dwdp.serving.router.room import ByteRoom, RoomShare

Receive = Callable[[], Awaitable[dict[str, Any]]]
"""ASGI's receive."""


class ClientGone(Exception):
    """The client closed the connection."""


class BodyReader:
    """Reads bodies within limits.

    Args:
        max_body_bytes: of one request.
        max_buffered_bytes: of all requests together, until they are answered.
        timeout_s: from the end of the headers to the end of the body.
    """

    def __init__(self, max_body_bytes: int, max_buffered_bytes: int, timeout_s: float) -> None:
        self._max_body_bytes = max_body_bytes
        self._room = ByteRoom(max_buffered_bytes, "The bodies of running requests take all room")
        self._timeout_s = timeout_s
        self._reading: set[Interruption] = set()
        self._end_reason: ApiError | None = None

    def new_share(self) -> RoomShare:
        """What a request's body will take of the room; to be closed when the request is answered."""
        return RoomShare(self._room)

    def end(self, reason: ApiError) -> None:
        """Wait for no body any more. The first reason stays."""
        if self._end_reason is None:
            self._end_reason = reason
        for reading in self._reading:
            reading.interrupt(self._end_reason)

    async def read(self, headers: dict[bytes, bytes], receive: Receive, share: RoomShare) -> bytes:
        """The body, counted in ``share``.

        Raises:
            ApiError: 413 too long, 408 too slow, 429 no room for another one, or the reason given to
                :meth:`end`.
            ClientGone: the client closed the connection.
        """
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._max_body_bytes:
            raise too_large(self._max_body_bytes)
        if self._end_reason is not None:
            raise self._end_reason.with_traceback(None)
        with Interruption() as reading:
            timer = asyncio.get_running_loop().call_later(self._timeout_s, self._give_up, reading)
            self._reading.add(reading)
            try:
                return await self._pieces(receive, share)
            finally:
                self._reading.discard(reading)
                timer.cancel()

    async def _pieces(self, receive: Receive, share: RoomShare) -> bytes:
        pieces = []
        has_more = True
        while has_more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            piece = message.get("body", b"")
            if share.held_bytes + len(piece) > self._max_body_bytes:
                raise too_large(self._max_body_bytes)
            share.take(len(piece))
            pieces.append(piece)
            has_more = message.get("more_body", False)
        return b"".join(pieces)

    def _give_up(self, reading: Interruption) -> None:
        message = f"The request's body did not arrive within {self._timeout_s:g} s"
        reading.interrupt(ApiError(408, message, code="body_timeout"))
