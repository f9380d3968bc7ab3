"""A rank that listens at a TCP port of this machine, as a server without a router in front does.

Started like any rank; its job names the port where others name their unix socket.
"""

from __future__ import annotations

import socket

from dwdp.serving.rank_server import process, server

BACKLOG = 1024


def listen(port: str) -> socket.socket:
    """A socket that listens at ``port`` of the loopback interface."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", int(port)))
    listener.listen(BACKLOG)
    listener.setblocking(False)
    return listener


def main() -> int:
    server.listen = listen  # type: ignore[assignment]
    return process.main()
