"""Sends an answer while it is made: the status with its first piece, nothing once the client is gone."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
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
        """Send what ``work`` yields: events of a stream, or one JSON document in pieces.

        An error before the first event, or before the document is complete, becomes the response; after
        that, the stream's last event. If the client goes away, or ``timeout_s`` seconds are over, ``work`` is
        closed wherever it waits. A document that is complete is sent whatever the time.
        """
        send = self._send_events if is_stream else self._send_document
        sending = asyncio.ensure_future(send(work))
        leaving = asyncio.ensure_future(self._client_left())
        error: ApiError | None = None
        try:
            done, _ = await asyncio.wait(
                (sending, leaving), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not done and self._has_begun and not is_stream:
                done, _ = await asyncio.wait(
                    (sending, leaving), return_when=asyncio.FIRST_COMPLETED
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
        await self._send_whole(deque([body]), status, {})

    async def send_error(self, error: ApiError) -> None:
        """Send ``error`` as the whole response."""
        body = json.dumps(error.body(), ensure_ascii=False).encode("utf-8", "replace")
        await self._send_whole(deque([body]), error.status, error.headers())

    async def _send_events(self, work: AsyncGenerator[bytes, None]) -> None:
        async for piece in work:
            if not self._has_begun:
                await self._begin(200, {"Content-Type": CONTENT_TYPE, "Cache-Control": "no-cache"})
            await self._send_piece(piece)
        await self._end()

    async def _send_document(self, work: AsyncGenerator[bytes, None]) -> None:
        await self._send_whole(deque([piece async for piece in work]), 200, {})

    async def _client_left(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _send_whole(self, pieces: deque[bytes], status: int, headers: dict[str, str]) -> None:
        """``pieces`` is emptied: a long document's memory is given back while it is sent."""
        num_bytes = sum(len(piece) for piece in pieces)
        length = {"Content-Type": "application/json", "Content-Length": str(num_bytes)}
        await self._begin(status, length | headers)
        while len(pieces) > 1:
            await self._send_piece(pieces.popleft())
            # Nothing waits while the client reads as fast as this sends: others have their turn here.
            await asyncio.sleep(0)
        last = pieces.popleft()
        await self._send({"type": "http.response.body", "body": last, "more_body": False})

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
