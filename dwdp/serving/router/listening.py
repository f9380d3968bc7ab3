"""The socket that the router listens on, and how many connections it can bear."""

from __future__ import annotations

import errno
import ipaddress
import socket

_RESERVED_DESCRIPTORS = 256
_DESCRIPTORS_PER_CONNECTION = 2  # the client's, and one to a rank
BACKLOG = 4096
"""Connections that may wait to be accepted."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on ``host:port``; port 0 takes a free one.

    Raises:
        ValueError: the address cannot be used; the text says why.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ValueError(f"--host {host!r} is no address of this machine: {error}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        advice = "; choose another --port" if error.errno == errno.EADDRINUSE else ""
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}{advice}") from error
    listener.setblocking(False)
    return listener


def url_of(listener: socket.socket) -> str:
    """What a client on this machine uses as the base address."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can connect."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def affordable_connections(num_descriptors: int) -> int:
    """Connections that so many descriptors allow for, each with one to a rank."""
    return max(1, (num_descriptors - _RESERVED_DESCRIPTORS) // _DESCRIPTORS_PER_CONNECTION)
