"""Messages over a unix socket: the dispatcher's end, which never blocks, and a rank's end, which does.

The socket is bound to an abstract name, so no file is left behind, whoever is killed. A rank that is
stopped may leave a message half written or its own unread: the dispatcher keeps what it cannot send
and goes on with the other ranks.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator

from dwdp.process_identity import is_own_user
from dwdp.serving.messages import Message, decode, encode

_READ_BYTES = 1 << 16


class Channel:
    """The dispatcher's end of a connection. No method waits for the rank.

    Attributes:
        is_open: False once the rank has closed its end, or died.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._unsent = bytearray()
        self._unread = bytearray()
        self.is_open = True

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def has_unsent(self) -> bool:
        return self.is_open and bool(self._unsent)

    def send(self, message: Message) -> None:
        """Send ``message`` as far as the socket takes it; :meth:`flush` sends the rest."""
        self._unsent += encode(message)
        self.flush()

    def flush(self) -> None:
        """Send on what is left, as far as the socket takes it."""
        try:
            while self._unsent and self.is_open:
                sent = self._socket.send(self._unsent)
                del self._unsent[:sent]
        except BlockingIOError:
            return
        except OSError:
            self.is_open = False

    def receive(self) -> list[Message]:
        """The messages that have arrived in full.

        Raises:
            MessageError: the other end does not speak this protocol.
        """
        try:
            while data := self._socket.recv(_READ_BYTES):
                self._unread += data
            self.is_open = False
        except BlockingIOError:
            pass
        except OSError:
            self.is_open = False
        *lines, rest = self._unread.split(b"\n")
        self._unread = bytearray(rest)
        return [decode(bytes(line)) for line in lines]

    def close(self) -> None:
        self.is_open = False
        self._socket.close()


class RankChannel:
    """A rank's end of a connection: sends and receives one message at a time, and waits for it."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lines = connection.makefile("rb")

    @classmethod
    def connect(cls, name: str) -> RankChannel:
        """Connect to the listener called ``name``.

        Raises:
            OSError: nobody listens there, or another user's process does.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(f"\0{name}")
            if not is_own_user(connection):
                raise PermissionError(f"{name} belongs to another user's process")
        except ConnectionRefusedError as error:
            connection.close()
            raise ConnectionRefusedError(
                error.errno,
                "nobody hands out prompts at this rank's socket: the process that does has ended, or is in "
                "another container (another network namespace)",
            ) from error
        except OSError:
            connection.close()
            raise
        return cls(connection)

    def send(self, message: Message) -> None:
        """Raises OSError when the dispatcher is gone."""
        self._socket.sendall(encode(message))

    def __iter__(self) -> Iterator[Message]:
        """The messages from the dispatcher, until it closes the connection or dies."""
        try:
            for line in self._lines:
                yield decode(line)
        except ConnectionError:
            return

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


class Listener:
    """Where ranks connect to: an abstract unix socket with a random name. Only this user's processes may.

    Attributes:
        name: what a rank connects to.
    """

    def __init__(self, backlog: int) -> None:
        self.name = f"dwdp-dispatcher-{secrets.token_hex(8)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(f"\0{self.name}")
        self._socket.listen(backlog)
        self._socket.setblocking(False)

    def fileno(self) -> int:
        return self._socket.fileno()

    def accept(self) -> Channel | None:
        """The next connection, or None: there is none, or another user's process made it."""
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, ConnectionError):
            return None
        if not is_own_user(connection):
            connection.close()
            return None
        return Channel(connection)

    def close(self) -> None:
        self._socket.close()
