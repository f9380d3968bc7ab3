"""Answers of ranks, on their way to clients."""

from __future__ import annotations

from dwdp.serving.openai.streaming import CONTENT_TYPE
from dwdp.serving.router.room import ByteRoom, RoomShare
from dwdp.serving.supervisor.rank_connection import RankResponse

_STREAM = CONTENT_TYPE.encode()


class Answer:
    """What a rank has said so far: all of it, or the first bytes of a stream that goes on.

    Has to be closed.

    Args:
        room: where a whole answer is counted until then; a stream is read no faster than it is sent.
    """

    def __init__(self, response: RankResponse, room: ByteRoom) -> None:
        self.response = response
        self.data = b""
        self._share = RoomShare(room)

    @property
    def is_stream(self) -> bool:
        return self.response.content_type == _STREAM

    async def begin(self) -> None:
        """Wait for all of it, or for a stream's first bytes; b"" if that ends without any.

        Raises:
            RankUnreachable: the rank was not given the request.
            ConnectionError: the rank was lost, or :meth:`close` was called.
            ApiError: 429, there is no room for it.
        """
        await self.response.begin()
        if self.is_stream:
            self.data = await self.response.read_some()
            return
        chunks = []
        while chunk := await self.response.read_some():
            self._share.take(len(chunk))
            chunks.append(chunk)
        self.data = b"".join(chunks)

    def close(self) -> None:
        """Give back the room; a rank that has not said everything stops. Idempotent."""
        self._share.close()
        self.response.close()
