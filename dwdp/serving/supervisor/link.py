"""HTTP to one rank process, over an abstract unix socket or TCP."""

from __future__ import annotations

import asyncio
import errno
import json
from typing import Any

import aiohttp
from aiohttp.client_exceptions import UnixClientConnectorError
from aiohttp.client_proto import ResponseHandler

from dwdp.process_identity import is_own_user
from dwdp.serving.supervisor.interface import RankEndpoint

_READ_BUFFER_BYTES = 1 << 16
_MAX_STATS_BYTES = 4 << 20
# Shorter than the 5 s after which uvicorn closes an idle connection: a request must not meet the closing.
_KEEP_ALIVE_S = 3.0

LINK_ERRORS = (aiohttp.ClientError, ConnectionError, TimeoutError, asyncio.TimeoutError)
"""What talking to a rank that is gone, or going, raises."""


def listens_no_more(error: BaseException) -> bool:
    """Whether one of :data:`LINK_ERRORS` says that no process of this user's listens at an endpoint."""
    return isinstance(error, OSError) and error.errno in (errno.ECONNREFUSED, errno.EPERM)


class _OwnUserConnector(aiohttp.UnixConnector):
    """Connects to this user's processes only: an abstract name that is free is anybody's to take."""

    async def _create_connection(
        self, req: aiohttp.ClientRequest, traces: list[Any], timeout: aiohttp.ClientTimeout
    ) -> ResponseHandler:
        """Raises UnixClientConnectorError when another user's process listens there."""
        protocol = await super()._create_connection(req, traces, timeout)
        try:
            if protocol.transport is None:
                raise ConnectionResetError(errno.ECONNRESET, "closed at once")
            if not is_own_user(protocol.transport.get_extra_info("socket")):
                raise PermissionError(errno.EPERM, "another user's process listens there")
        except OSError as error:
            protocol.close()
            raise UnixClientConnectorError(self.path, req.connection_key, error) from error
        return protocol


class RankLink:
    """Connections to one rank process; made and used inside one event loop."""

    def __init__(self, endpoint: RankEndpoint) -> None:
        self.endpoint = endpoint
        connector: aiohttp.BaseConnector
        if endpoint.socket is not None:
            connector = _OwnUserConnector(
                f"\0{endpoint.socket}", limit=0, keepalive_timeout=_KEEP_ALIVE_S
            )
        else:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
        self._session = aiohttp.ClientSession(
            base_url=endpoint.base_url,
            connector=connector,
            headers=dict(endpoint.headers),
            skip_auto_headers=("User-Agent", "Accept-Encoding"),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5.0),
            read_bufsize=_READ_BUFFER_BYTES,
        )

    async def post(self, path: str, body: bytes, headers: dict[str, str]) -> aiohttp.ClientResponse:
        """The response, once its headers are there. Closing it unread makes the rank stop the work.

        Raises:
            LINK_ERRORS: the rank cannot be reached, or closed the connection without an answer.
        """
        return await self._session.post(path, data=body, headers=headers, allow_redirects=False)

    async def is_healthy(self, path: str, timeout_s: float) -> bool:
        """Whether ``path`` answers 200.

        Raises:
            LINK_ERRORS: there is no answer within ``timeout_s``.
        """
        async with self._session.get(
            path, timeout=aiohttp.ClientTimeout(total=timeout_s)
        ) as response:
            await response.read()
            return response.status == 200

    async def stats(self, timeout_s: float) -> dict[str, Any]:
        """What the rank says about its work; {} where it says nothing that can be read.

        Raises:
            LINK_ERRORS: there is no answer within ``timeout_s``.
        """
        if self.endpoint.stats_path is None:
            return {}
        async with self._session.get(
            self.endpoint.stats_path, timeout=aiohttp.ClientTimeout(total=timeout_s)
        ) as response:
            body = bytearray()
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > _MAX_STATS_BYTES:
                    return {}
            if response.status != 200:
                return {}
        try:
            stats = json.loads(body)
        except ValueError:
            return {}
        return stats if isinstance(stats, dict) else {}

    async def close(self) -> None:
        await self._session.close()
