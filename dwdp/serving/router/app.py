"""The router's paths."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing, suppress
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dwdp.serving.openai.errors import (
    ApiError,
    internal,
    method_not_allowed,
    model_not_found,
    not_found,
)
from dwdp.serving.openai.relayed import RelayedChatCompletionRequest, RelayedCompletionRequest
from dwdp.serving.openai.requests import ChatCompletionRequest, CompletionRequest, parse
from dwdp.serving.openai.responses import Model, ModelList
from dwdp.serving.page.assets import page_response
from dwdp.serving.router.balancer import Balancer
from dwdp.serving.router.body import BodyReader, ClientGone, Receive
from dwdp.serving.router.cost import (
    CheckedRequest,
    Cost,
    RelayedRequest,
    check_length,
    estimate_cost,
)
from dwdp.serving.router.forwarder import Forwarder, Job, Send
from dwdp.serving.router.interruption import Interruption
from dwdp.serving.router.keys import ApiKeys
from dwdp.serving.router.lease import Deadline
from dwdp.serving.router.metrics import CONTENT_TYPE, RouterMetrics
from dwdp.serving.router.openapi import openapi_document
from dwdp.serving.router.outlet import Outlet
from dwdp.serving.router.settings import RouterSettings
from dwdp.serving.router.snapshot import SnapshotFeed, health, snapshot
from dwdp.serving.supervisor.ranks import RankState, RankTable

log = logging.getLogger(__name__)

PAGE_INTERVAL_S = 1.0
MAX_WATCHERS = 64
"""Pages that are kept up to date at the same time."""

_CLIENT_GONE_STATUS = 499
_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_OPEN_PATHS = frozenset({"/", "/health", "/health/live", "/health/ready"})
_COMPLETIONS = "/v1/completions"
_CHAT_COMPLETIONS = "/v1/chat/completions"
_CLOSING_STATUSES = frozenset({408, 413})

Scope = dict[str, Any]
ParseBody = Callable[[bytes], CheckedRequest | RelayedRequest]


class Router:
    """The ASGI application. Made inside the event loop that runs it.

    Args:
        table: the ranks, kept up to date by the supervisor.
        model: what requests call the model.
        relays: whether ranks check requests themselves, the model's name included; see
            :mod:`dwdp.serving.openai.relayed`.
    """

    def __init__(
        self,
        table: RankTable,
        model: str,
        settings: RouterSettings,
        keys: ApiKeys,
        *,
        relays: bool = False,
    ) -> None:
        self.balancer = Balancer(table, max_queued=settings.max_queued)
        self.metrics = RouterMetrics(table, self.balancer)
        self._table = table
        self._model = Model(id=model, created=int(time.time()))
        self._settings = settings
        self._keys = keys
        self._forwarder = Forwarder(
            self.balancer,
            self.metrics,
            max_attempts=settings.max_attempts,
            max_answer_bytes=settings.max_buffered_bytes,
        )
        self._bodies = BodyReader(
            settings.max_body_bytes, settings.max_buffered_bytes, settings.body_timeout_s
        )
        completion: type[CompletionRequest | RelayedCompletionRequest] = CompletionRequest
        chat: type[ChatCompletionRequest | RelayedChatCompletionRequest] = ChatCompletionRequest
        if relays:
            completion, chat = RelayedCompletionRequest, RelayedChatCompletionRequest
        self._openapi = openapi_document(
            None if relays else model, completion, chat, needs_key=keys.is_required
        )
        self._feed = SnapshotFeed(
            lambda: snapshot(table, self.balancer, model), max_age_s=PAGE_INTERVAL_S
        )
        self._num_watchers = 0
        self._ended = asyncio.Event()
        self._generators = {
            _COMPLETIONS: _Endpoint(partial(self.generate, partial(parse, completion))),
            _CHAT_COMPLETIONS: _Endpoint(partial(self.generate, partial(parse, chat))),
        }
        self._app = Starlette(
            routes=[
                Route("/", self._page),
                Route("/page/events", _Endpoint(self.watch), methods=["GET"]),
                Route("/health", self._health),
                Route("/health/live", self._live),
                Route("/health/ready", self._ready),
                Route("/metrics", self._metrics),
                Route("/openapi.json", self._document),
                Route("/v1/models", self._models),
                Route("/v1/models/{model:path}", self._one_model),
                *(
                    Route(path, endpoint, methods=["POST"])
                    for path, endpoint in self._generators.items()
                ),
            ],
            exception_handlers={
                ApiError: _describe_api_error,
                HTTPException: _describe_http_error,
                Exception: _describe_failure,
            },
        )
        self._app.router.redirect_slashes = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, arrived_s = scope["path"], time.monotonic()
        try:
            if path not in _OPEN_PATHS:
                self._keys.check(_headers(scope).get(b"authorization"))
            if scope["method"] == "POST" and path in self._generators:
                await self._generators[path](scope, receive, send)  # the rest is layers around it
            else:
                await self._app(scope, receive, send)  # type: ignore[arg-type]
        except ApiError as error:
            if path in (_COMPLETIONS, _CHAT_COMPLETIONS):
                self._count(path, error.status, arrived_s)
            await send_error(error, send)
        except Exception:
            log.exception("a request to %s failed", path)
            with suppress(RuntimeError):  # an answer has begun already
                await send_error(internal(), send)

    @property
    def is_ready(self) -> bool:
        """Whether a request would find a rank now."""
        return self.balancer.is_open and any(
            rank.state is RankState.READY for rank in self._table.ranks
        )

    def drain(self, reason: ApiError) -> None:
        """Take no more requests for text, and end the pages' streams, which never end by themselves."""
        self.balancer.close(reason)
        self._ended.set()

    def end(self, reason: ApiError) -> None:
        """Answer ``reason`` to whatever arrives, waits or runs."""
        self.drain(reason)
        self._bodies.end(reason)
        self.balancer.cut_all(reason)

    async def generate(
        self,
        parse_body: ParseBody,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Answer one request for text."""
        arrived_s = time.monotonic()
        path, status = scope["path"], 500
        settings = self._settings
        deadline = Deadline.after(settings.request_timeout_s)
        try:
            headers = _headers(scope)
            with closing(self._bodies.new_share()) as share:
                body = await self._bodies.read(headers, receive, share)
                job = Job(
                    path=path,
                    body=body,
                    headers=_rank_headers(headers),
                    cost=self._cost(parse_body(body)),
                    deadline=deadline,
                    arrived_s=arrived_s,
                )
                work = self._forwarder.answer(job, send, Outlet.of(scope))
                status = await _unless_gone(
                    work, receive, deadline.left_s + settings.write_timeout_s
                )
        except ApiError as error:
            status = error.status
            raise
        except ClientGone:
            status = _CLIENT_GONE_STATUS
            raise
        except _TooSlow:
            status = _CLIENT_GONE_STATUS
            self.metrics.refused_connections.labels("client reads too slowly").inc()
        finally:
            self._count(path, status, arrived_s)

    async def watch(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send what the page shows, every second until the client leaves."""
        if self._num_watchers >= MAX_WATCHERS:
            raise ApiError(429, f"{MAX_WATCHERS} pages are open already", retry_after_s=30.0)
        response = Response(media_type="text/event-stream")
        if scope["method"] == "GET":  # HEAD has no body to wait for
            response = StreamingResponse(self._snapshots(), media_type="text/event-stream")
        self._num_watchers += 1
        self._table.is_watched = True
        try:
            await response(scope, receive, send)  # type: ignore[arg-type]
        finally:
            self._num_watchers -= 1
            self._table.is_watched = self._num_watchers > 0

    def _count(self, path: str, status: int, arrived_s: float) -> None:
        """Note that a request for text has ended."""
        self.metrics.requests.labels(path, status).inc()
        self.metrics.duration_s.observe(time.monotonic() - arrived_s)

    def _cost(self, request: CheckedRequest | RelayedRequest) -> Cost:
        """What ``request`` costs, if a rank can take it; one that is relayed is the ranks' to check.

        Raises:
            ApiError: 404, another model; 400, too long for every rank.
        """
        if isinstance(request, CompletionRequest | ChatCompletionRequest):
            if request.model != self._model.id:
                raise model_not_found(request.model, self._model.id)
            check_length(request, self._table.widest_limits().max_sequence_length)
        return estimate_cost(request)

    async def _page(self, request: Request) -> Response:
        return page_response()

    async def _snapshots(self) -> AsyncIterator[bytes]:
        event = self._feed.fresh()
        while not self._ended.is_set():
            yield event
            try:
                await asyncio.wait_for(self._ended.wait(), PAGE_INTERVAL_S)
            except asyncio.TimeoutError:
                event = self._feed.latest()

    async def _health(self, request: Request) -> Response:
        is_ready = self.is_ready
        return JSONResponse(
            health(self._table, is_ready=is_ready), status_code=200 if is_ready else 503
        )

    async def _live(self, request: Request) -> Response:
        return JSONResponse({"status": "live"})

    async def _ready(self, request: Request) -> Response:
        if self.is_ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "unavailable"}, status_code=503)

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    async def _document(self, request: Request) -> Response:
        return JSONResponse(self._openapi)

    async def _models(self, request: Request) -> Response:
        return JSONResponse(ModelList(data=(self._model,)).model_dump())

    async def _one_model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name != self._model.id:
            raise model_not_found(name, self._model.id)
        return JSONResponse(self._model.model_dump())


