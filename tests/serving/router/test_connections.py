"""What clients do to a connection, byte by byte: they leave, send ahead, or go on after an early answer."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any, cast

import psutil
import pytest
import uvicorn
from front import COMPLETIONS, MODEL, PATIENCE_S, Front, Reply, eventually, serving
from uvicorn.server import ServerState

from dwdp.serving.router.connection import ConnectionLimits, GuardedProtocol

MAX_HEADER_BYTES = 2048
LIVE = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    with serving(
        1,
        keys=("key",),
        header_timeout_s=2.0,
        body_timeout_s=PATIENCE_S,
        max_body_bytes=1 << 18,
        max_header_bytes=MAX_HEADER_BYTES,
    ) as front:
        front.headers["Authorization"] = "Bearer key"
        yield front


class Client:
    """One connection, and the answers read from it."""

    def __init__(self, front: Front) -> None:
        self.socket = front.socket()
        self.reader = self.socket.makefile("rb")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.close()
        self.socket.close()

    def makefile(self, mode: str) -> Any:
        """For http.client: the one reader, so that nothing is lost in the buffer of another one."""
        return _Unclosed(self.reader)

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def reply(self) -> Reply:
        response = http.client.HTTPResponse(cast(Any, self))
        response.begin()
        return Reply(response)

    def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        try:
            return self.reader.read()
        except ConnectionResetError:
            return b""


class _Unclosed:
    """A reader that outlives the responses read from it."""

    def __init__(self, reader: io.BufferedReader) -> None:
        self._reader = reader

    def close(self) -> None:
        return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


def post(body: bytes, *headers: str, path: str = COMPLETIONS, key: str = "key") -> bytes:
    head = [
        f"POST {path} HTTP/1.1",
        "Host: x",
        f"Content-Length: {len(body)}",
        f"Authorization: Bearer {key}",
        *headers,
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def asked(prompt: str, **options: object) -> bytes:
    return json.dumps({"model": MODEL, "prompt": prompt, "max_tokens": 1, **options}).encode()


def await_work(front: Front, num_sequences: int) -> None:
    eventually(
        lambda: front.rank(0)["sequences"] == num_sequences,
        f"{num_sequences} sequences on the rank",
    )


@pytest.mark.parametrize(
    "ahead",
    [
        LIVE,
        LIVE * 500,
        post(asked("later")),
        post(asked("x" * 50_000)),
        b"GET /health",  # not even complete
        b"\x16\x03\x01",
    ],
    ids=["one", "many", "with a body", "with a long body", "incomplete", "malformed"],
)
@pytest.mark.parametrize("is_at_once", [True, False], ids=["at once", "later"])
def test_a_client_that_sent_ahead_and_left_frees_the_rank(
    front: Front, ahead: bytes, is_at_once: bool
) -> None:
    running = post(asked("first=1000 left"))
    with Client(front) as client:
        client.send(running + ahead if is_at_once else running)
        if ahead.startswith(b"\x16") and is_at_once:
            assert client.rest() == b""  # what is malformed ends the connection
        else:
            await_work(front, 1)
            if not is_at_once:
                client.send(ahead)
    await_work(front, 0)
    eventually(lambda: front.metric("dwdp_rank_running_sequences") == 0, "the rank has stopped")


def test_requests_sent_ahead_are_answered_in_order(front: Front) -> None:
    prompts = [f"p{number}" for number in range(40)]
    with Client(front) as client:
        for prompt in prompts[:20]:
            client.send(post(asked(prompt)))
        client.send(b"".join(post(asked(prompt)) for prompt in prompts[20:]) + LIVE)
        for prompt in prompts:
            assert client.reply().text == f"{prompt}:0"
        assert client.reply().status == 200


def test_what_is_sent_ahead_of_an_answer_is_bounded(front: Front) -> None:
    with Client(front) as client:
        client.send(post(asked("each=0.05 busy", max_tokens=100_000, stream=True)))
        await_work(front, 1)
        process = psutil.Process(front.process.pid)
        before = process.memory_info().rss
        client.socket.settimeout(1.0)
        with pytest.raises(TimeoutError):  # it is not read any more
            client.send(LIVE * 1_000_000)
        assert process.memory_info().rss - before < 8 << 20
    await_work(front, 0)  # seen when something is written to it


@pytest.mark.parametrize(
    ("request_line", "headers", "status"),
    [
        ("POST /nowhere", {}, 404),
        (f"GET {COMPLETIONS}", {}, 405),
        (f"POST {COMPLETIONS}", {"Authorization": "Bearer wrong"}, 401),
        (f"POST {COMPLETIONS}", {}, 413),
    ],
)
@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunked"])
def test_after_an_early_answer_the_rest_of_the_body_is_no_request(
    front: Front, request_line: str, headers: dict[str, str], status: int, is_chunked: bool
) -> None:
    num_bytes = 1 << 20
    headers = {"Host": "x", "Authorization": "Bearer key", **headers}
    headers |= (
        {"Transfer-Encoding": "chunked"} if is_chunked else {"Content-Length": str(num_bytes)}
    )
    head = [f"{request_line} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    body = b"x" * num_bytes
    if is_chunked:
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (num_bytes, body)
    with Client(front) as client:
        client.send("\r\n".join(head).encode() + b"\r\n\r\n" + body[:1000])
        if status != 413 or not is_chunked:  # a chunked one is too long only later
            assert client.reply().status == status
            client.send(body[1000:])
        else:
            client.send(body[1000:])
            assert client.reply().status == status
        if status == 413:
            assert client.rest() == b""
        else:
            client.send(LIVE)
            assert client.reply().json == {"status": "live"}


def test_the_rest_of_an_answered_request_is_not_waited_for_without_end(front: Front) -> None:
    with Client(front) as client:
        client.send(post(b"x" * 1000, path="/nowhere")[:-1])
        assert client.reply().status == 404
        assert client.rest() == b""


def test_an_early_answer_reaches_a_client_that_asked_to_close(front: Front) -> None:
    with Client(front) as client:
        request = post(b"x" * (4 << 20), "Connection: close", key="wrong")
        client.send(request)  # all of it is taken, or this would fail
        assert client.reply().status == 401
        assert client.rest() == b""


def test_an_answer_instead_of_100_continue_ends_the_connection(front: Front) -> None:
    with Client(front) as client:
        client.send(post(b"x" * 1000, "Expect: 100-continue", key="wrong")[:-1000])
        reply = client.reply()
        assert (reply.status, reply.headers["connection"]) == (401, "close")
        assert client.rest() == b""


@pytest.mark.parametrize(
    "tail",
    [b"0\r\nTrailer: ", b"1;extension=", b"0\r\n" + b"A: b\r\n" * MAX_HEADER_BYTES],
    ids=["trailer", "chunk extension", "trailers"],
)
def test_what_is_not_the_body_of_a_chunked_request_is_bounded(front: Front, tail: bytes) -> None:
    with Client(front) as client:
        client.send(
            f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\n".encode()
            + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"
            + tail
        )
        client.send(b"b" * 4 * MAX_HEADER_BYTES)
        reply = client.reply()
        assert (reply.status, reply.error["code"]) == (431, "headers_too_large")


def test_trailers_are_no_headers(front: Front) -> None:
    with Client(front) as client:
        client.send(
            f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
            + b"1\r\n{\r\n0\r\nAuthorization: Bearer key\r\n\r\n"
        )
        assert client.reply().status == 401


def test_a_malformed_body_is_told_so(front: Front) -> None:
    with Client(front) as client:
        client.send(post(b"", "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b""))
        client.send(b"no chunk\r\n")
        assert client.reply().error["code"] == "invalid_http"


def test_a_connection_above_the_limit_is_served_once_there_is_room() -> None:
    with serving(1, max_connections=1) as front:
        stream = front.stream("each=0.02 busy", max_tokens=100_000)
        with Client(front) as client:
            client.send(LIVE)
            assert client.reply().error["code"] == "too_many_connections"
            stream.close()

            def is_served() -> bool:
                client.send(LIVE)
                return client.reply().status == 200

            eventually(is_served, "the connection is served")


def test_no_more_connections_are_served_than_there_may_be() -> None:
    """Those that are refused make no room for others."""
    request = post(asked("words"))
    with serving(1, max_connections=3) as front, ExitStack() as stack:
        clients = [stack.enter_context(Client(front)) for _ in range(12)]
        for client in clients:
            client.send(request[:-2])
            time.sleep(0.02)
        for client in clients:
            with suppress(ConnectionError):
                client.send(request[-2:])
        statuses = Counter(client.reply().status for client in clients)
        assert statuses == {200: 3, 503: 9}


def test_who_gives_way_while_its_request_arrives_is_told_so() -> None:
    request = post(asked("words"))
    with serving(1, max_connections=2) as front, ExitStack() as stack:
        early = stack.enter_context(Client(front))
        early.send(request[:20])
        others = [stack.enter_context(Client(front)) for _ in range(2)]
        assert early.reply().error["code"] == "too_many_connections"
        for client in others:
            client.send(request)
            assert client.reply().status == 200


def test_a_client_of_http_1_0_gets_a_stream_without_chunks() -> None:
    with serving(1) as front, Client(front) as client:
        request = post(asked("words", stream=True, max_tokens=5))
        client.send(request.replace(b"HTTP/1.1", b"HTTP/1.0"))
        head, _, body = client.rest().partition(b"\r\n\r\n")
        assert b" 200 " in head and b"chunked" not in head.lower()
        events = body.split(b"\n\n")
        assert events[-2:] == [b"data: [DONE]", b""]
        assert all(event.startswith(b"data: ") for event in events[:-1])
        assert len(events) == 5 + 2


class Connected:
    """Connections to an application that answers everything with ``num_bytes`` bytes, within limits."""

    def __init__(self, num_bytes: int, **limits: Any) -> None:
        self.reasons: list[str] = []
        self._num_bytes = num_bytes
        self.limits = ConnectionLimits(
            **{
                "max_connections": 4,
                "max_header_bytes": MAX_HEADER_BYTES,
                "header_timeout_s": PATIENCE_S,
                "write_timeout_s": 0.1,
                "refuse": self._answer,
                "on_refusal": self.reasons.append,
                **limits,
            }
        )

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", b"%d" % self._num_bytes)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"x" * self._num_bytes})

    async def ask(self, *headers: str) -> socket.socket:
        """A client that has sent a request; what the kernel holds for it is little."""
        config = uvicorn.Config(
            self._answer, log_config=None, lifespan="off", ws="none", interface="asgi3"
        )
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        theirs.sendall("\r\n".join(["GET / HTTP/1.1", "Host: x", *headers, "", ""]).encode())
        theirs.setblocking(False)
        await asyncio.get_running_loop().connect_accepted_socket(
            lambda: GuardedProtocol(config, ServerState(), {}, limits=self.limits), ours
        )
        return theirs

    async def until_closed(self, num_open: int = 0) -> None:
        while self.limits.num_open > num_open:
            await asyncio.sleep(0.01)


def read_slowly(client: socket.socket, num_bytes: int) -> asyncio.Future[int]:
    """Reads ``num_bytes`` again and again, as a function that the loop calls ahead of later timers.

    Returns:
        How much there was until the end of the connection, once that is there.
    """
    loop = asyncio.get_running_loop()
    total: asyncio.Future[int] = loop.create_future()
    num_read = 0

    def read() -> None:
        nonlocal num_read
        try:
            data = client.recv(num_bytes)
        except BlockingIOError:
            data = None
        except ConnectionResetError:
            data = b""
        if data == b"":
            total.set_result(num_read)
            return
        num_read += len(data or b"")
        loop.call_later(0.01, read)

    read()
    return total


@pytest.mark.parametrize("num_bytes", [40_000, 400_000], ids=["less", "more"])
def test_a_connection_is_not_kept_for_a_client_that_does_not_read_the_end(num_bytes: int) -> None:
    """Less than the transport writes ahead, or more: closing must not wait for the client for good."""

    async def run() -> None:
        server = Connected(num_bytes)
        with await server.ask("Connection: close"):
            await server.until_closed()
        assert server.reasons == ["client does not read"]

    asyncio.run(run())


@pytest.mark.parametrize("headers", [("Connection: close",), ()], ids=["last", "not the last"])
def test_a_client_that_reads_slowly_gets_all_of_its_answer(headers: tuple[str, ...]) -> None:
    num_bytes = 400_000

    async def run() -> None:
        server = Connected(num_bytes, write_timeout_s=0.1)
        with await server.ask(*headers) as client:
            total = read_slowly(client, 4096)
            while not total.done() and not server.limits.idle:
                await asyncio.sleep(0.01)
            if not headers:  # it is kept for another request
                client.shutdown(socket.SHUT_WR)
            assert await total > num_bytes
            await server.until_closed()
        assert server.reasons == []

    asyncio.run(run())


def test_a_client_that_reads_its_last_answer_slowly_gives_way_to_others() -> None:
    async def run() -> None:
        server = Connected(400_000, max_connections=1, write_timeout_s=0.5)
        with await server.ask("Connection: close") as slow:
            total = read_slowly(slow, 64)  # it would take a minute
            while not server.limits.idle:
                await asyncio.sleep(0.01)
            with await server.ask("Connection: close") as client:
                assert await read_slowly(client, 1 << 20) > 400_000
            assert await total < 400_000
        assert server.reasons == ["too many connections", "client does not read"]

    asyncio.run(run())
