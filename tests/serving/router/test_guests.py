"""Guests that are wrong, slow, greedy or many: each is told clearly, and the others lose nothing."""

from __future__ import annotations

import http.client
import json
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import psutil
import pytest
from front import COMPLETIONS, MODEL, PATIENCE_S, Front, Reply, eventually, serving

from dwdp.serving.router.app import MAX_WATCHERS
from dwdp.serving.router.snapshot import SnapshotFeed

ASKED = {"model": MODEL, "prompt": "hello", "max_tokens": 2}


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    with serving(
        1,
        header_timeout_s=1.0,
        body_timeout_s=1.0,
        max_body_bytes=4096,
        max_header_bytes=2048,
        write_timeout_s=1.0,
    ) as front:
        yield front


def read_reply(connection: socket.socket) -> Reply:
    response = http.client.HTTPResponse(connection)
    response.begin()
    return Reply(response)


def can_send(connection: socket.socket, data: bytes) -> bool:
    try:
        connection.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_the_paths_answer_as_openai_does(front: Front) -> None:
    models = front.get("/v1/models").json
    assert [model["id"] for model in models["data"]] == [MODEL]
    assert front.get(f"/v1/models/{MODEL}").json == models["data"][0]
    assert front.get("/v1/models/other/model").error["code"] == "model_not_found"
    assert front.get("/health/live").json == {"status": "live"}
    assert front.get("/health/ready").status == 200
    assert front.get("/health").json["ranks"] == [{"rank": 0, "state": "ready", "reason": ""}]
    assert front.get("/nowhere").error["code"] == "not_found"
    reply = front.get(COMPLETIONS)
    assert (reply.status, reply.error["code"]) == (405, "method_not_allowed")
    assert reply.headers["allow"] == "POST"
    assert front.request("POST", COMPLETIONS, ASKED).text == "hello:0 hello:1"


def test_a_request_keeps_its_id(front: Front) -> None:
    reply = front.request("POST", COMPLETIONS, ASKED, {"X-Request-Id": "mine-1"})
    assert reply.headers["x-request-id"] == "mine-1"
    for unfit in ("a b", "x" * 200, "ü"):
        headers = {"X-Request-Id": unfit.encode("latin-1").decode("latin-1")}
        given = front.request("POST", COMPLETIONS, ASKED, headers).headers["x-request-id"]
        assert given not in ("", unfit)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"", 400, None),
        (b"{", 400, None),
        (b"[]", 400, None),
        (b"\xff\xfe", 400, None),
        (b'{"model": "stand-in"}', 400, "prompt"),
        (json.dumps({**ASKED, "max_tokens": "two"}).encode(), 400, "max_tokens"),
        (json.dumps({**ASKED, "max_tokens": -1}).encode(), 400, "max_tokens"),
        (json.dumps({**ASKED, "temperature": [1]}).encode(), 400, "temperature"),
        (json.dumps({**ASKED, "frobnicate": 1}).encode(), 400, "frobnicate"),
        (json.dumps({**ASKED, "model": "other"}).encode(), 404, "model"),
        (json.dumps({**ASKED, "prompt": "x" * 5000}).encode(), 413, None),
        (b"[" * 4000, 400, None),
    ],
)
def test_wrong_bodies_are_told_what_is_wrong(
    front: Front, body: bytes, status: int, param: str | None
) -> None:
    reply = front.request("POST", COMPLETIONS, body)
    assert reply.status == status
    assert reply.error["param"] == param
    assert reply.error["message"]


def test_numbers_beyond_all_measure_harm_nobody(front: Front) -> None:
    body = b'{"model": "stand-in", "prompt": "first=1000 huge", "max_tokens": 1%s}' % (b"0" * 4000)
    connection = front.connect()
    connection.request("POST", COMPLETIONS, body)
    eventually(lambda: front.rank(0)["sequences"] == 1, "it is on a rank")
    assert 0 < front.metric("dwdp_rank_outstanding_tokens") < 1e7
    connection.close()
    eventually(lambda: front.rank(0)["sequences"] == 0, "it has left")


def test_watchers_are_limited_and_let_go(front: Front) -> None:
    for _ in range(3):
        head = front.request("HEAD", "/page/events")
        assert (head.status, head.body) == (200, b"")
    with ExitStack() as stack:
        pages = []
        for _ in range(MAX_WATCHERS):
            connection = front.connect()
            stack.callback(connection.close)
            connection.request("GET", "/page/events")
            pages.append(connection.getresponse())
            assert pages[-1].status == 200
        reply = front.get("/page/events")
        assert reply.status == 429 and reply.headers["retry-after"] == "30"
        events = [[page.readline() for _ in range(3)] for page in pages]
        later = [json.loads(third.removeprefix(b"data: "))["now_s"] for _, _, third in events]
        assert len(set(later)) < MAX_WATCHERS  # made once for several pages
    eventually(lambda: "queued" in front.snapshot(), "there is room for pages again")