class _Endpoint:
    """A path that writes its own response, as an ASGI application."""

    def __init__(self, answer: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._answer(scope, receive, send)
        except ApiError as error:
            await send_error(error, send)
        except ClientGone:
            return


async def send_error(error: ApiError, send: Send) -> None:
    """``error`` as a whole response."""
    body = json.dumps(error.body()).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *((name.lower().encode(), value.encode()) for name, value in error.headers().items()),
    ]
    if error.status in _CLOSING_STATUSES:
        headers.append((b"connection", b"close"))
    start = {"type": "http.response.start", "status": error.status, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": body})


async def _describe_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())


async def _describe_failure(request: Request, error: Exception) -> Response:
    return await _describe_api_error(request, internal())


async def _describe_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own errors (no such path, no such method) in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 404:
        described = not_found(path)
    elif error.status_code == 405:
        described = method_not_allowed(request.method, path)
    else:
        described = ApiError(error.status_code, error.detail)
    response = await _describe_api_error(request, described)
    response.headers.update(error.headers or {})
    return response


class _TooSlow(Exception):
    """A client reads its answer, but will not have done so in time."""


async def _unless_gone(work: Awaitable[int], receive: Receive, timeout_s: float) -> int:
    """The result of ``work``, which is cancelled when the client goes away or ``timeout_s`` are over.

    Raises:
        ClientGone: it has.
        _TooSlow: they are.
    """
    with Interruption() as waiting:
        gone = asyncio.ensure_future(_disconnected(receive))
        gone.add_done_callback(lambda _: waiting.interrupt(ClientGone()))
        timer = asyncio.get_running_loop().call_later(timeout_s, waiting.interrupt, _TooSlow())
        try:
            return await work
        finally:
            timer.cancel()
            gone.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _headers(scope: Scope) -> dict[bytes, bytes]:
    return dict(scope["headers"])


def _rank_headers(headers: dict[bytes, bytes]) -> dict[str, str]:
    """What a rank is told besides its own headers and the body."""
    return {"Content-Type": "application/json", "X-Request-Id": _request_id(headers)}


def _request_id(headers: dict[bytes, bytes]) -> str:
    """The client's own id if it is a fit one, so that logs can be joined."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)
