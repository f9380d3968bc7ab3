"""The dispatcher, with ranks played by threads of this process: no model, no other process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

import pytest

from dwdp.serving.channel import RankChannel
from dwdp.serving.dispatcher import (
    BadInput,
    Dispatcher,
    GenerateError,
    LostRank,
    SetupFailed,
)
from dwdp.serving.messages import (
    Completion,
    Counters,
    Failed,
    Finish,
    Hello,
    Message,
    MessageError,
    PromptFailed,
    Ready,
    Request,
    decode,
    encode,
)
from dwdp.serving.schedule import MAX_IN_FLIGHT

READY = Ready("direct", 0, 1, 2, 0, 0.5, 3)


def requests(count: int, num_tokens: int = 4) -> list[Request]:
    return [Request(index, (1,) * num_tokens, 8, 0.0, index) for index in range(count)]


def answer(request: Request) -> Completion:
    counters = Counters(num_prompts=1, generated_tokens=request.index)
    return Completion(request.index, (request.index, 2), "stop", counters)


class FakeRank:
    """Says what a rank says. ``act`` is called with every request, and returns whether to go on."""

    def __init__(
        self, dispatcher: Dispatcher, rank: int, act: Callable[[FakeRank, Request], bool]
    ) -> None:
        self.rank = rank
        self.seen: list[int] = []
        self.was_finished = False
        self._act = act
        self.channel = RankChannel.connect(dispatcher.name)
        self.channel.send(Hello(rank, dispatcher.token))
        self.channel.send(READY)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        for message in self.channel:
            if isinstance(message, Finish):
                self.was_finished = True
                break
            assert isinstance(message, Request)
            self.seen.append(message.index)
            if not self._act(self, message):
                break
        self.channel.close()


def work(rank: FakeRank, request: Request) -> bool:
    rank.channel.send(answer(request))
    return True


def die(rank: FakeRank, request: Request) -> bool:
    return False


def test_results_come_in_input_order() -> None:
    def work_backwards(rank: FakeRank, request: Request) -> bool:
        time.sleep(0.01 if request.index % 2 else 0)
        return work(rank, request)

    with Dispatcher(2) as dispatcher:
        ranks = [FakeRank(dispatcher, rank, work_backwards) for rank in (1, 0)]
        dispatcher.wait_until_ready()
        assert dispatcher.ready == {0: READY, 1: READY}
        progress: list[int] = []
        outcome = dispatcher.run(requests(20), on_completion=lambda c: progress.append(c.index))
        dispatcher.finish()
        for rank in ranks:
            rank.thread.join(10)
    assert [completion.index for _, completion in outcome.completions] == list(range(20))
    assert [completion.token_ids for _, completion in outcome.completions] == [
        (index, 2) for index in range(20)
    ]
    by_rank = {rank.rank: rank.seen for rank in ranks}
    assert all(index in by_rank[rank] for index, (rank, _) in enumerate(outcome.completions))
    assert sorted(progress) == list(range(20))
    assert all(rank.was_finished for rank in ranks)
    assert outcome.counters[0].generated_tokens == by_rank[0][-1]
    assert outcome.lost == ()


def test_a_silent_rank_holds_up_only_its_own_prompts() -> None:
    silent = threading.Event()

    def stop(rank: FakeRank, request: Request) -> bool:
        silent.wait(60)
        return work(rank, request)

    finished: list[int] = []

    def count(completion: Completion) -> None:
        finished.append(completion.index)
        if len(finished) == 30 - MAX_IN_FLIGHT:
            silent.set()

    with Dispatcher(2) as dispatcher:
        stopped = FakeRank(dispatcher, 0, stop)
        FakeRank(dispatcher, 1, work)
        dispatcher.wait_until_ready()
        outcome = dispatcher.run(requests(30), on_completion=count)
    assert sorted(finished[-MAX_IN_FLIGHT:]) == stopped.seen
    assert len(outcome.completions) == 30


def test_a_rank_that_reads_nothing_does_not_block_the_others() -> None:
    # Its prompts are larger than the socket's buffer, so that part of them stays unsent.
    with Dispatcher(2) as dispatcher:
        deaf = RankChannel.connect(dispatcher.name)
        deaf.send(Hello(0, dispatcher.token))
        deaf.send(READY)
        FakeRank(dispatcher, 1, work)
        dispatcher.wait_until_ready()
        finished: list[int] = []

        def count(completion: Completion) -> None:
            finished.append(completion.index)
            if len(finished) == 10 - MAX_IN_FLIGHT:
                deaf.close()

        outcome = dispatcher.run(requests(10, num_tokens=150_000), on_completion=count)
    assert [loss.rank for loss in outcome.lost] == [0]
    assert all(rank == 1 for rank, _ in outcome.completions)


def test_the_prompts_of_a_rank_that_dies_go_to_the_others() -> None:
    with Dispatcher(3, describe_loss=lambda rank: "was killed by SIGKILL") as dispatcher:
        for rank, act in enumerate((work, die, work)):
            FakeRank(dispatcher, rank, act)
        dispatcher.wait_until_ready()
        losses: list[LostRank] = []
        outcome = dispatcher.run(requests(12), on_lost=losses.append)
    assert losses == list(outcome.lost)
    assert [(loss.rank, loss.reason) for loss in losses] == [(1, "was killed by SIGKILL")]
    assert 1 <= losses[0].num_unfinished <= MAX_IN_FLIGHT
    assert {rank for rank, _ in outcome.completions} == {0, 2}
    assert [completion.index for _, completion in outcome.completions] == list(range(12))


def test_a_rank_that_dies_before_its_first_prompt_is_done_without() -> None:
    with Dispatcher(2, describe_loss=lambda rank: "was killed by SIGKILL") as dispatcher:
        early = FakeRank(dispatcher, 0, work)
        early.channel._socket.shutdown(socket.SHUT_RDWR)
        late = FakeRank(dispatcher, 1, work)
        dispatcher.wait_until_ready()
        outcome = dispatcher.run(requests(5))
    assert late.seen == [0, 1, 2, 3, 4]
    assert [(loss.rank, loss.num_unfinished) for loss in outcome.lost] == [(0, 0)]


def test_a_run_can_be_ended_from_outside() -> None:
    def hold(rank: FakeRank, request: Request) -> bool:
        return True

    def check() -> None:
        raise GenerateError("enough")

    with Dispatcher(1) as dispatcher:
        FakeRank(dispatcher, 0, hold)
        dispatcher.wait_until_ready()
        with pytest.raises(GenerateError, match="enough"):
            dispatcher.run(requests(1), check=check)


def test_when_every_rank_dies_the_run_fails_with_their_ends() -> None:
    with Dispatcher(2, describe_loss=lambda rank: "was killed by SIGSEGV") as dispatcher:
        for rank in range(2):
            FakeRank(dispatcher, rank, die)
        dispatcher.wait_until_ready()
        with pytest.raises(
            GenerateError,
            match=r"no rank is left and 5 of 5 prompts are unfinished: rank \d was killed by SIGSEGV; ",
        ):
            dispatcher.run(requests(5))


def test_a_prompt_that_raises_ends_the_run_and_is_named() -> None:
    def fail(rank: FakeRank, request: Request) -> bool:
        rank.channel.send(PromptFailed(request.index, "IndexError: out of range"))
        return True

    with Dispatcher(1) as dispatcher:
        FakeRank(dispatcher, 0, fail)
        dispatcher.wait_until_ready()
        with pytest.raises(GenerateError, match="prompt 1 failed on rank 0: IndexError"):
            dispatcher.run(requests(3))


@pytest.mark.parametrize(
    ("bad_input", "expected"), [(True, BadInput), (False, SetupFailed)], ids=["input", "machine"]
)
def test_a_rank_that_cannot_be_set_up_is_quoted(bad_input: bool, expected: type[Exception]) -> None:
    with Dispatcher(2) as dispatcher:
        FakeRank(dispatcher, 0, work)
        channel = RankChannel.connect(dispatcher.name)
        channel.send(Hello(1, dispatcher.token))
        channel.send(Failed("layer 3 is corrupt", bad_input))
        channel.close()
        with pytest.raises(expected, match=r"^rank 1: layer 3 is corrupt$"):
            dispatcher.wait_until_ready()


def test_what_the_check_knows_comes_before_a_complaint() -> None:
    def check() -> None:
        if dispatcher.ready:
            raise SetupFailed("rank 0 was killed by SIGKILL during set-up")

    with Dispatcher(2) as dispatcher:
        FakeRank(dispatcher, 0, work)
        time.sleep(0.2)
        channel = RankChannel.connect(dispatcher.name)
        channel.send(Hello(1, dispatcher.token))
        channel.send(Failed("the memory of rank 0 cannot be had", False))
        with pytest.raises(SetupFailed, match="rank 0 was killed"):
            dispatcher.wait_until_ready(check)


@pytest.mark.parametrize(
    "greeting",
    [b"{}\n", b"\xff\xff\n", encode(Hello(0, "guessed")), encode(Hello(5, "token")), encode(READY)],
    ids=["no message", "garbage", "wrong token", "wrong rank", "no greeting"],
)
def test_strangers_are_shown_the_door(greeting: bytes) -> None:
    with Dispatcher(1) as dispatcher:
        dispatcher.token = "token"
        stranger = RankChannel.connect(dispatcher.name)
        stranger._socket.sendall(greeting)
        time.sleep(0.05)
        FakeRank(dispatcher, 0, work)
        dispatcher.wait_until_ready()
        assert list(stranger) == []
        assert len(dispatcher.run(requests(3)).completions) == 3


def test_closing_twice_is_fine_and_closes_every_connection() -> None:
    dispatcher = Dispatcher(1)
    rank = FakeRank(dispatcher, 0, work)
    dispatcher.wait_until_ready()
    dispatcher.close()
    dispatcher.close()
    rank.thread.join(10)
    assert not rank.thread.is_alive()
    assert not rank.was_finished


@pytest.mark.parametrize(
    "message",
    [
        Hello(3, "token"),
        READY,
        Failed("ünicode\nlines", True),
        Request(0, (1, 2), 3, 0.5, 6),
        Completion(1, (4,), "length", Counters(wall_s=0.25)),
        PromptFailed(2, "why"),
        Finish(),
    ],
    ids=lambda message: message.kind,
)
def test_messages_survive_the_wire(message: Message) -> None:
    line = encode(message)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert decode(line) == message


def test_what_is_no_message_is_refused() -> None:
    with pytest.raises(MessageError, match="not a message"):
        decode(b'{"kind": "request", "index": "zero"}\n')


def test_a_rank_that_finds_no_dispatcher_is_told_why() -> None:
    with Dispatcher(1) as dispatcher:
        name = dispatcher.name
    with pytest.raises(ConnectionRefusedError, match=r"has ended, or is in\s+another container"):
        RankChannel.connect(name)
