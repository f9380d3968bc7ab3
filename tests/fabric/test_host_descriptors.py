"""The descriptor server and its client: refusals, hostile and unlucky peers, timeouts."""

from __future__ import annotations

import array
import fcntl
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import fabric_peers as peers
import pytest

from dwdp import _C
from dwdp.fabric import Fabric, FabricError, create_fabric

MAGIC = 0x70647764
OK, REFUSED = 0, 1


@pytest.fixture
def fabric() -> Iterator[Fabric]:
    fabric = create_fabric("host")
    yield fabric
    fabric.close()


def connect(address: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client.settimeout(20.0)
    client.connect("\0" + address[1:])
    return client


def request(name: bytes = b"pieces", token: bytes = peers.TOKEN) -> bytes:
    return struct.pack("<II", MAGIC, len(name)) + token + name


def test_wrong_token_is_refused(fabric: Fabric) -> None:
    address, num_bytes = peers.export_one(fabric)
    for token in (bytes(16), peers.TOKEN[:-1] + b"g", b"1" + peers.TOKEN[1:]):
        with pytest.raises(FabricError, match=rf"'pieces' from {address}: refused: the token"):
            peers.fetch(fabric, address, "pieces", [num_bytes], token=token)
    with pytest.raises(FabricError, match="a token has 16 bytes, not 3"):
        peers.fetch(fabric, address, "pieces", [num_bytes], token=b"abc")
    with pytest.raises(FabricError, match="a token has 16 bytes, not 17"):
        create_fabric("host").serve(peers.TOKEN + b"x")


def test_unpublished_name_is_refused_until_it_is_published(fabric: Fabric) -> None:
    address, num_bytes = peers.export_one(fabric)
    with pytest.raises(FabricError, match="refused: 'later' is not published"):
        peers.fetch(fabric, address, "later", [num_bytes])
    fabric.publish("later", [fabric.allocate(num_bytes)])
    assert len(peers.fetch(fabric, address, "later", [num_bytes])) == 1
    with pytest.raises(FabricError, match="'later' has already been published"):
        fabric.publish("later", [])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([8192], "region 0 has 4096 bytes, not the 8192 expected"),
        ([4096, 4096], "it has 1 regions, not the 2 expected"),
        ([], "it has 1 regions, not the 0 expected"),
    ],
)
def test_sizes_must_agree(fabric: Fabric, sizes: list[int], message: str) -> None:
    address, _ = peers.export_one(fabric)
    descriptors = peers.num_descriptors()
    with pytest.raises(FabricError, match=message):
        peers.fetch(fabric, address, "pieces", sizes)
    assert peers.eventually(lambda: peers.num_descriptors() == descriptors)


def test_many_regions_come_in_order(fabric: Fabric) -> None:
    address = peers.serve(fabric)
    sizes = [(1 + i % 3) * fabric.granularity for i in range(777)]
    fabric.publish("many", [fabric.allocate(size) for size in sizes])
    regions = peers.fetch(fabric, address, "many", sizes)
    assert [region.num_bytes for region in regions] == sizes


def test_published_regions_may_be_closed(fabric: Fabric) -> None:
    address = peers.serve(fabric)
    region = fabric.allocate(fabric.granularity)
    fabric.publish("closed", [region])
    region.close()
    assert len(peers.fetch(fabric, address, "closed", [region.num_bytes])) == 1


def test_serving_has_a_beginning_and_an_end(fabric: Fabric) -> None:
    with pytest.raises(FabricError, match="before serve"):
        fabric.publish("early", [])
    address, num_bytes = peers.export_one(fabric)
    with pytest.raises(FabricError, match="already serves"):
        fabric.serve(peers.TOKEN)
    fabric.close()
    with pytest.raises(FabricError, match="Connection refused"):
        peers.fetch(fabric, address, "pieces", [num_bytes])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
