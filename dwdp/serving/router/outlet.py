"""Where the pieces of a stream go to its client.

ASGI's ``send`` is a coroutine, so that each piece would wait for its task's turn of the event loop. An outlet
writes at once. It is an extension of ASGI: :data:`EXTENSION` in a request's ``scope["extensions"]``.
"""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

EXTENSION = "dwdp.outlet"


class Outlet:
    """Writes the body of a response whose start and end are sent by ASGI.

    In chunks; to a client of HTTP/1.0, which knows none, as it is: there the connection's end is the body's.
    """

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    @classmethod
    def of(cls, scope: dict[str, Any]) -> Outlet:
        """The outlet of a request."""
        outlet = scope["extensions"][EXTENSION]
        assert isinstance(outlet, cls)
        return outlet

    def begin(self) -> None:
        """Called before the start of the response is sent."""
        if self._cycle.scope["http_version"] == "1.0":
            self._cycle.chunked_encoding = False

    def write(self, data: bytes) -> bool:
        """Write a piece, not an empty one. False: the client is slow, and :meth:`drain` comes next."""
        cycle = self._cycle
        if cycle.disconnected or cycle.transport.is_closing():
            return False
        is_chunked = cycle.chunked_encoding
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data) if is_chunked else data)
        return not cycle.flow.write_paused

    async def drain(self) -> None:
        """Wait until the client has read some of what was written, or is gone."""
        if self._cycle.flow.write_paused and not self._cycle.disconnected:
            await self._cycle.flow.drain()
