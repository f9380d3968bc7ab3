"""A rank process without a model: it keeps the rules of ``supervisor/interface.py`` and counts words.

Its one line of standard input is JSON: ``socket``, ``token``, ``rank``, ``parent_pid``, ``max_running``,
``limits`` (what it says of its limits besides) and ``exit_with`` (an exit code: fail at once with it). A
prompt may hold directives, ``"first=0.5 each=0.1"``: seconds before the first word and between words.
``die=3`` kills the process after three words, ``status=503 retry=7`` is answered with that status and
``Retry-After``, ``only=1`` limits that to rank 1, and ``failed=1`` makes it the answer of an engine that
broke down.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from typing import Any

from aiohttp import web

from dwdp.serving.lifetime import end_with_parent


def directives(prompt: str) -> dict[str, float]:
    pairs = (word.split("=") for word in prompt.split() if "=" in word)
    return {name: float(value) for name, value in pairs}


class StandInRank:
    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.counts = {"running": 0, "waiting": 0, "finished": 0, "cancelled": 0}
        self.words = 0
        self.is_draining = False
        self.room = asyncio.Semaphore(job["max_running"])

    def authorize(self, request: web.Request) -> None:
        if request.headers.get("Authorization") != f"Bearer {self.job['token']}":
            raise web.HTTPUnauthorized

    async def live(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "live"})

    async def ready(self, request: web.Request) -> web.Response:
        status = 503 if self.is_draining else 200
        return web.json_response({"status": "ready"}, status=status)

    async def stats(self, request: web.Request) -> web.Response:
        self.authorize(request)
        now_s = asyncio.get_running_loop().time()
        lanes = [
            {"name": "compute", "spans": [[now_s - 2, now_s - 1, "forward"]]},
            {"name": "fetch 0", "spans": [[now_s - 1.5, now_s - 0.5, "layer 1"]]},
        ]
        timeline = {"timeline": {"now_s": now_s, "lanes": lanes}}
        return web.json_response(
            {
                "requests": self.counts,
                "tokens": {"prompt": 7, "generated": self.words},
                "limits": {"max_running": self.job["max_running"], **self.job["limits"]},
                "memory": {"rss_bytes": 50 << 20, "dense_bytes": 3 << 20},
                "runtime": {
                    "resident_expert_bytes": 8 << 20,
                    "staging_bytes": 2 << 20,
                    "exposed_wait_s": 0.125,
                    "fetched_bytes": 1 << 20,
                },
                **(timeline if "timeline" in request.query else {}),
            }
        )

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.authorize(request)
        body = await request.json()
        try:
            self.counts["waiting"] += 1
            async with self.room:
                self.counts["waiting"] -= 1
                self.counts["running"] += 1
                try:
                    response = await self.generate(request, body)
                finally:
                    self.counts["running"] -= 1
        except asyncio.CancelledError:
            self.counts["cancelled"] += 1
            raise
        self.counts["finished"] += 1
        return response

    async def generate(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        prompt = body.get("prompt") or body["messages"][-1]["content"]
        asked = directives(prompt) if isinstance(prompt, str) else {}
        if "status" in asked and asked.get("only") in (None, self.job["rank"]):
            headers = {"Retry-After": str(int(asked["retry"]))} if "retry" in asked else {}
            document = {"error": {"message": "asked", "code": "asked"}}
            if "failed" in asked:
                document["error"]["code"] = "engine_failed"
            return web.json_response(document, status=int(asked["status"]), headers=headers)
        await asyncio.sleep(asked.get("first", 0.0))
        num_words = body.get("max_tokens") or 16
        headers = {"X-Request-Id": request.headers["X-Request-Id"]}
        if not body.get("stream"):
            for number in range(num_words):
                await self.next_word(number, asked)
            text = " ".join(word(prompt, number) for number in range(num_words))
            return web.json_response(self.document(body, text), headers=headers)
        response = web.StreamResponse(
            headers={**headers, "Content-Type": "text/event-stream; charset=utf-8"}
        )
        for number in range(num_words):
            await self.next_word(number, asked)
            if number == 0:
                await response.prepare(request)
            text = word(prompt, number) + (" " if number + 1 < num_words else "")
            await response.write(f"data: {json.dumps(self.document(body, text))}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    async def next_word(self, number: int, asked: dict[str, float]) -> None:
        if number == asked.get("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        if number:
            await asyncio.sleep(asked.get("each", 0.0))
        self.words += 1

    def document(self, body: dict[str, Any], text: str) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length", "logprobs": None}
        kind = "text_completion"
        if "messages" in body:
            kind = "chat.completion.chunk" if body.get("stream") else "chat.completion"
            part = {"role": "assistant", "content": text}
            choice["delta" if body.get("stream") else "message"] = part
        else:
            choice["text"] = text
        return {
            "id": "cmpl-1",
            "object": kind,
            "created": 1,
            "model": body["model"],
            "system_fingerprint": f"rank-{self.job['rank']}",
            "choices": [choice],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }

    async def run(self) -> int:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_get("/health/live", self.live)
        app.router.add_get("/health/ready", self.ready)
        app.router.add_get("/internal/stats", self.stats)
        app.router.add_post("/v1/completions", self.answer)
        app.router.add_post("/v1/chat/completions", self.answer)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=30.0)
        await runner.setup()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"\0{self.job['socket']}")
        site = web.SockSite(runner, listener)
        await site.start()
        ended = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
        await ended.wait()
        self.is_draining = True
        await site.stop()
        while self.counts["running"] or self.counts["waiting"]:
            await asyncio.sleep(0.02)
        await runner.cleanup()
        return 0


def word(prompt: str | list[int], number: int) -> str:
    """The ``number``-th word of the answer to ``prompt``, the same on every rank."""
    return f"{prompt if isinstance(prompt, list) else prompt.split()[-1]}:{number}"


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    job = json.loads(sys.stdin.readline())
    end_with_parent(job["parent_pid"])
    if job["exit_with"]:
        print("some words before", file=sys.stderr)
        print("error: the stand-in was told to fail", file=sys.stderr)
        return int(job["exit_with"])
    return asyncio.run(StandInRank(job).run())


if __name__ == "__main__":
    sys.exit(main())