def test_other_users_are_refused(fabric: Fabric) -> None:
    address, num_bytes = peers.export_one(fabric)
    process, _, answer = peers.start(peers.fetch_as_nobody, address, num_bytes)
    assert f"refused: process {process.pid} belongs to user {peers.NOBODY}, not to user 0" in answer
    process.join(20.0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
def test_servers_of_other_users_get_no_token(fabric: Fabric) -> None:
    process, connection, address = peers.start(peers.serve_as_nobody)
    message = f"cannot be trusted: process {process.pid} belongs to user {peers.NOBODY}"
    with pytest.raises(FabricError, match=message):
        peers.fetch(fabric, address, "pieces", [4096])
    connection.send("stop")
    process.join(20.0)


@pytest.mark.parametrize(
    "garbage",
    [
        b"x",
        bytes(24),
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("<II", MAGIC, 6) + peers.TOKEN,
        struct.pack("<II", MAGIC, 6) + peers.TOKEN + b"piece",
        struct.pack("<II", MAGIC, 0xFFFFFFFF) + peers.TOKEN + b"pieces",
        struct.pack("<II", MAGIC, 5000) + peers.TOKEN + b"p" * 5000,
        os.urandom(60000),
    ],
    ids=["byte", "zeros", "http", "no-name", "short-name", "huge-name", "long-name", "random"],
)
def test_garbage_is_refused_and_harms_nobody(fabric: Fabric, garbage: bytes) -> None:
    address, num_bytes = peers.export_one(fabric)
    descriptors = peers.num_descriptors()
    with connect(address) as client:
        client.send(garbage)
        answer = client.recv(4096)
        assert struct.unpack_from("<II", answer) == (MAGIC, REFUSED)
        assert answer[16:] == b"this is not a request for regions"
        assert client.recv(4096) == b""
    assert len(peers.fetch(fabric, address, "pieces", [num_bytes])) == 1
    assert peers.eventually(lambda: peers.num_descriptors() == descriptors)


def test_descriptors_sent_by_a_client_do_not_stay(fabric: Fabric) -> None:
    address, _ = peers.export_one(fabric)
    descriptors = peers.num_descriptors()
    for _ in range(20):
        with connect(address) as client, open("/dev/null") as file:
            socket.send_fds(client, [request()], [file.fileno()] * 50)
            answer, received, _, _ = socket.recv_fds(client, 4096, 10)
            assert struct.unpack_from("<IIII", answer) == (MAGIC, OK, 1, 1)
            for fd in received:
                os.close(fd)
    assert peers.eventually(lambda: peers.num_descriptors() == descriptors)


def test_silent_clients_do_not_hold_up_others(fabric: Fabric) -> None:
    address, num_bytes = peers.export_one(fabric)
    clients = [connect(address) for _ in range(50)]
    start = time.monotonic()
    assert len(peers.fetch(fabric, address, "pieces", [num_bytes])) == 1
    assert time.monotonic() - start < 5.0  # they may be silent for 10 s
    for client in clients:
        client.close()


def test_silent_clients_are_dropped() -> None:
    server = _C.DescriptorServer(peers.TOKEN, client_timeout_s=0.2)
    region = _C.HostRegion(4096)
    server.publish("pieces", [region])
    # More than are served at a time, so that the last ones are still in the backlog.
    clients = [connect(server.address) for _ in range(300)]
    assert len(_C.fetch_regions(server.address, peers.TOKEN, "pieces", [4096], 20.0)) == 1
    for client in clients:
        assert client.recv(1) == b""
        client.close()
    server.close()


def test_clients_that_do_not_take_their_answer_are_dropped() -> None:
    server = _C.DescriptorServer(peers.TOKEN, client_timeout_s=1.5)
    sizes = [4096] * 1000
    server.publish("many", [_C.HostRegion(4096)] * len(sizes))
    descriptors = peers.num_descriptors()
    with connect(server.address) as lazy, connect(server.address) as slow:
        lazy.send(request(b"many"))
        slow.send(request(b"many"))
        got = _C.fetch_regions(server.address, peers.TOKEN, "many", sizes, 20.0)
        assert len(got) == len(sizes)
        del got
        # Four packets, of which not all fit the socket, taken late but within the timeout each.
        for _ in range(4):
            time.sleep(0.1)
            answer, received, _, _ = socket.recv_fds(slow, 4096, 250)
            assert struct.unpack_from("<IIII", answer) == (MAGIC, OK, 1000, 250)
            for fd in received:
                os.close(fd)
        assert slow.recv(1) == b""
        # The lazy one is dropped as well, which leaves the client ends of both sockets. What it
        # finds then is not the whole answer.
        assert peers.eventually(lambda: peers.num_descriptors() == descriptors + 2)
        num_packets = 0
        while lazy.recv(4096):
            num_packets += 1
        assert 0 < num_packets < 4
    assert peers.eventually(lambda: peers.num_descriptors() == descriptors)
    server.close()


def test_closing_the_server_does_not_wait_for_clients() -> None:
    server = _C.DescriptorServer(peers.TOKEN, client_timeout_s=60.0)
    server.publish("none", [])
    with connect(server.address) as client:
        # Clients are accepted in order, so the silent one is being served when this returns.
        _C.fetch_regions(server.address, peers.TOKEN, "none", [], 20.0)
        start = time.monotonic()
        server.close()
        server.close()
        assert time.monotonic() - start < 5.0
        assert client.recv(1) == b""


class FakeServer:
    """Answers one request with what ``answer`` does to the connection."""

    def __init__(self, answer: Callable[[socket.socket], object]) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        name = f"dwdp-test-{os.getpid()}-{os.urandom(8).hex()}"
        self.listener.bind("\0" + name)
        self.listener.listen(1)
        self.address = "@" + name
        self.answer = answer
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        connection, _ = self.listener.accept()
        with connection:
            connection.recv(4096)
            self.answer(connection)

    def fetch(self, sizes: list[int], timeout_s: float = 20.0) -> list[_C.HostRegion]:
        try:
            return _C.fetch_regions(self.address, peers.TOKEN, "pieces", sizes, timeout_s)
        finally:
            self.thread.join(20.0)
            self.listener.close()


def memory_file(num_bytes: int, seals: int | None) -> int:
    fd = os.memfd_create("dwdp-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, num_bytes)
    if seals is not None:
        fcntl.fcntl(fd, 1033, seals)  # F_ADD_SEALS
    return fd


def answer_with(
    sizes: list[int], fds: list[int], announced: int | None = None
) -> Callable[[socket.socket], object]:
    announced = len(sizes) if announced is None else announced
    packet = struct.pack(f"<IIII{len(sizes)}Q", MAGIC, OK, announced, len(sizes), *sizes)

    def answer(connection: socket.socket) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        connection.sendmsg([packet], rights)

    return answer


def test_client_refuses_memory_that_can_be_truncated() -> None:
    descriptors = peers.num_descriptors()
    for seals in (None, 0, 2, 4):
        fd = memory_file(4096, seals)
        with pytest.raises(FabricError, match="can still be resized by its owner"):
            FakeServer(answer_with([4096], [fd])).fetch([4096])
        os.close(fd)
    assert peers.num_descriptors() == descriptors


def test_client_checks_what_it_gets() -> None:
    descriptors = peers.num_descriptors()
    fd = memory_file(8192, 6)
    other = os.open("/dev/null", os.O_RDONLY)
    cases: list[tuple[Callable[[socket.socket], object], str]] = [
        (answer_with([4096], [fd]), "region 0 has 8192 bytes, not the 4096 expected"),
        (answer_with([4096], [other]), "region 0 has 0 bytes, not the 4096 expected"),
        (answer_with([4096], []), "announces 1 regions and carries 0 descriptors"),
        (answer_with([4096], [fd, fd]), "announces 1 regions and carries 2 descriptors"),
        (answer_with([], [], announced=1), "a packet of 0 regions came after 0 of 1"),
        (answer_with([8192] * 3, [fd] * 3, announced=1), "a packet of 3 regions came after 0 of 1"),
        (lambda c: None, "closed the connection without an answer"),
        (
            lambda c: c.send(b"hello"),
            "a packet of 5 bytes is not from a descriptor server",
        ),
        (lambda c: c.send(os.urandom(50000)), "is not from a descriptor server"),
        (
            lambda c: c.send(struct.pack("<IIII", MAGIC, REFUSED, 0, 0) + b"go away"),
            "refused: go away",
        ),
    ]
    for answer, message in cases:
        with pytest.raises(FabricError, match=message):
            FakeServer(answer).fetch([4096])
    os.close(fd)
    os.close(other)
    assert peers.num_descriptors() == descriptors


def test_client_timeout_is_honoured_and_lets_others_run() -> None:
    release = threading.Event()
    server = FakeServer(lambda connection: release.wait(20.0))
    threading.Timer(1.5, release.set).start()
    start = time.monotonic()
    with pytest.raises(FabricError, match=r"no answer within 0\.3 s"):
        _C.fetch_regions(server.address, peers.TOKEN, "pieces", [4096], 0.3)
    assert 0.25 < time.monotonic() - start < 1.4
    server.thread.join(20.0)
    server.listener.close()


def test_signal_handlers_end_a_fetch() -> None:
    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    release = threading.Event()
    server = FakeServer(lambda connection: release.wait(20.0))
    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(Interrupted):
            _C.fetch_regions(server.address, peers.TOKEN, "pieces", [4096], 20.0)
    finally:
        signal.signal(signal.SIGALRM, previous)
        release.set()
        server.thread.join(20.0)
        server.listener.close()


@pytest.mark.parametrize("address", ["", "@", "/tmp/socket", "@" + "x" * 200])
def test_malformed_addresses(fabric: Fabric, address: str) -> None:
    with pytest.raises(FabricError, match="is not the address of a descriptor server"):
        peers.fetch(fabric, address, "pieces", [4096], timeout_s=1.0)


def test_timeouts_must_be_positive(fabric: Fabric) -> None:
    for timeout_s in (0.0, -1.0, float("nan")):
        with pytest.raises(FabricError, match="a timeout is positive"):
            peers.fetch(fabric, "@dwdp", "pieces", [4096], timeout_s=timeout_s)
