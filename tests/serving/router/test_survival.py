"""Ranks die, stop and come back; the requests do not notice, or are told clearly."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

from front import (
    COMPLETIONS,
    MODEL,
    PATIENCE_S,
    Reply,
    eventually,
    serving,
    start_stand_ins,
    wait_for_work,
    words,
)


def test_requests_share_the_ranks_and_the_cheapest_rank_is_chosen() -> None:
    with serving() as front:
        long = front.stream("each=0.02 long", max_tokens=1000)
        busy = long.served_by
        # Everything short goes to the other rank while the long answer runs.
        served = {
            front.complete(f"short{i}", max_tokens=2).json["system_fingerprint"] for i in range(6)
        }
        assert served == {f"rank-{1 - busy}"}
        long.close()


def test_waiting_requests_move_on_when_their_rank_is_killed() -> None:
    with serving() as front, ThreadPoolExecutor(12) as pool:
        asked = [
            pool.submit(front.complete, f"first=3 p{i}", max_tokens=3, stream=False)
            for i in range(12)
        ]
        wait_for_work(front, 0)
        wait_for_work(front, 1)
        front.kill(0)
        for number, future in enumerate(asked):
            reply = future.result()
            assert reply.status == 200
            assert reply.text == " ".join(words(f"p{number}", 3))
        assert front.metric("dwdp_retries_total") >= 1


def test_streams_of_other_ranks_are_untouched_and_a_cut_stream_says_so() -> None:
    with serving() as front:
        streams = [front.stream(f"each=0.02 s{i}", max_tokens=250) for i in range(4)]
        ranks = [stream.served_by for stream in streams]  # reads the first event of each
        assert sorted(ranks) == [0, 0, 1, 1]
        front.kill(0)
        for number, (stream, rank) in enumerate(zip(streams, ranks, strict=True)):
            if rank == 1:
                assert stream.texts() == words(f"s{number}", 250)[1:]
                continue
            events = list(stream)
            assert "[DONE]" not in events
            error = events[-1]["error"]
            assert (error["type"], error["code"]) == ("server_error", "rank_lost")
            assert "rank 0" in error["message"]
        assert front.metric("dwdp_cut_streams_total") == 2
        front.await_states("ready", "ready")
        assert front.stream("again", max_tokens=2).texts() == words("again", 2)


def test_a_stream_that_has_not_begun_moves_on() -> None:
    with serving() as front, ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(lambda i=i: front.stream(f"first=3 q{i}", max_tokens=3).texts())
            for i in range(4)
        ]
        wait_for_work(front, 0, 2)
        wait_for_work(front, 1, 2)
        front.kill(1)
        assert [future.result() for future in asked] == [words(f"q{i}", 3) for i in range(4)]


def test_a_dead_rank_rejoins_with_the_next_incarnation() -> None:
    with serving(3) as front:
        pids = [front.rank(1)["pid"]]
        for incarnation in (1, 2):
            front.kill(1)
            front.await_log(f"start rank 1 group 1 incarnation {incarnation}")
            front.await_states("ready", "ready", "ready")
            pids.append(front.rank(1)["pid"])
        rank = front.rank(1)
        assert len(set(pids)) == 3
        assert rank["restarts"] == 2 and rank["recovery_s"] > 0
        assert front.metric("dwdp_rank_restarts_total") == 2


def test_the_loss_of_the_last_copy_is_announced_before_it_happens() -> None:
    with serving(2, exit_with={f"0/{start}": 1 for start in range(1, 4)}) as front:
        assert front.get("/health").json["expert_memory"] == {"holders": [0, 1], "at_risk": False}
        front.kill(0)
        front.await_log("rank 1 is the last that has the experts' memory")
        assert front.metric("dwdp_expert_memory_at_risk") == 1
        assert front.snapshot()["expert_memory"] == {"holders": [1], "at_risk": True}
        front.await_log("held by 2 ranks again")
        assert front.metric("dwdp_expert_memory_at_risk") == 0


def test_when_all_ranks_die_a_new_group_starts_and_requests_wait_for_it() -> None:
    with serving(2) as front, ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(front.complete, f"first=3 w{i}", max_tokens=2) for i in range(4)]
        wait_for_work(front, 0)
        wait_for_work(front, 1)
        for rank in front.snapshot()["ranks"]:
            os.kill(rank["pid"], signal.SIGKILL)
        assert [future.result().text for future in asked] == [
            " ".join(words(f"w{i}", 2)) for i in range(4)
        ]
        front.await_log("all ranks load from the checkpoint again")
        front.await_log("start rank 0 group 2 incarnation 0")
        front.await_log("start rank 1 group 2 incarnation 0")


def test_a_request_that_kills_every_rank_is_given_up() -> None:
    with serving(2, max_attempts=2) as front:
        reply = front.complete("die=0 poison", max_tokens=4)
        assert reply.status == 503
        assert reply.error["code"] == "rank_lost"
        assert reply.headers["retry-after"]
        assert front.metric("dwdp_retries_total") == 1  # the last loss was the end
        front.await_states("ready", "ready")
        assert front.complete("fine", max_tokens=1).status == 200


def test_a_rank_that_refuses_is_passed_over() -> None:
    with serving(2, max_attempts=1) as front:
        for status in (429, 503):
            for rank in (0, 1):
                reply = front.complete(f"status={status} only={rank} taken", max_tokens=1)
                assert reply.text == "taken:0"
                assert reply.json["system_fingerprint"] == f"rank-{1 - rank}"
        assert front.metric("dwdp_retries_total") >= 2
        # Other statuses are the rank's answer, and are passed on.
        reply = front.complete("status=400 wrong", max_tokens=1)
        assert (reply.status, reply.json["error"]["message"]) == (400, "asked")


def test_what_all_ranks_refuse_is_refused() -> None:
    with serving(2, max_attempts=1) as front:
        reply = front.complete("status=429 retry=7 refused", max_tokens=1)
        assert (reply.status, reply.headers["retry-after"]) == (429, "7")
        assert (reply.error["type"], reply.error["code"]) == ("rate_limit_error", "queue_full")
        reply = front.complete("status=429 refused", max_tokens=1, stream=True)
        assert (reply.status, reply.headers["retry-after"]) == (429, "1")
        reply = front.complete("status=503 retry=4000 refused", max_tokens=1)
        assert (reply.status, reply.headers["retry-after"]) == (503, "60")
        assert (reply.error["type"], reply.error["code"]) == ("server_error", "no_rank")
        # A refusal is no loss: nothing has ended, and the next request is taken.
        assert front.complete("fine", max_tokens=1).status == 200
        assert front.metric("dwdp_rank_restarts_total") == 0


def test_an_engine_that_breaks_down_counts_as_lost() -> None:
    with serving(2, max_attempts=3) as front:
        reply = front.complete("status=503 failed=1 poison", max_tokens=1)
        assert (reply.status, reply.error["code"]) == (503, "rank_lost")
        assert reply.error["message"].count("failed") == 3
        assert front.complete("status=503 failed=1 only=0 fine", max_tokens=1).text == "fine:0"


def test_what_no_rank_can_take_is_refused_at_once() -> None:
    limits = {"max_waiting": 2, "max_sequence_length": 32}
    with serving(1, max_running=2, limits=limits) as front:
        busy = front.stream("each=0.05 busy", max_tokens=31)
        reply = front.complete("wide", n=5)
        assert reply.status == 400 and "at most 4" in reply.error["message"]
        reply = front.complete("long", max_tokens=32)
        assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
        assert front.complete("wide", n=3).status == 200
        busy.close()


def test_a_stopped_rank_gets_nothing_new_and_takes_up_where_it_was() -> None:
    with serving(2) as front, ThreadPoolExecutor(8) as pool:
        stream = front.stream("each=0.02 kept", max_tokens=60)
        rank = stream.served_by
        pid = front.rank(rank)["pid"]
        os.kill(pid, signal.SIGSTOP)
        asked = [pool.submit(front.complete, f"o{i}", max_tokens=2) for i in range(8)]
        # Some of them were given to the stopped rank, and are taken back from it.
        for number, future in enumerate(asked):
            assert future.result().text == " ".join(words(f"o{number}", 2))
        eventually(lambda: front.rank(rank)["state"] == "unresponsive", "the rank is found out")
        os.kill(pid, signal.SIGCONT)
        assert stream.texts() == words("kept", 60)[1:]
        front.await_states("ready", "ready")
        assert front.rank(rank)["pid"] == pid


def test_a_rank_that_hangs_for_long_is_replaced() -> None:
    watch = {"poll_s": 0.1, "timeout_s": 0.5, "hang_s": 0.5}
    with serving(2, watch=watch) as front:
        pid = front.rank(0)["pid"]
        os.kill(pid, signal.SIGSTOP)
        front.await_log("rank 0 has not answered")
        eventually(lambda: front.rank(0)["pid"] not in (pid, None), "a new process")
        front.await_states("ready", "ready")


def test_a_rank_that_drains_is_not_given_work_and_returns() -> None:
    with serving(2) as front:
        stream = front.stream("each=0.02 last", max_tokens=50)
        rank = stream.served_by
        os.kill(front.rank(rank)["pid"], signal.SIGTERM)
        assert stream.texts() == words("last", 50)[1:]
        front.await_log(f"start rank {rank} group 1 incarnation 1")
        front.await_states("ready", "ready")


def test_a_rank_that_cannot_start_again_is_given_up_and_the_others_go_on() -> None:
    failures = {f"1/{start}": 1 for start in range(1, 40)}
    with serving(2, exit_with=failures) as front:
        front.kill(1)
        front.await_log("rank 1 is started again in 0.8 s")
        assert "the stand-in was told to fail" in front.rank(1)["reason"]
        assert front.complete("fine", max_tokens=1).status == 200


def test_failures_of_the_first_set_up_end_the_command_with_that_ranks_message() -> None:
    for code, status in ((2, 2), (1, 1)):
        process = start_stand_ins(3, exit_with={"1/0": code, "2/0": 3})
        output, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == status
        assert output == ""
        assert errors.splitlines()[-1] == "error: rank 1: the stand-in was told to fail"


def test_clients_that_leave_free_the_rank() -> None:
    with serving(1) as front:
        stream = front.stream("each=0.05 gone", max_tokens=1000)
        next(iter(stream))
        connection = front.connect()
        body = b'{"model": "stand-in", "prompt": "first=30 gone", "max_tokens": 1}'
        connection.request("POST", "/v1/completions", body)
        wait_for_work(front, 0, 2)
        stream.close()
        connection.close()
        eventually(lambda: front.rank(0)["sequences"] == 0, "the router has let go")
        eventually(lambda: front.metric("dwdp_rank_running_sequences") == 0, "so has the rank")
        assert front.metric("dwdp_requests_total") == 2


def test_full_queues_are_told_with_a_time_to_come_back() -> None:
    with serving(1, max_running=1, max_queued=1) as front, ThreadPoolExecutor(8) as pool:
        # One runs, one more is given to the rank, one waits in the router.
        asked = [pool.submit(front.complete, f"first=5 b{i}", max_tokens=1) for i in range(6)]
        replies = [future.result() for future in asked]
        refused = [reply for reply in replies if reply.status == 429]
        assert len(refused) == 3 and sum(reply.status == 200 for reply in replies) == 3
        for reply in refused:
            assert reply.error["code"] == "queue_full"
            assert 1 <= int(reply.headers["retry-after"]) <= 60


def test_a_request_ends_at_its_deadline() -> None:
    with serving(1, request_timeout_s=3.0) as front:
        reply = front.complete("first=30 late", max_tokens=1)
        assert reply.status == 504 and reply.error["code"] == "deadline_exceeded"
        *_, last = front.stream("each=0.1 late", max_tokens=1000)
        assert last["error"]["code"] == "deadline_exceeded"
        eventually(lambda: front.metric("dwdp_rank_running_sequences") == 0, "the rank has stopped")


def test_the_time_for_an_answer_runs_while_its_request_arrives() -> None:
    with serving(1, request_timeout_s=0.5, body_timeout_s=PATIENCE_S) as front:
        body = json.dumps({"model": MODEL, "prompt": "quick", "max_tokens": 1}).encode()
        connection = front.connect()
        connection.putrequest("POST", COMPLETIONS)
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body[:-1])
        time.sleep(1.0)
        connection.send(body[-1:])
        reply = Reply(connection.getresponse())
        assert (reply.status, reply.error["code"]) == (504, "deadline_exceeded")
