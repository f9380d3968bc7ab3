"""Room for bytes that the router holds: bodies of requests, and whole answers, each within a limit."""

from __future__ import annotations

from dwdp.serving.openai.errors import overloaded

_RETRY_S = 1.0


class ByteRoom:
    """Room for everything of one kind that is held at a time.

    Args:
        max_bytes: of all together.
        complaint: what a client is told when there is no more.
    """

    def __init__(self, max_bytes: int, complaint: str) -> None:
        self.max_bytes = max_bytes
        self.complaint = complaint
        self.held_bytes = 0


class RoomShare:
    """What one body or answer takes of ``room``. Has to be closed."""

    def __init__(self, room: ByteRoom) -> None:
        self._room = room
        self.held_bytes = 0

    def take(self, num_bytes: int) -> None:
        """Count ``num_bytes`` more.

        Raises:
            ApiError: 429, there is no room for them; they are not counted.
        """
        if self._room.held_bytes + num_bytes > self._room.max_bytes:
            raise overloaded(self._room.complaint, _RETRY_S)
        self._room.held_bytes += num_bytes
        self.held_bytes += num_bytes

    def close(self) -> None:
        """Give all of it back. Idempotent."""
        self._room.held_bytes -= self.held_bytes
        self.held_bytes = 0