def test_a_body_without_a_length_is_cut_off_at_the_limit(front: Front) -> None:
    connection = front.connect()
    connection.request("POST", COMPLETIONS, iter([b"x" * 1000] * 20), encode_chunked=True)
    assert Reply(connection.getresponse()).status == 413
    connection.close()


def test_keys_open_the_door() -> None:
    with serving(1, keys=("first key", "second")) as front:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic second"}):
            for path in ("/v1/models", "/metrics", "/page/events", "/openapi.json", "/nowhere"):
                reply = front.get(path, headers=headers)
                assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
                assert reply.headers["www-authenticate"] == "Bearer"
            assert front.request("POST", COMPLETIONS, ASKED, headers).status == 401
        front.headers["Authorization"] = "Bearer second"
        refused = f'dwdp_requests_total{{endpoint="{COMPLETIONS}",status="401"}} 3.0'
        assert refused in front.get("/metrics").body.decode()
        for key in ("first key", "second"):
            headers = {"Authorization": f"Bearer {key}"}
            assert front.request("POST", COMPLETIONS, ASKED, headers).status == 200
        for path in ("/", "/health", "/health/live", "/health/ready"):
            assert front.get(path).status == 200


def test_slow_headers_are_not_waited_for(front: Front) -> None:
    with front.socket() as slow, front.socket() as silent:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
        eventually(lambda: not can_send(slow, b"A: b\r\n"), "the slow one is cut off")
        assert is_closed(silent)
    with front.socket() as slow:
        slow.sendall(b"GET / HTTP/1.1\r\n")
        reply = read_reply(slow)
        assert (reply.status, reply.error["code"]) == (408, "header_timeout")
        assert is_closed(slow)


def test_a_second_request_on_a_connection_may_not_be_slow_either(front: Front) -> None:
    with front.socket() as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_reply(connection).status == 200
        connection.sendall(b"GET /health/live HT")
        assert read_reply(connection).status == 408
    with front.socket() as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_reply(connection).status == 200
        connection.sendall(b"\r\n")  # empty lines keep nothing alive
        assert read_reply(connection).status == 408
        assert is_closed(connection)


def test_slow_bodies_are_not_waited_for(front: Front) -> None:
    with front.socket() as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        reply = read_reply(slow)
        assert (reply.status, reply.error["code"]) == (408, "body_timeout")


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 3000,  # not even complete
        b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 3000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 1000 + b"\r\n",
        b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_long_headers_are_refused(front: Front, sent: bytes) -> None:
    with front.socket() as connection:
        connection.sendall(sent)
        reply = read_reply(connection)
        assert (reply.status, reply.error["code"]) == (431, "headers_too_large")


def test_what_is_not_http_is_refused(front: Front) -> None:
    for sent in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"hello\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\n\r\n",
    ):
        with front.socket() as connection:
            connection.sendall(sent)
            assert read_reply(connection).status == 400


def test_a_client_that_does_not_read_is_let_go(front: Front) -> None:
    with front.socket() as deaf:
        body = json.dumps({**ASKED, "stream": True, "max_tokens": 100_000}).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        deaf.sendall(head.encode() + body)
        eventually(lambda: front.rank(0)["sequences"] == 1, "the stream runs")
        eventually(lambda: front.rank(0)["sequences"] == 0, "the stream is given up")
    assert front.get("/metrics").body.count(b'reason="client does not read"') == 2


def test_an_event_is_made_once_for_all_pages_and_anew_for_a_new_one() -> None:
    made = []

    def make() -> dict[str, int]:
        made.append(len(made))
        return {"number": made[-1]}

    feed = SnapshotFeed(make, max_age_s=1e9)
    first = feed.latest()
    assert first == b'data: {"number": 0}\n\n'
    assert [feed.latest() for _ in range(5)] == [first] * 5
    second = feed.fresh()
    assert second == b'data: {"number": 1}\n\n'
    assert [feed.latest() for _ in range(5)] == [second] * 5
    feed = SnapshotFeed(make, max_age_s=0.0)
    assert len({feed.latest() for _ in range(5)}) == 5


