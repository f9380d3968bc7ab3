"""A key-value store for the ranks of one machine that only the group's own processes reach.

It does what Group needs of a torch store, but over an abstract unix socket instead of a TCP port: the
kernel names the user at the other end (SO_PEERCRED), each side refuses another one, and a client has to
present the group's token. Other users can neither read the group's keys nor write false ones.

A request is one line, ``[operation, key, argument...]`` in JSON, and so is its answer.
"""

from __future__ import annotations

import base64
import hmac
import json
import secrets
import socket
import socketserver
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from dwdp.launch import UNIX_SCHEME
from dwdp.process_identity import is_own_user

_ANSWER_S = 60.0
_OPERATIONS = frozenset({"set", "get", "check", "add", "compare_set"})


class LocalStore:
    """The values, in this process. Safe for several threads; nothing waits.

    Keys are text; values are bytes, and text stands for its UTF-8 bytes.
    """

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def set(self, key: str, value: str | bytes) -> None:
        with self._lock:
            self._values[key] = _bytes(value)

    def get(self, key: str) -> bytes:
        """Raises RuntimeError if there is no such key."""
        with self._lock:
            if key not in self._values:
                raise RuntimeError(f"the group's store has no {key!r}")
            return self._values[key]

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all of ``keys`` are there."""
        with self._lock:
            return all(key in self._values for key in keys)

    def add(self, key: str, amount: int) -> int:
        """Add to the number under ``key``, 0 if there is none, and return the sum."""
        with self._lock:
            total = int(self._values.get(key, b"0")) + amount
            self._values[key] = str(total).encode()
            return total

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        """Put ``desired`` in the place of ``expected`` ("": of nothing); returns what is there now."""
        with self._lock:
            if self._values.get(key, b"") == _bytes(expected):
                self._values[key] = _bytes(desired)
            return self._values.get(key, b"")


class LocalStoreServer(LocalStore):
    """A store that other processes of this user reach at ``name`` if they have ``token``.

    Threads serve it until ``close``, or until this process ends: no file is left behind.

    Attributes:
        name: of the abstract unix socket, without the leading NUL.
        token: what clients have to present.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = f"dwdp-store-{secrets.token_hex(8)}"
        self.token = secrets.token_hex(16)
        self._server = _Server(self)
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            args=(None,),  # nothing to look for every now and then: ``close`` wakes it
            name="dwdp-store",
            daemon=True,
        )
        self._thread.start()

    @property
    def address(self) -> str:
        """As ``DWDP_RENDEZVOUS`` takes it."""
        return f"{UNIX_SCHEME}{self.name}"

    def close(self) -> None:
        """Serve no more, and end every connection. Idempotent."""
        with suppress(OSError):  # closed before
            self._server.socket.shutdown(socket.SHUT_RDWR)
        self._server.shutdown()
        self._server.server_close()
        self._server.close_connections()
        self._thread.join()


class LocalStoreClient:
    """The store at ``name``, for any thread of this process, one request at a time.

    Every method raises RuntimeError when the server is gone or does not answer.

    Raises:
        OSError: nobody listens there, or another user's process does.
        RuntimeError: the server refuses ``token``.
    """

    def __init__(self, name: str, token: str) -> None:
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(_ANSWER_S)
            self._socket.connect(f"\0{name}")
            if not is_own_user(self._socket):
                raise PermissionError(f"{name} belongs to another user's process")
            self._lines = self._socket.makefile("rb")
            self._ask(token)
        except BaseException:
            self._socket.close()
            raise

    def set(self, key: str, value: str | bytes) -> None:
        self._ask("set", key, _text(value))

    def get(self, key: str) -> bytes:
        return base64.b64decode(self._ask("get", key))

    def check(self, keys: Sequence[str]) -> bool:
        return bool(self._ask("check", list(keys)))

    def add(self, key: str, amount: int) -> int:
        return int(self._ask("add", key, amount))

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        return base64.b64decode(self._ask("compare_set", key, _text(expected), _text(desired)))

    def close(self) -> None:
        self._socket.close()

    def _ask(self, *request: Any) -> Any:
        with self._lock:
            try:
                self._socket.sendall(json.dumps(request).encode() + b"\n")
                line = self._lines.readline()
            except (OSError, ValueError) as error:
                raise RuntimeError(f"the group's store does not answer: {error}") from error
        if not line.endswith(b"\n"):
            raise RuntimeError("the group's store has closed the connection")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]


class PrefixedStore:
    """The keys of ``store`` that begin with ``prefix/``; a torch store's as well."""

    def __init__(self, prefix: str, store: Any) -> None:
        self._prefix = prefix
        self._store = store

    def set(self, key: str, value: str | bytes) -> None:
        self._store.set(self._own(key), value)

    def get(self, key: str) -> bytes:
        value: bytes = self._store.get(self._own(key))
        return value

    def check(self, keys: Sequence[str]) -> bool:
        return bool(self._store.check([self._own(key) for key in keys]))

    def add(self, key: str, amount: int) -> int:
        return int(self._store.add(self._own(key), amount))

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        value: bytes = self._store.compare_set(self._own(key), expected, desired)
        return value

    def _own(self, key: str) -> str:
        return f"{self._prefix}/{key}"


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, store: LocalStoreServer) -> None:
        self.store = store
        self._connections: set[socket.socket] = set()
        super().__init__(f"\0{store.name}", _Handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return is_own_user(request)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that dies in the midst of a request is nobody's error."""

    def close_connections(self) -> None:
        for connection in list(self._connections):
            with suppress(OSError):  # its thread has just closed it
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(socketserver.StreamRequestHandler):
    """One client, from its token to the end of its connection."""

    server: _Server

    def handle(self) -> None:
        store = self.server.store
        request = json.loads(self.rfile.readline() or "[]")
        if len(request) != 1 or not hmac.compare_digest(str(request[0]), store.token):
            self._answer({"error": "the group's store refuses this process's token"})
            return
        self._answer({"value": None})
        while line := self.rfile.readline():
            operation, *arguments = json.loads(line)
            try:
                self._answer({"value": _perform(store, operation, arguments)})
            except RuntimeError as error:
                self._answer({"error": str(error)})

    def _answer(self, answer: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(answer).encode() + b"\n")


def _perform(store: LocalStore, operation: str, arguments: list[Any]) -> Any:
    if operation not in _OPERATIONS:
        raise RuntimeError(f"the group's store has no operation {operation!r}")
    key, *values = arguments
    values = [base64.b64decode(value) if isinstance(value, str) else value for value in values]
    result = getattr(store, operation)(key, *values)
    return _text(result) if isinstance(result, bytes) else result


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


def _text(value: str | bytes) -> str:
    return base64.b64encode(_bytes(value)).decode()
