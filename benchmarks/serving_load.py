"""A client that asks many things at once, and remembers what became of each."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

PATH = "/v1/completions"


@dataclass(frozen=True)
class Target:
    """A server to ask.

    Attributes:
        headers: sent with every request.
    """

    base_url: str
    model: str
    headers: Mapping[str, str] | None = None

    def session(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=0)
        return aiohttp.ClientSession(self.base_url, connector=connector, headers=self.headers)


@dataclass(frozen=True)
class Answer:
    """What became of one request.

    Attributes:
        text: what arrived, whether it is complete or not.
        is_complete: the answer came to its end without an error.
        error: why it did not; None if it did.
        wall_s: from asking to the end.
    """

    prompt: str
    text: str
    is_complete: bool
    error: str | None
    wall_s: float

    @property
    def is_lost(self) -> bool:
        """No answer, and not a single token of one."""
        return not self.is_complete and not self.text


async def ask(
    session: aiohttp.ClientSession, model: str, prompt: str, num_tokens: int, *, is_stream: bool
) -> Answer:
    """One greedy completion."""
    body = {"model": model, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0}
    started_s, pieces, error, is_complete = time.monotonic(), [], None, False
    try:
        async with session.post(PATH, json={**body, "stream": is_stream}) as response:
            if response.status != 200:
                error = f"{response.status}: {(await response.text())[:200]}"
            elif not is_stream:
                pieces.append(_text(await response.json()))
                is_complete = True
            else:
                async for line in response.content:
                    data = line.removeprefix(b"data: ").strip()
                    if data == b"[DONE]":
                        is_complete = True
                    elif data and "error" in (document := json.loads(data)):
                        error = document["error"]["message"]
                    elif data:
                        pieces.append(_text(document))
    except (aiohttp.ClientError, ConnectionError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    if not is_complete and error is None:
        error = "the stream ended without [DONE]"
    return Answer(prompt, "".join(pieces), is_complete, error, time.monotonic() - started_s)


def _text(document: Any) -> str:
    return str(document["choices"][0]["text"])


async def ask_all(
    targets: Sequence[Target], prompts: Sequence[str], num_tokens: int, *, concurrency: int
) -> list[Answer]:
    """Every prompt, ``concurrency`` at a time, dealt out over ``targets``; every other one as a stream."""
    sessions = [target.session() for target in targets]
    next_of = iter(enumerate(prompts))
    answers: list[Answer] = []

    async def worker(number: int) -> None:
        place = number % len(targets)
        for index, prompt in next_of:
            is_stream = index % 2 == 0
            answers.append(
                await ask(
                    sessions[place], targets[place].model, prompt, num_tokens, is_stream=is_stream
                )
            )

    try:
        await asyncio.gather(*(worker(number) for number in range(concurrency)))
    finally:
        for session in sessions:
            await session.close()
    return answers
