"""The rank's HTTP application: OpenAI's paths, health, statistics."""

from __future__ import annotations

import asyncio
import hmac
import math
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from dwdp.serving.openai.errors import (
    ApiError,
    invalid,
    method_not_allowed,
    model_not_found,
    not_found,
    unauthorized,
)
from dwdp.serving.openai.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    parse,
)
from dwdp.serving.openai.responses import Model, ModelList, Usage
from dwdp.serving.openai.streaming import DONE, event
from dwdp.serving.rank_server.detokenizer import TokenTexts
from dwdp.serving.rank_server.engine import Engine
from dwdp.serving.rank_server.job import REQUEST_ID_HEADER, TIMEOUT_HEADER
from dwdp.serving.rank_server.logprobs import TokenJson
from dwdp.serving.rank_server.preparation import Preparation, Preparer
from dwdp.serving.rank_server.rendering import ChatRenderer, CompletionRenderer, Renderer
from dwdp.serving.rank_server.respond import ClientGone, Receive, Responder, Scope, Send, read_body
from dwdp.serving.rank_server.stats import Statistics
from dwdp.serving.supervisor.interface import TIMELINE_QUERY

_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_LONGEST_TIMEOUT_S = 86_400.0

_Handler = Callable[["_Call"], Awaitable[None]]


class RankApplication:
    """An ASGI application over one engine.

    Args:
        model_name: what requests call the model.
        token: what requests have to bring; empty: nothing.
    """

    def __init__(
        self,
        model_name: str,
        token: str,
        engine: Engine,
        preparer: Preparer,
        texts: TokenTexts,
        statistics: Statistics,
    ) -> None:
        self._model = Model(id=model_name, created=int(time.time()))
        self._authorization = f"Bearer {token}".encode() if token else None
        self._engine = engine
        self._preparer = preparer
        self._tokens = TokenJson(texts)
        self._statistics = statistics
        self._routes: dict[str, tuple[str, _Handler]] = {
            "/health/live": ("GET", self._live),
            "/health/ready": ("GET", self._ready),
            "/internal/stats": ("GET", self._stats),
            "/v1/models": ("GET", self._models),
            f"/v1/models/{model_name}": ("GET", self._one_model),
            "/v1/completions": ("POST", self._completions),
            "/v1/chat/completions": ("POST", self._chat_completions),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entry point."""
        if scope["type"] != "http":
            return
        call = _Call(scope, receive, send)
        try:
            await self._route(call)
        except ApiError as error:
            await call.responder.send_error(error)
        except ClientGone:
            return

    async def _route(self, call: _Call) -> None:
        path, method = call.path, call.method
        if not path.startswith("/health/"):
            self._check_token(call)
        if path not in self._routes:
            name = path.removeprefix("/v1/models/")
            raise model_not_found(name, self._model.id) if name != path else not_found(path)
        wanted, handler = self._routes[path]
        if method != wanted:
            raise method_not_allowed(method, path)
        await handler(call)

    def _check_token(self, call: _Call) -> None:
        if self._authorization is None:
            return
        given = call.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, self._authorization):
            raise unauthorized("The request's Authorization header does not have this rank's token")

    async def _live(self, call: _Call) -> None:
        is_live = self._engine.state != "failed"
        await call.responder.send_json(
            {"status": "live" if is_live else "failed"}, 200 if is_live else 503
        )

    async def _ready(self, call: _Call) -> None:
        state = self._engine.state
        await call.responder.send_json({"status": state}, 200 if state == "ready" else 503)

    async def _stats(self, call: _Call) -> None:
        with_timeline = call.query == TIMELINE_QUERY
        await call.responder.send_json(self._statistics.snapshot(with_timeline=with_timeline))

    async def _models(self, call: _Call) -> None:
        await call.responder.send_json(ModelList(data=(self._model,)).model_dump())

    async def _one_model(self, call: _Call) -> None:
        await call.responder.send_json(self._model.model_dump())

    async def _completions(self, call: _Call) -> None:
        timeout_s = call.timeout_s()
        request = parse(CompletionRequest, await read_body(call.receive))
        self._check_model(request)
        renderer = CompletionRenderer(
            f"cmpl-{call.request_id}", self._model.id, self._tokens, request.num_logprobs
        )
        await call.responder.send_work(
            self._answer(request, lambda: self._preparer.completion(request), renderer),
            is_stream=bool(request.stream),
            timeout_s=timeout_s,
        )

    async def _chat_completions(self, call: _Call) -> None:
        timeout_s = call.timeout_s()
        request = parse(ChatCompletionRequest, await read_body(call.receive))
        self._check_model(request)
        renderer = ChatRenderer(
            f"chatcmpl-{call.request_id}", self._model.id, self._tokens, request.num_logprobs
        )
        await call.responder.send_work(
            self._answer(request, lambda: self._preparer.chat(request), renderer),
            is_stream=bool(request.stream),
            timeout_s=timeout_s,
        )

    def _check_model(self, request: GenerationRequest) -> None:
        if request.model != self._model.id:
            raise model_not_found(request.model, self._model.id)
        self._engine.check_open()

    async def _answer(
        self,
        request: GenerationRequest,
        prepare: Callable[[], Awaitable[Preparation]],
        renderer: Renderer,
    ) -> AsyncGenerator[bytes, None]:
        """Events of a stream, or pieces of the one document that is the whole answer."""
        preparation = await prepare()
        num_tokens = 0
        with self._engine.submit(preparation.answers) as generation:
            async for delta in generation:
                num_tokens += delta.num_tokens
                if request.stream:
                    for chunk in renderer.chunks(delta):
                        yield event(chunk)
                else:
                    renderer.add(delta)
                if delta.tokens:
                    await asyncio.sleep(0)  # log-probabilities take a while: others have their turn
        usage = Usage.of(preparation.num_prompt_tokens, num_tokens)
        if not request.stream:
            for piece in renderer.pieces(usage):
                yield piece
                await asyncio.sleep(0)
            return
        if request.includes_usage:
            yield event(renderer.usage_chunk(usage))
        yield DONE


class _Call:
    """One HTTP request."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.path: str = scope["path"]
        self.method: str = scope["method"]
        self.query: str = scope.get("query_string", b"").decode("latin-1")
        self.headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        self.receive = receive
        given = self.headers.get(REQUEST_ID_HEADER.lower(), "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.responder = Responder(receive, send, {REQUEST_ID_HEADER: self.request_id})

    def timeout_s(self) -> float | None:
        """Seconds that the work may take.

        Raises:
            ApiError: 400, the header is no positive number.
        """
        text: Any = self.headers.get(TIMEOUT_HEADER.lower())
        if text is None:
            return None
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds <= _LONGEST_TIMEOUT_S:
            raise invalid(
                f"{TIMEOUT_HEADER} is {text!r}; it takes a number of seconds above 0, at most "
                f"{_LONGEST_TIMEOUT_S:g}"
            )
        return seconds