def ask_for_a_long_answer(front: Front, num_words: int, *, streams: bool = False) -> socket.socket:
    """A connection on which a request has been sent; the answer, a KiB a word, is there to be read."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    client.connect(front.address)
    asked = {**ASKED, "prompt": "x" * 1024, "max_tokens": num_words, "stream": streams}
    body = json.dumps(asked).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    client.recv(1, socket.MSG_PEEK)
    return client


def test_answers_that_nobody_reads_are_bounded_and_hold_no_place_on_a_rank() -> None:
    num_words = 1 << 13  # 8 MiB: more than the kernel takes
    with serving(1, max_buffered_bytes=12 << 20) as front:
        with ask_for_a_long_answer(front, num_words) as reader:
            assert front.rank(0)["sequences"] == 0
            reply = front.complete("x" * 1024, max_tokens=num_words)
            assert (reply.status, reply.error["code"]) == (429, "queue_full")
            assert reply.headers["retry-after"]
            assert front.complete("small", max_tokens=1).text == "small:0"
            text = read_reply(reader).text
            assert text == " ".join(f"{'x' * 1024}:{number}" for number in range(num_words))
        with ask_for_a_long_answer(front, num_words):
            assert front.rank(0)["sequences"] == 0

        def has_room() -> bool:
            return front.complete("x" * 1024, max_tokens=num_words).status == 200

        eventually(has_room, "there is room after the client has left")


def test_a_stream_that_nobody_reads_holds_no_place_on_a_rank_after_its_deadline() -> None:
    with serving(1, request_timeout_s=2.0, write_timeout_s=PATIENCE_S) as front:
        with ask_for_a_long_answer(front, 1 << 16, streams=True):
            eventually(lambda: front.rank(0)["sequences"] == 0, "the place is free")


def test_a_client_that_reads_too_slowly_for_its_request_is_let_go() -> None:
    reason = 'dwdp_refused_connections_total{reason="client reads too slowly"} 1.0'
    with serving(1, request_timeout_s=3.0, write_timeout_s=4.0) as front:

        def is_given_up() -> bool:
            with ask_for_a_long_answer(front, 1 << 13) as slow:
                if not slow.recv(12, socket.MSG_PEEK).endswith(b"200"):
                    return False  # it took too long to make
                slow.settimeout(0.02)
                while receive(slow):
                    if reason in front.get("/metrics").body.decode():
                        return True
                    time.sleep(0.01)
                raise AssertionError("it was cut off before, or is complete")

        def receive(slow: socket.socket) -> bytes:
            try:
                return slow.recv(1 << 13)
            except TimeoutError:
                return b"nothing yet"

        eventually(is_given_up, "the client is given up")
        assert front.rank(0)["sequences"] == 0
        assert front.complete("next", max_tokens=1).text == "next:0"


def test_many_connections_keep_nobody_out() -> None:
    """Connections that say nothing make room for those that do, however many they are."""
    most = min(10_000, resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 500)
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with serving(1, header_timeout_s=300.0) as front, ExitStack() as stack:
        stream = front.stream("each=0.05 calm", max_tokens=200)
        silent = []
        for _ in range(most):
            silent.append(stack.enter_context(socket.create_connection(front.address)))
        assert front.complete("me", max_tokens=2).text == "me:0 me:1"
        assert front.get("/health/ready").status == 200
        assert stream.texts() == [f"calm:{number}" for number in range(200)]


def test_connections_above_the_limit_are_told_so() -> None:
    with serving(1, max_connections=3) as front, ExitStack() as stack:
        busy = [front.stream("each=0.05 busy", max_tokens=100) for _ in range(3)]
        refused = front.get("/health/live")
        assert (refused.status, refused.error["code"]) == (503, "too_many_connections")
        for number, stream in enumerate(busy):
            assert len(stream.texts()) == 100, number
            stream.close()
        # Idle ones give way: the oldest first, and are told why.
        idle = [stack.enter_context(front.socket()) for _ in range(3)]
        eventually(lambda: front.get("/health/live").status == 200, "there is room again")
        with idle[0].makefile("rb") as told:
            answer = told.read()
        assert b"503" in answer and b"too_many_connections" in answer
        assert b"retry-after" in answer.lower()


def test_nothing_but_loopback_is_bound(front: Front) -> None:
    listening = [
        connection.laddr.ip
        for process in [psutil.Process(front.process.pid)]
        for owner in [process, *process.children(recursive=True)]
        for connection in owner.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening and set(listening) == {"127.0.0.1"}


def test_descriptors_do_not_leak(front: Front) -> None:
    process = psutil.Process(front.process.pid)

    def exercise() -> None:
        for number in range(30):
            assert front.complete(f"p{number}", max_tokens=2).status == 200
            front.request("POST", COMPLETIONS, b"{")
            stream = front.stream("each=0.01 s", max_tokens=100)
            next(iter(stream))
            stream.close()
        eventually(lambda: front.rank(0)["sequences"] == 0, "all is finished")

    exercise()
    time.sleep(4.0)  # idle connections to the rank are closed after 3 s
    before = process.num_fds()
    exercise()
    eventually(lambda: process.num_fds() <= before, "descriptors are back")
