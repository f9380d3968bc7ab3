"""Answers of ranks, on their way to clients."""

from __future__ import annotations

import aiohttp

from dwdp.serving.openai.errors import overloaded
from dwdp.serving.openai.streaming import CONTENT_TYPE

_RETRY_S = 1.0


class AnswerRoom:
    """Counts the bytes of whole answers that are held until their clients have been sent them.

    Args:
        max_bytes: of all answers together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.held_bytes = 0

    def take(self, num_bytes: int) -> None:
        """Count ``num_bytes`` more.

        Raises:
            ApiError: 429, there is no room for them; they are not counted.
        """
        if self.held_bytes + num_bytes > self._max_bytes:
            raise overloaded("Answers that are being sent take all room", _RETRY_S)
        self.held_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        self.held_bytes -= num_bytes


class Answer:
    """What a rank has said so far: all of it, or the first bytes of a stream that goes on.

    Has to be closed.

    Args:
        room: where a whole answer is counted until then; a stream is read no faster than it is sent.
    """

    def __init__(self, response: aiohttp.ClientResponse, room: AnswerRoom) -> None:
        self.response = response
        self.data = b""
        self._room = room
        self._held_bytes = 0

    @property
    def is_stream(self) -> bool:
        return self.response.content_type == CONTENT_TYPE

    async def begin(self) -> None:
        """Wait for all of it, or for a stream's first bytes; b"" if that ends without any.

        Raises:
            LINK_ERRORS: the rank was lost.
            ApiError: 429, there is no room for it.
        """
        content = self.response.content
        if self.is_stream:
            self.data = await content.readany()
            return
        chunks = []
        while chunk := await content.readany():
            self._room.take(len(chunk))
            self._held_bytes += len(chunk)
            chunks.append(chunk)
        self.data = b"".join(chunks)

    def close(self) -> None:
        """Give back the room; a rank that has not said everything stops. Idempotent."""
        self._room.give_back(self._held_bytes)
        self._held_bytes = 0
        self.response.close()  # of one that was read to its end the connection has gone back already
