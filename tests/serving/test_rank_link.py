"""The link to a rank: connections that are used again, responses cut and paced."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable

import pytest
import uvloop

from dwdp.serving.supervisor import link as rank_link
from dwdp.serving.supervisor.interface import RankEndpoint
from dwdp.serving.supervisor.link import RankLink
from dwdp.serving.supervisor.rank_connection import RankUnreachable

WHOLE = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
WAIT_S = 60.0

Writer = asyncio.StreamWriter


class Server:
    """Answers every request with ``answer``, and keeps what it was asked."""

    def __init__(self, answer: Callable[[Writer], Awaitable[object]]) -> None:
        self.endpoint = RankEndpoint(socket=f"dwdp-test-{secrets.token_hex(8)}")
        self.num_connections = 0
        self.num_closed = 0
        self.heads: list[bytes] = []
        self._answer = answer

    async def serve(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        self.num_connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head)
                if b"POST" in head:
                    await reader.readexactly(2)
                await self._answer(writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.num_closed += 1
            writer.close()


def with_link(
    answer: Callable[[Writer], Awaitable[object]],
    body: Callable[[RankLink, Server], Awaitable[None]],
) -> None:
    async def run() -> None:
        server = Server(answer)
        listener = await asyncio.start_unix_server(server.serve, f"\0{server.endpoint.socket}")
        link = RankLink(server.endpoint)
        try:
            await asyncio.wait_for(body(link, server), WAIT_S)
        finally:
            await link.close()
            listener.close()

    asyncio.run(run())


async def answer_whole(writer: Writer) -> None:
    writer.write(WHOLE)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


async def ask(link: RankLink) -> bytes:
    response = link.post("/path", b"{}", {"X-Request-Id": "1"})
    await response.begin()
    assert (response.status, response.content_type) == (200, b"text/plain")
    data = b""
    while piece := await response.read_some():
        data += piece
    response.close()
    return data


def test_a_connection_is_used_again() -> None:
    async def body(link: RankLink, server: Server) -> None:
        for _ in range(5):
            assert await ask(link) == b"ok"
            assert await link.is_healthy("/health", WAIT_S)
        assert server.num_connections == 1
        assert server.heads[0].startswith(b"POST /path HTTP/1.1\r\nHost: rank\r\n")
        assert b"X-Request-Id: 1\r\nContent-Length: 2\r\n" in server.heads[0]
        await asyncio.gather(*(ask(link) for _ in range(3)))
        assert server.num_connections == 3

    with_link(answer_whole, body)


def test_a_connection_that_the_rank_closes_is_not_used_again() -> None:
    async def answer(writer: Writer) -> None:
        writer.write(WHOLE.replace(b"Content-Length", b"Connection: close\r\nContent-Length"))

    async def body(link: RankLink, server: Server) -> None:
        for number in range(1, 4):
            assert await ask(link) == b"ok"
            assert server.num_connections == number

    with_link(answer, body)


def test_an_idle_connection_is_closed_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_link, "_KEEP_ALIVE_S", 0.05)

    async def body(link: RankLink, server: Server) -> None:
        await asyncio.gather(*(ask(link) for _ in range(3)))
        await until(lambda: server.num_closed == 3)

    with_link(answer_whole, body)


@pytest.mark.parametrize("more", [b"surplus", WHOLE], ids=["no HTTP", "another response"])
def test_a_connection_that_brings_what_nobody_asked_for_is_closed(more: bytes) -> None:
    async def answer(writer: Writer) -> None:
        writer.write(WHOLE)
        await asyncio.sleep(0.05)
        writer.write(more)

    async def body(link: RankLink, server: Server) -> None:
        assert await ask(link) == b"ok"
        await until(lambda: server.num_closed == 1)
        assert await ask(link) == b"ok"
        assert server.num_connections == 2

    with_link(answer, body)


def test_what_came_before_a_cut_is_read_first() -> None:
    async def answer(writer: Writer) -> None:
        writer.write(CHUNKED + b"3\r\nabc\r\n5\r\nde")
        writer.close()

    async def body(link: RankLink, server: Server) -> None:
        response = link.post("/", b"{}", {})
        await response.begin()
        received = []

        async def read() -> None:
            while True:
                received.append(await response.read_some())

        with pytest.raises(ConnectionError):
            await read()
        assert b"".join(received) == b"abcde" and not response.is_complete

    with_link(answer, body)


@pytest.mark.parametrize("is_split", [False, True], ids=["in one read", "in two reads"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (b"HTTP/1.1 100 Continue\r\n\r\n", WHOLE),
        (b"HTTP/1.1 103 Early Hints\r\nContent-Type: no/no\r\n\r\n", WHOLE),
        (WHOLE, b"surplus"),
        (WHOLE, WHOLE),
        (WHOLE[:-1], b"k"),
    ],
    ids=["100", "103", "surplus", "another response", "body in two"],
)
def test_the_answer_is_found_whatever_is_around_it(
    first: bytes, second: bytes, is_split: bool
) -> None:
    async def answer(writer: Writer) -> None:
        writer.write(first)
        if is_split:
            await asyncio.sleep(0.02)
        writer.write(second)

    async def body(link: RankLink, server: Server) -> None:
        assert await ask(link) == b"ok"

    with_link(answer, body)


def test_a_body_may_end_with_the_connection() -> None:
    async def answer(writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\no")
        await asyncio.sleep(0.02)
        writer.write(b"k")
        writer.close()

    async def body(link: RankLink, server: Server) -> None:
        assert await ask(link) == b"ok"
        assert await link.is_healthy("/", WAIT_S)

    with_link(answer, body)


def test_a_connection_that_is_closed_at_once_fails_its_request() -> None:
    async def run() -> None:
        endpoint = RankEndpoint(socket=f"dwdp-test-{secrets.token_hex(8)}")
        listener = await asyncio.start_unix_server(
            lambda reader, writer: writer.transport.abort(), f"\0{endpoint.socket}"
        )
        link = RankLink(endpoint)
        for _ in range(20):
            with pytest.raises(ConnectionError):
                await asyncio.wait_for(link.post("/", b"{}", {}).begin(), WAIT_S)
        await link.close()
        listener.close()

    uvloop.run(run())
    asyncio.run(run())


def test_a_chunk_that_is_none_fails_the_request() -> None:
    async def answer(writer: Writer) -> None:
        writer.write(CHUNKED + b"no chunk\r\n")

    async def body(link: RankLink, server: Server) -> None:
        response = link.post("/", b"{}", {})
        await response.begin()
        assert response.status == 200
        with pytest.raises(ConnectionError, match="no response of HTTP"):
            await response.read_some()

    with_link(answer, body)


def test_what_a_rank_has_said_to_the_end_can_be_read_after_closing() -> None:
    async def answer(writer: Writer) -> None:
        writer.write(WHOLE)

    async def body(link: RankLink, server: Server) -> None:
        response = link.post("/", b"{}", {})
        await until(lambda: response.is_complete)
        response.close()
        await response.begin()
        assert await response.read_some() == b"ok" and await response.read_some() == b""

    with_link(answer, body)


def test_closing_the_link_at_once_fails_what_was_just_asked() -> None:
    async def body(link: RankLink, server: Server) -> None:
        response = link.post("/", b"{}", {})
        await link.close()
        with pytest.raises(RankUnreachable):
            await response.begin()

    with_link(answer_whole, body)


def test_who_does_not_speak_http_is_told_from_a_rank() -> None:
    async def answer(writer: Writer) -> None:
        writer.write(b"220 mail.example.org ESMTP\r\n\r\n")

    async def body(link: RankLink, server: Server) -> None:
        with pytest.raises(ConnectionError, match="no response of HTTP"):
            await link.post("/", b"{}", {}).begin()
        await until(lambda: server.num_closed == 1)

    with_link(answer, body)


def test_what_nobody_reads_is_not_fetched() -> None:
    num_bytes = 16 << 20

    async def answer(writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % num_bytes)
        writer.write(bytes(num_bytes))
        await writer.drain()

    async def body(link: RankLink, server: Server) -> None:
        response = link.post("/", b"{}", {})
        await response.begin()
        await asyncio.sleep(0.2)
        assert response.num_held_bytes < num_bytes // 8
        received = 0
        while data := await response.read_some():
            received += len(data)
        assert received == num_bytes

    with_link(answer, body)


def test_a_pipe_waits_for_a_slow_writer_and_keeps_the_order() -> None:
    pieces = [b"%06d" % number for number in range(20_000)]

    async def answer(writer: Writer) -> None:
        writer.write(CHUNKED)
        for number, piece in enumerate(pieces):
            writer.write(b"6\r\n%b\r\n" % piece)
            if number % 1000 == 0:
                await asyncio.sleep(0.005)
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    async def body(link: RankLink, server: Server) -> None:
        written, is_full = [], False

        def write(data: bytes) -> bool:
            nonlocal is_full
            assert not is_full
            written.append(data)
            is_full = len(written) % 2 == 0
            return not is_full

        async def drain() -> None:
            nonlocal is_full
            await asyncio.sleep(0.001)
            is_full = False

        response = link.post("/", b"{}", {})
        await response.begin()
        await response.pipe(write, drain)
        assert b"".join(written) == b"".join(pieces) and len(written) > 2
        assert (await ask_again(link)).is_complete and server.num_connections == 1

    async def ask_again(link: RankLink) -> object:
        response = link.post("/", b"{}", {})
        await response.begin()
        while await response.read_some():
            pass
        return response

    with_link(answer, body)


@pytest.mark.parametrize("is_piped", [False, True], ids=["read", "piped"])
def test_who_waits_hears_of_the_end(is_piped: bool) -> None:
    async def answer(writer: Writer) -> None:
        writer.write(CHUNKED + b"3\r\nabc\r\n")

    async def body(link: RankLink, server: Server) -> None:
        async def read() -> None:
            response = link.post("/", b"{}", {})
            responses.append(response)
            await response.begin()
            if is_piped:
                await response.pipe(lambda data: True, lambda: asyncio.sleep(0))
            while True:
                await response.read_some()

        responses: list[object] = []
        for end in ("closed response", "closed link"):
            reading = asyncio.ensure_future(read())
            await until(lambda: bool(responses) and responses[-1].status == 200)  # type: ignore[attr-defined]
            await asyncio.sleep(0.02)
            if end == "closed response":
                responses[-1].close()  # type: ignore[attr-defined]
                await until(lambda: server.num_closed == 1)  # the rank sees it, and stops
            else:
                await link.close()
            with pytest.raises(ConnectionError):
                await reading
        with pytest.raises(RankUnreachable, match="the link is closed"):
            await link.post("/", b"{}", {}).begin()

    with_link(answer, body)


def test_nobody_listens() -> None:
    async def run() -> None:
        for endpoint in (RankEndpoint(socket="dwdp-nobody"), RankEndpoint("http://127.0.0.1:1")):
            link = RankLink(endpoint)
            with pytest.raises(RankUnreachable) as caught:
                await link.post("/", b"{}", {}).begin()
            assert rank_link.listens_no_more(caught.value)
            await link.close()

    asyncio.run(run())


@pytest.mark.parametrize("url", ["https://rank", "rank:80", "http://rank/below"])
def test_an_address_is_one_of_plain_http(url: str) -> None:
    with pytest.raises(ValueError, match="http://HOST:PORT"):
        RankLink(RankEndpoint(url))
