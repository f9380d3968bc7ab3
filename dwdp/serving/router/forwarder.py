"""Carries one request to a rank and the answer back; to another rank if the first one dies too early."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import closing
from dataclasses import dataclass

from dwdp.serving.openai.errors import ApiError, unavailable
from dwdp.serving.openai.streaming import error_event
from dwdp.serving.router.answers import Answer
from dwdp.serving.router.balancer import Balancer
from dwdp.serving.router.cost import Cost
from dwdp.serving.router.lease import Deadline, Lease
from dwdp.serving.router.metrics import RouterMetrics
from dwdp.serving.router.outlet import Outlet
from dwdp.serving.router.refusals import REFUSAL_STATUSES, RankRefused, Refusals, has_failed
from dwdp.serving.router.room import ByteRoom
from dwdp.serving.supervisor.link import LINK_ERRORS
from dwdp.serving.supervisor.rank_connection import RankUnreachable

log = logging.getLogger(__name__)

_LOST_RETRY_S = 1.0
_LEAST_TIMEOUT_S = 0.001
_PIECE_BYTES = 1 << 16
"""What is sent at a time of a whole answer; the client has to read before there is more."""

_RETURNED_HEADERS = (b"content-type", b"retry-after", b"x-request-id")
_LOST = "rank_lost"

Send = Callable[[dict[str, object]], Awaitable[None]]
"""ASGI's send."""


@dataclass(frozen=True)
class Job:
    """A request that has been checked.

    Attributes:
        path: where it goes on the rank.
        body: as the client sent it.
        headers: what the rank gets besides its own.
        arrived_s: when it came, in monotonic time.
    """

    path: str
    body: bytes
    headers: Mapping[str, str]
    cost: Cost
    deadline: Deadline
    arrived_s: float


class _RankLost(Exception):
    """A rank ended before it had produced anything: another one can do the work.

    Attributes:
        was_given: whether the rank had the request; if not, the request has no part in the loss.
    """

    def __init__(self, message: str, *, was_given: bool = True) -> None:
        super().__init__(message)
        self.was_given = was_given


