"""How the command ends: by a signal, by two, or because no rank is left. Clients are always told."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import psutil
from front import (
    COMPLETIONS,
    MODEL,
    PATIENCE_S,
    Front,
    Reply,
    eventually,
    serving,
    start_stand_ins,
    wait_for_work,
    words,
)


def test_sigterm_lets_streams_finish() -> None:
    with serving(2) as front:
        stream = front.stream("each=0.02 last", max_tokens=40)
        next(iter(stream))
        front.process.send_signal(signal.SIGTERM)
        assert stream.texts() == words("last", 40)[1:]
        assert front.process.wait(PATIENCE_S) == 0


def test_sigterm_ends_streams_after_the_grace_time() -> None:
    with serving(1, grace_s=0.5) as front:
        stream = front.stream("each=0.05 endless", max_tokens=100000)
        pid = front.rank(0)["pid"]
        front.process.send_signal(signal.SIGTERM)
        *_, last = stream
        assert last["error"]["code"] == "draining"
        assert front.process.wait(PATIENCE_S) == 0
        assert not runs(pid)


def runs(pid: int) -> bool:
    """Whether the process runs; a zombie, which nobody may reap in a container, does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_terminals_signals_are_for_the_router_alone() -> None:
    """``nohup dwdp serve``: a hangup reaches all of its session, and ranks do not ignore it."""
    with serving(1) as front:
        assert os.getsid(front.rank(0)["pid"]) != os.getsid(front.process.pid)


def test_ctrl_c_and_the_death_of_the_router_leave_no_process_behind() -> None:
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        with serving(2) as front:
            pids = [rank["pid"] for rank in front.snapshot()["ranks"]]
            assert front.end(number) == code
            eventually(
                lambda pids=pids: not any(map(runs, pids)),
                "the ranks are gone",
            )


def test_nobody_has_to_read_that_it_is_ready() -> None:
    process = start_stand_ins(1)
    assert process.stdout is not None
    process.stdout.close()
    try:

        def address() -> str | None:
            for one in psutil.Process(process.pid).net_connections("tcp"):
                if one.status == psutil.CONN_LISTEN:
                    return f"http://127.0.0.1:{one.laddr.port}"
            return None

        front = Front(process, eventually(address, "it listens"))
        eventually(lambda: front.get("/health/ready").status == 200, "it is ready")
        assert front.complete("heard", max_tokens=1).text == "heard:0"
        process.send_signal(signal.SIGTERM)
        front.await_log("draining")
    finally:
        process.kill()
        process.wait()


def test_a_second_signal_cuts_the_waiting_short() -> None:
    """Neither for the stream, nor for the rank, which would take longer than the command has."""
    with serving(1, grace_s=10_000.0) as front:
        stream = front.stream("each=0.05 endless", max_tokens=1_000_000)
        pid = front.rank(0)["pid"]
        front.process.send_signal(signal.SIGTERM)
        front.await_log("draining")
        next(iter(stream))
        front.process.send_signal(signal.SIGTERM)
        *_, last = stream
        assert last["error"]["code"] == "draining"
        assert front.process.wait(PATIENCE_S) == 0
        assert not runs(pid)


def test_a_second_signal_does_not_wait_for_ranks_that_hang() -> None:
    with serving(1) as front:
        pid = front.rank(0)["pid"]
        psutil.Process(pid).suspend()
        front.process.send_signal(signal.SIGINT)
        front.await_log("ending the ranks")
        front.process.send_signal(signal.SIGINT)
        assert front.process.wait(PATIENCE_S) == 130
        front.await_log(f"process {pid} did not end within 0 s: killed")
        assert not runs(pid)


def test_requests_are_told_that_no_rank_is_left() -> None:
    with serving(2, max_groups=1) as front, ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(front.complete, "first=1000 waits", stream=on) for on in (False, True)]
        wait_for_work(front, 0)
        wait_for_work(front, 1)
        for rank in front.snapshot()["ranks"]:
            os.kill(rank["pid"], signal.SIGKILL)
        for future in asked:
            reply = future.result()
            assert (reply.status, reply.error["code"]) == (503, "no_rank")
            assert reply.headers["retry-after"]
        assert front.process.wait(PATIENCE_S) == 1


def test_a_request_that_has_not_arrived_is_told_of_the_end() -> None:
    with serving(1, grace_s=0.2, body_timeout_s=PATIENCE_S) as front:
        connection = front.connect()
        connection.putrequest("POST", COMPLETIONS)
        connection.putheader("Content-Length", "1000")
        connection.endheaders()
        connection.send(json.dumps({"model": MODEL}).encode())
        front.get("/health/live")  # so the one before has been seen
        front.process.send_signal(signal.SIGTERM)
        reply = Reply(connection.getresponse())
        assert (reply.status, reply.error["code"]) == (503, "draining")
        assert front.process.wait(PATIENCE_S) == 0
