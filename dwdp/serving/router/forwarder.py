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
from dwdp.serving.router.balancer import Balancer
from dwdp.serving.router.cost import Cost
from dwdp.serving.router.lease import Deadline, Lease
from dwdp.serving.router.metrics import RouterMetrics
from dwdp.serving.router.refusals import REFUSAL_STATUSES, RankRefused, Refusals, has_failed
from dwdp.serving.supervisor.link import LINK_ERRORS

log = logging.getLogger(__name__)

_LOST_RETRY_S = 1.0
_LEAST_TIMEOUT_S = 0.001
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
    """A rank ended before it had produced anything: another one can do the work.

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

        A rank that dies before the first token counts as an attempt; one that refuses the request does not,
        but when all have refused it, so does this.

        A stream that breaks off after its first token ends with an error event and without ``[DONE]``.

        Raises:
            ApiError: there is no answer, and nothing has been sent yet.
        """
        arrived_s = time.monotonic()
        losses: list[str] = []
        refusals = Refusals()
        avoid: set[int] = set()
        while len(losses) < self._max_attempts:
            lease = await self._balancer.acquire(
                job.cost, deadline=job.deadline, avoid=avoid, is_retry=bool(avoid)
            )
            timer = asyncio.get_running_loop().call_at(
                job.deadline.at_s, lease.cut, job.deadline.error()
            )
            try:
                answer = await self._first_bytes(lease, job)
                self._metrics.first_byte_s.observe(time.monotonic() - arrived_s)
                return await self._pass_on(answer, lease, send)
            except RankRefused as refusal:
                self._balancer.pause(lease)
                refusals.add(lease.rank.rank, refusal)
                if (error := refusals.verdict(self._balancer.ready_ranks())) is not None:
                    raise error from None
                self._metrics.retries.inc()
            except _RankLost as loss:
                # Its end may not be known yet, and it would be given the next request as well.
                self._balancer.pause(lease)
                if loss.was_given:
                    losses.append(f"rank {lease.rank.rank} {loss}")
                    self._metrics.retries.inc()
                    log.info("a request is put to another rank: %s", losses[-1])
            finally:
                timer.cancel()
                lease.release()
            avoid.add(lease.rank.rank)
        raise unavailable(
            f"No rank could answer: {'; '.join(losses)}", _LOST, retry_after_s=_LOST_RETRY_S
        )

    async def _first_bytes(self, lease: Lease, job: Job) -> _Answer:
        """Wait for the whole answer, or for a stream's first event.

        Raises:
            RankRefused: the rank did not begin.
            _RankLost: the rank ended before that.
            ApiError: the request was cut off for a reason of the router's own.
        """
        attempt = asyncio.ensure_future(_open(lease, job))
        lease.on_cut(attempt.cancel)
        try:
            await asyncio.wait({attempt})
        except asyncio.CancelledError:
            attempt.cancel()
            attempt.add_done_callback(_discard)
            raise
        if attempt.cancelled():
            if lease.cut_reason is None or lease.cut_reason.code == _LOST:
                raise _RankLost("did not answer")
            raise lease.cut_reason.with_traceback(None)
        answer = attempt.result()
        lease.note_first_token()
        return answer

    async def _pass_on(self, answer: _Answer, lease: Lease, send: Send) -> int:
        response = answer.response
        headers = [
            (name.encode(), response.headers[name].encode("utf-8", "surrogateescape"))
            for name in _RETURNED_HEADERS
            if name in response.headers
        ]
        streams = _is_stream(response)
        if streams:
            headers += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        else:
            headers.append((b"content-length", str(len(answer.data)).encode()))
        start = {"type": "http.response.start", "status": response.status, "headers": headers}
        try:
            await send(start)
            if streams:
                await self._pass_on_stream(answer, lease, send)
            else:
                await send({"type": "http.response.body", "body": answer.data})
        finally:
            # One that was read to its end has given its connection back, and is not closed by this.
            response.close()
        return response.status

    async def _pass_on_stream(self, answer: _Answer, lease: Lease, send: Send) -> None:
        """The rest of a stream. Memory is bounded: what the client does not read is not read here."""
        content, data = answer.response.content, answer.data
        lease.on_cut(answer.response.close)
        while data:
            await send({"type": "http.response.body", "body": data, "more_body": True})
            try:
                data = await content.readany()
            except LINK_ERRORS as error:
                await self._end_cut_stream(lease, error, send)
                return
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


async def _open(lease: Lease, job: Job) -> _Answer:
    """Put ``job`` to the rank, and wait for the first bytes of an answer.

    Raises:
        RankRefused, _RankLost: see :meth:`Forwarder._first_bytes`.
    """
    left_s = max(job.deadline.left_s, _LEAST_TIMEOUT_S)
    try:
        response = await lease.link.post(
            job.path, job.body, {**job.headers, "X-DWDP-Timeout-S": f"{left_s:.3f}"}
        )
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        raise _RankLost("cannot be reached", was_given=False) from error
    except LINK_ERRORS as error:
        raise _RankLost(f"was lost ({type(error).__name__})") from error
    try:
        return _Answer(response, await _first_data(response))
    except LINK_ERRORS as error:
        response.close()
        raise _RankLost(f"was lost ({type(error).__name__})") from error
    except BaseException:
        response.close()
        raise


async def _first_data(response: aiohttp.ClientResponse) -> bytes:
    if _is_stream(response):
        data = await response.content.readany()
        if not data:
            raise _RankLost("ended its stream before the first event")
        return data
    data = await response.read()
    if has_failed(response.status, data):
        raise _RankLost("failed")
    if response.status in REFUSAL_STATUSES:
        raise RankRefused(response.status, response.headers.get("Retry-After"))
    return data


def _is_stream(response: aiohttp.ClientResponse) -> bool:
    return response.content_type == CONTENT_TYPE


def _discard(attempt: asyncio.Task[_Answer]) -> None:
    """Close what came for a client that has left."""
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().response.close()