class Forwarder:
    """Answers requests by way of the ranks.

    Args:
        max_attempts: ranks that a request may have lost before it is given up.
        max_answer_bytes: of whole answers that are held at a time.
    """

    def __init__(
        self,
        balancer: Balancer,
        metrics: RouterMetrics,
        *,
        max_attempts: int,
        max_answer_bytes: int,
    ) -> None:
        self._balancer = balancer
        self._metrics = metrics
        self._max_attempts = max_attempts
        self._room = ByteRoom(max_answer_bytes, "Answers that are being sent take all room")

    async def answer(self, job: Job, send: Send, outlet: Outlet) -> int:
        """Have ``job`` done and send the answer to the client; returns the status sent.

        A rank that dies before the first token counts as an attempt; one that refuses the request does not,
        but when all have refused it, so does this.

        A stream that breaks off after its first token ends with an error event and without ``[DONE]``.

        Raises:
            ApiError: there is no answer, and nothing has been sent yet.
        """
        losses: list[str] = []
        refusals = Refusals()
        avoid: set[int] = set()
        has_been_given = False
        while len(losses) < self._max_attempts:
            lease = await self._balancer.acquire(
                job.cost, deadline=job.deadline, avoid=avoid, is_retry=bool(avoid)
            )
            if has_been_given:
                self._metrics.retries.inc()
            timer = asyncio.get_running_loop().call_at(
                job.deadline.at_s, lease.cut, job.deadline.error()
            )
            try:
                answer = await self._first_bytes(lease, job)
                with closing(answer):
                    self._metrics.first_byte_s.observe(time.monotonic() - job.arrived_s)
                    return await self._pass_on(answer, lease, send, outlet)
            except RankRefused as refusal:
                self._balancer.pause(lease)
                refusals.add(lease.rank.rank, refusal)
                if (error := refusals.verdict(self._balancer.ready_ranks())) is not None:
                    raise error from None
                has_been_given = True
            except _RankLost as loss:
                # Its end may not be known yet, and it would be given the next request as well.
                self._balancer.pause(lease)
                if loss.was_given:
                    losses.append(f"rank {lease.rank.rank} {loss}")
                    has_been_given = True
                    log.info("a request lost its rank: %s", losses[-1])
            finally:
                timer.cancel()
                lease.release()
            avoid.add(lease.rank.rank)
        raise unavailable(
            f"No rank could answer: {'; '.join(losses)}", _LOST, retry_after_s=_LOST_RETRY_S
        )

    async def _first_bytes(self, lease: Lease, job: Job) -> Answer:
        """Put ``job`` to the rank; wait for the whole answer, or for a stream's first event.

        Raises:
            RankRefused: the rank did not begin.
            _RankLost: the rank ended before that.
            ApiError: the request was cut off for a reason of the router's own, or there is no room for
                the answer.
        """
        left_s = max(job.deadline.left_s, _LEAST_TIMEOUT_S)
        headers = {**job.headers, "X-DWDP-Timeout-S": f"{left_s:.3f}"}
        answer = Answer(lease.link.post(job.path, job.body, headers), self._room)
        lease.on_cut(answer.close)
        try:
            await answer.begin()
            _check(answer)
        except BaseException as error:
            answer.close()
            if isinstance(error, LINK_ERRORS):
                raise _reason_of_loss(lease, error) from None
            raise
        lease.note_first_token()
        return answer

    async def _pass_on(self, answer: Answer, lease: Lease, send: Send, outlet: Outlet) -> int:
        response = answer.response
        headers = [
            (name, response.headers[name]) for name in _RETURNED_HEADERS if name in response.headers
        ]
        if answer.is_stream:
            headers += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
            outlet.begin()
        else:
            headers.append((b"content-length", str(len(answer.data)).encode()))
            lease.release()  # the rank is done, however long the client takes to read
        start = {"type": "http.response.start", "status": response.status, "headers": headers}
        await send(start)
        if answer.is_stream:
            await self._pass_on_stream(answer, lease, send, outlet)
        else:
            await _send_whole(answer.data, send)
        return response.status

    async def _pass_on_stream(
        self, answer: Answer, lease: Lease, send: Send, outlet: Outlet
    ) -> None:
        """The body of a stream. Memory is bounded: what the client does not read is not read here."""

        def end_on_rank() -> None:
            answer.close()
            lease.release()  # the client may be slow to read the rest

        lease.on_cut(end_on_rank)
        outlet.write(answer.data)
        try:
            await answer.response.pipe(outlet.write, outlet.drain)
        except LINK_ERRORS as error:
            self._end_cut_stream(lease, error, outlet)
        await send({"type": "http.response.body", "body": b""})

    def _end_cut_stream(self, lease: Lease, error: Exception, outlet: Outlet) -> None:
        self._metrics.cut_streams.inc()
        reason = lease.cut_reason or unavailable(
            f"rank {lease.rank.rank} was lost in the midst of this answer; ask again",
            _LOST,
            retry_after_s=_LOST_RETRY_S,
        )
        log.warning("a stream ends early: %s (%s)", reason.message, type(error).__name__)
        # A blank line first: the rank may have left an event half written.
        outlet.write(b"\n\n" + error_event(reason))


def _reason_of_loss(lease: Lease, error: Exception) -> ApiError | _RankLost:
    """Why there is no answer: the request was cut off here, or the rank is gone."""
    if lease.cut_reason is not None:
        if lease.cut_reason.code == _LOST:
            return _RankLost("did not answer")
        return lease.cut_reason.with_traceback(None)
    if isinstance(error, RankUnreachable):
        return _RankLost("cannot be reached", was_given=False)
    return _RankLost(f"was lost ({type(error).__name__})")


def _check(answer: Answer) -> None:
    """Raises RankRefused or _RankLost when it is none that the client should get."""
    status = answer.response.status
    if answer.is_stream:
        if not answer.data:
            raise _RankLost("ended its stream before the first event")
    elif has_failed(status, answer.data):
        raise _RankLost("failed")
    elif status in REFUSAL_STATUSES:
        retry_after = answer.response.headers.get(b"retry-after")
        raise RankRefused(status, retry_after.decode("latin-1") if retry_after else None)


async def _send_whole(data: bytes, send: Send) -> None:
    """Send the body of an answer, piece by piece if it is long: as fast as the client reads."""
    rest = memoryview(data)
    while len(rest) > _PIECE_BYTES:
        await send({"type": "http.response.body", "body": rest[:_PIECE_BYTES], "more_body": True})
        rest = rest[_PIECE_BYTES:]
    await send({"type": "http.response.body", "body": rest})
