"""Shares out prompts over the ranks and gathers what they generate. One thread, never blocked by a rank."""

from __future__ import annotations

import hmac
import secrets
import selectors
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dwdp.serving.channel import Channel, Listener
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
)
from dwdp.serving.schedule import Schedule

_POLL_S = 0.1
_GOODBYE_S = 1.0


class GenerateError(RuntimeError):
    """The prompts could not be finished."""


class SetupFailed(GenerateError):
    """A rank could not be set up. Its text is that rank's message."""


class BadInput(ValueError):
    """A rank could not be set up because of what the user gave. Its text is that rank's message."""


@dataclass(frozen=True)
class LostRank:
    """A rank that died while it generated. Its unfinished prompts went to the others."""

    rank: int
    reason: str
    num_unfinished: int


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        completions: per prompt in input order, the rank that finished it, and its tokens.
        counters: per rank, as of its last completion (zeros if it finished none).
        lost: ranks that died.
        wall_s: seconds from the first request to the last completion.
    """

    completions: tuple[tuple[int, Completion], ...]
    counters: tuple[Counters, ...]
    lost: tuple[LostRank, ...]
    wall_s: float


class Dispatcher:
    """Listens for the ranks of one group.

    Life of a dispatcher::

        with Dispatcher(num_ranks) as dispatcher:   # tell the ranks its `name` and `token`
            dispatcher.wait_until_ready(check)
            outcome = dispatcher.run(requests)
            dispatcher.finish()

    Args:
        num_ranks: ranks of the group.
        describe_loss: why a rank is gone, in a few words ("was killed by SIGKILL").

    Attributes:
        num_ranks: ranks of the group.
        name, token: what a rank needs to connect and be believed.
        ready: by rank, what it holds, as soon as it has said so.
    """

    def __init__(
        self,
        num_ranks: int,
        *,
        describe_loss: Callable[[int], str] = lambda _: "closed its connection",
    ) -> None:
        self.token = secrets.token_hex(16)
        self.ready: dict[int, Ready] = {}
        self.num_ranks = num_ranks
        self._describe_loss = describe_loss
        self._listener = Listener(num_ranks)
        self._channels: dict[int, Channel] = {}
        self._strangers: list[Channel] = []
        self._gone: list[int] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    @property
    def name(self) -> str:
        return self._listener.name

    def wait_until_ready(
        self,
        check: Callable[[], None] = lambda: None,
        on_ready: Callable[[int], None] = lambda rank: None,
    ) -> None:
        """Wait until every rank has been set up, or is gone.

        Args:
            check: called ten times a second, and before a rank's complaint is believed. It raises
                when the group's set-up has failed for a reason that explains the complaint.
            on_ready: called with the rank when one is set up.

        Raises:
            BadInput, SetupFailed: a rank failed.
        """
        while len(self.ready.keys() | set(self._gone)) < self.num_ranks:
            for rank, message in self._poll(_POLL_S):
                if isinstance(message, Ready):
                    self.ready[rank] = message
                    on_ready(rank)
                elif isinstance(message, Failed):
                    check()
                    failure = BadInput if message.bad_input else SetupFailed
                    raise failure(f"rank {rank}: {message.message}")
            check()

    def run(
        self,
        requests: Sequence[Request],
        *,
        check: Callable[[], None] = lambda: None,
        on_completion: Callable[[Completion], None] = lambda completion: None,
        on_lost: Callable[[LostRank], None] = lambda lost: None,
    ) -> Outcome:
        """Have every request answered; ``requests[i].index`` is ``i``.

        Each goes to the rank with the fewest outstanding tokens. A rank that dies is done without.
        ``check`` is called ten times a second; what it raises ends the run.

        Raises:
            GenerateError: every rank died, or a request raised an error in a rank.
        """
        costs = [len(request.token_ids) + request.max_new_tokens for request in requests]
        schedule = Schedule(costs, range(self.num_ranks))
        answers: dict[int, tuple[int, Completion]] = {}
        counters = [Counters()] * self.num_ranks
        lost: list[LostRank] = []
        started = time.monotonic()
        while not schedule.is_finished:
            check()
            for rank in self._take_gone():
                held = schedule.lose(rank)
                lost.append(LostRank(rank, self._describe_loss(rank), len(held)))
                on_lost(lost[-1])
            if not schedule.ranks:
                reasons = "; ".join(f"rank {loss.rank} {loss.reason}" for loss in lost)
                raise GenerateError(
                    f"no rank is left and {len(requests) - schedule.num_finished} of "
                    f"{len(requests)} prompts are unfinished: {reasons}"
                )
            for rank, index in schedule.assign():
                self._channels[rank].send(requests[index])
            for rank, message in self._poll(_POLL_S):
                if isinstance(message, Completion):
                    schedule.finish(rank, message.index)
                    answers[message.index] = rank, message
                    counters[rank] = message.counters
                    on_completion(message)
                elif isinstance(message, PromptFailed):
                    raise GenerateError(
                        f"prompt {message.index + 1} failed on rank {rank}: {message.message}"
                    )
        return Outcome(
            completions=tuple(answers[index] for index in range(len(requests))),
            counters=tuple(counters),
            lost=tuple(lost),
            wall_s=time.monotonic() - started,
        )

    def finish(self) -> None:
        """Tell the ranks that there is nothing more to do."""
        for channel in self._channels.values():
            channel.send(Finish())
        deadline = time.monotonic() + _GOODBYE_S
        while any(c.has_unsent for c in self._channels.values()) and time.monotonic() < deadline:
            self._poll(_POLL_S)

    def __enter__(self) -> Dispatcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection. Idempotent; ``ready`` stays."""
        self._selector.close()
        self._listener.close()
        for channel in (*self._channels.values(), *self._strangers):
            channel.close()
        self._channels.clear()
        self._strangers.clear()

    def _poll(self, timeout_s: float) -> list[tuple[int, Message]]:
        """Accept, send and receive what can be without waiting; wait only if there is nothing at all.

        Returns the messages of known ranks, in the order of arrival per rank.
        """
        for channel in self._channels.values():
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if channel.has_unsent else 0)
            self._selector.modify(channel, wanted)
        for _ in self._selector.select(timeout_s):
            pass
        while (stranger := self._listener.accept()) is not None:
            self._strangers.append(stranger)
            self._selector.register(stranger, selectors.EVENT_READ)
        received: list[tuple[int, Message]] = []
        for stranger in list(self._strangers):
            received += self._greet(stranger)
        for rank, channel in list(self._channels.items()):
            channel.flush()
            try:
                received += [(rank, message) for message in channel.receive()]
            except MessageError:
                channel.close()
            if not channel.is_open:
                self._drop(rank)
        return received

    def _greet(self, stranger: Channel) -> list[tuple[int, Message]]:
        """Learn which rank has connected; returns what it has said after its greeting."""
        try:
            messages = stranger.receive()
        except MessageError:
            messages = []
            stranger.is_open = False
        if not messages and stranger.is_open:
            return []
        self._strangers.remove(stranger)
        hello = messages[0] if messages else None
        if (
            isinstance(hello, Hello)
            and hmac.compare_digest(hello.token, self.token)
            and 0 <= hello.rank < self.num_ranks
            and hello.rank not in self._channels
        ):
            self._channels[hello.rank] = stranger
            return [(hello.rank, message) for message in messages[1:]]
        self._selector.unregister(stranger)
        stranger.close()
        return []

    def _drop(self, rank: int) -> None:
        channel = self._channels.pop(rank)
        self._selector.unregister(channel)
        channel.close()
        self._gone.append(rank)

    def _take_gone(self) -> list[int]:
        gone, self._gone = self._gone, []
        return gone
