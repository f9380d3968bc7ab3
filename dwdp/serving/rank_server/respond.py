"""Sends an answer while it is made: the status with its first piece, nothing once the client is gone."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from typing import Any

from dwdp.serving.openai.errors import ApiError, deadline_exceeded, internal, too_large
from dwdp.serving.openai.streaming import CONTENT_TYPE, error_event

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

MAX_BODY_BYTES = 64 << 20
"""A guard alone: whoever lets users in sets a limit of its own."""


class ClientGone(Exception):
    """The client closed the connection."""


async def read_body(receive: Receive) -> bytes:
    """The request's body.

    Raises:
        ApiError: 413, it is too long.
        ClientGone: the client closed the connection.
    """
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise too_large(MAX_BODY_BYTES)
        if not message.get("more_body", False):
            return bytes(body)


class Responder:
    """Answers one request.

    Args:
        receive, send: ASGI's.
        headers: of every answer.
    """

    def __init__(self, receive: Receive, send: Send, headers: dict[str, str]) -> None:
        self._receive = receive
        self._send = send
        self._headers = headers
        self._has_begun = False

    async def send_work(
        self, work: AsyncGenerator[bytes, None], *, is_stream: bool, timeout_s: float | None
    ) -> None:
        """Send what ``work`` yields: events of a stream, or one JSON document.

        An error before the first piece becomes the response; after it, the stream's last event. If the
        client goes away, or ``timeout_s`` seconds are over, ``work`` is closed wherever it waits.
        """
        sending = asyncio.ensure_future(self._send_pieces(work, is_stream))
        leaving = asyncio.ensure_future(self._client_left())
        error: ApiError | None = None
        try:
            done, _ = await asyncio.wait(
                (sending, leaving), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if sending in done:
                sending.result()
            elif not done:
                error = deadline_exceeded(timeout_s or 0.0)
        except ApiError as caught:
            error = caught
        except Exception:
            logger.exception("a request failed")
            error = internal()
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.wait((sending, leaving))
            await work.aclose()
        if error is not None and not self._has_begun:
            await self.send_error(error)
        elif error is not None:
            await self._send_piece(error_event(error))
            await self._end()

    async def send_json(self, document: dict[str, Any], status: int = 200) -> None:
        """Send one JSON document as the whole response."""
        body = json.dumps(document, ensure_ascii=False).encode("utf-8", "replace")
        await self._send_whole(body, status, {})

    async def send_error(self, error: ApiError) -> None:
        """Send ``error`` as the whole response."""
        body = json.dumps(error.body(), ensure_ascii=False).encode("utf-8", "replace")
        await self._send_whole(body, error.status, error.headers())

    async def _send_pieces(self, work: AsyncGenerator[bytes, None], is_stream: bool) -> None:
        async for piece in work:
            if not is_stream:
                await self._send_whole(piece, 200, {})
                return
            if not self._has_begun:
                await self._begin(200, {"Content-Type": CONTENT_TYPE, "Cache-Control": "no-cache"})
            await self._send_piece(piece)
        await self._end()

    async def _client_left(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _send_whole(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        length = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        await self._begin(status, length | headers)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _begin(self, status: int, headers: dict[str, str]) -> None:
        self._has_begun = True
        pairs = [
            (name.lower().encode("latin-1"), value.encode("latin-1"))
            for name, value in (self._headers | headers).items()
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})

    async def _send_piece(self, piece: bytes) -> None:
        await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def _end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})
