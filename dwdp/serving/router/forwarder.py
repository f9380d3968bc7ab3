"""Carries one request to a rank and the answer back; to another rank if the first one dies too early."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import aiohttp

from dwdp.serving.openai.errors import unavailable
from dwdp.serving.openai.streaming import CONTENT_TYPE, error_event
from dwdp.serving.router.balancer import Balancer, Cost, Deadline, Lease
from dwdp.serving.router.metrics import RouterMetrics
from dwdp.serving.supervisor.link import LINK_ERRORS

log = logging.getLogger(__name__)

_RETRYABLE_STATUSES = frozenset({429, 503})
_LOST_RETRY_S = 1.0
_RETURNED_HEADERS = ("content-type", "retry-after", "x-request-id")
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
    """

    path: str
    body: bytes
    headers: Mapping[str, str]
    cost: Cost
    deadline: Deadline


@dataclass(frozen=True)
class _Answer:
    """What a rank has said so far: all of it, or the first bytes of a stream that goes on."""

    response: aiohttp.ClientResponse
    data: bytes


class _RankLost(Exception):
    """A rank ended, or refused, before it had produced anything: another one can do the work.

    Attributes:
        was_given: whether the rank had the request; if not, the request has no part in the loss.
    """

    def __init__(self, message: str, *, was_given: bool = True) -> None:
        super().__init__(message)
        self.was_given = was_given


class Forwarder:
    """Answers requests by way of the ranks."""

    def __init__(self, balancer: Balancer, metrics: RouterMetrics, *, max_attempts: int) -> None:
        self._balancer = balancer
        self._metrics = metrics
        self._max_attempts = max_attempts

    async def answer(self, job: Job, send: Send) -> int:
        """Have ``job`` done and send the answer to the client; returns the status sent.

        A stream that breaks off after its first token ends with an error event and without ``[DONE]``.

        Raises:
            ApiError: there is no answer, and nothing has been sent yet.
        """
        arrived_s = time.monotonic()
        losses: list[str] = []
        avoid: set[int] = set()
        is_retry = False
        while len(losses) < self._max_attempts:
            lease = await self._balancer.acquire(
                job.cost, deadline=job.deadline, avoid=avoid, is_retry=is_retry
            )
            timer = asyncio.get_running_loop().call_at(
                job.deadline.at_s, lease.cut, job.deadline.error()
            )
            try:
                answer = await self._first_bytes(lease, job)
                self._metrics.first_byte_s.observe(time.monotonic() - arrived_s)
                return await self._pass_on(answer, lease, job, send)
            except _RankLost as loss:
                # Its end may not be known yet, and it would be given the next request as well.
                lease.pause_rank()
                is_retry = True
                avoid.add(lease.rank.rank)
                if loss.was_given:
                    losses.append(f"rank {lease.rank.rank} {loss}")
                    self._metrics.retries.inc()
                    log.info("a request is put to another rank: %s", losses[-1])
            finally:
                timer.cancel()
                lease.release()
        raise unavailable(
            f"No rank could answer: {'; '.join(losses)}", _LOST, retry_after_s=_LOST_RETRY_S
        )

    async def _first_bytes(self, lease: Lease, job: Job) -> _Answer:
        """Wait for the whole answer, or for a stream's first event.

        Raises:
            _RankLost: the rank ended, or refused, before that.
            ApiError: the request was cut off for a reason of the router's own.
        """
        attempt = asyncio.ensure_future(self._open(lease, job))
        lease.on_cut(attempt.cancel)
        try:
            await asyncio.wait({attempt})
        except asyncio.CancelledError:
            attempt.cancel()
            attempt.add_done_callback(_discard)
            raise
        if attempt.cancelled():
            assert lease.cut_reason is not None
            if lease.cut_reason.code == _LOST:
                raise _RankLost("did not answer")
            raise lease.cut_reason
        answer = attempt.result()
        lease.note_first_token()
        return answer

    async def _open(self, lease: Lease, job: Job) -> _Answer:
        headers = {**job.headers, "X-DWDP-Timeout-S": f"{job.deadline.left_s:.3f}"}
        try:
            response = await lease.link.post(job.path, job.body, headers)
        except aiohttp.ClientConnectorError as error:
            raise _RankLost("cannot be reached", was_given=False) from error
        except LINK_ERRORS as error:
            raise _RankLost(f"was lost ({type(error).__name__})") from error
        try:
            if response.status in _RETRYABLE_STATUSES:
                raise _RankLost(f"refused with status {response.status}")
            if _is_stream(response):
                data = await response.content.readany()
                if not data:
                    raise _RankLost("ended its stream before the first event")
            else:
                data = await response.read()
        except LINK_ERRORS as error:
            raise _RankLost(f"was lost ({type(error).__name__})") from error
        except BaseException:
            response.close()
            raise
        return _Answer(response, data)

    async def _pass_on(self, answer: _Answer, lease: Lease, job: Job, send: Send) -> int:
        response = answer.response
        headers = [
            (name.encode(), response.headers[name].encode("latin-1"))
            for name in _RETURNED_HEADERS
            if name in response.headers
        ]
        streams = _is_stream(response)
        if streams:
            headers += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        else:
            headers.append((b"content-length", str(len(answer.data)).encode()))
        start = {"type": "http.response.start", "status": response.status, "headers": headers}
        await send(start)
        if streams:
            await self._pass_on_stream(answer, lease, send)
        else:
            await send({"type": "http.response.body", "body": answer.data})
        return response.status

    async def _pass_on_stream(self, answer: _Answer, lease: Lease, send: Send) -> None:
        """The rest of a stream. Memory is bounded: what the client does not read is not read here."""
        content, data = answer.response.content, answer.data
        lease.on_cut(answer.response.close)
        try:
            while data:
                await send({"type": "http.response.body", "body": data, "more_body": True})
                data = await content.readany()
        except LINK_ERRORS as error:
            await self._end_cut_stream(lease, error, send)
            return
        finally:
            # One that was read to its end has given its connection back, and is not closed by this.
            answer.response.close()
        await send({"type": "http.response.body", "body": b""})

    async def _end_cut_stream(self, lease: Lease, error: Exception, send: Send) -> None:
        self._metrics.cut_streams.inc()
        reason = lease.cut_reason or unavailable(
            f"rank {lease.rank.rank} was lost in the midst of this answer; ask again",
            _LOST,
            retry_after_s=_LOST_RETRY_S,
        )
        log.warning("a stream ends early: %s (%s)", reason.message, type(error).__name__)
        # A blank line first: the rank may have left an event half written.
        event = b"\n\n" + error_event(reason)
        await send({"type": "http.response.body", "body": event})


def _is_stream(response: aiohttp.ClientResponse) -> bool:
    return response.content_type == CONTENT_TYPE


def _discard(attempt: asyncio.Task[_Answer]) -> None:
    """Close what came for a client that has left."""
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().response.close()
