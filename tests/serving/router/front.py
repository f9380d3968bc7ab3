"""Starts a real router in a process of its own, and talks to it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATIENCE_S = 300.0
"""Guards against hanging alone: no test takes a time for granted."""

MODEL = "stand-in"
COMPLETIONS = "/v1/completions"

QUICK_WATCH = {"poll_s": 0.1, "timeout_s": 1.0}


def eventually(condition: Callable[[], Any], what: str) -> Any:
    """What ``condition`` returns, once that is true."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.02)
    raise AssertionError(f"never came true: {what}")


def words(prompt: str, count: int) -> list[str]:
    """What stand-in ranks answer."""
    return [f"{prompt}:{number}" for number in range(count)]


def wait_for_work(front: Front, rank: int, num_sequences: int = 1) -> None:
    eventually(
        lambda: front.rank(rank)["sequences"] >= num_sequences, f"rank {rank} has something to do"
    )


class Reply:
    """One response, read to its end (or to the end of the connection)."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.body = response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return dict(error)

    @property
    def text(self) -> str:
        assert self.status == 200, self.body
        return str(self.json["choices"][0]["text"])


class Front:
    """A running ``dwdp serve`` (or its stand-in)."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url
        address = urllib.parse.urlsplit(url)
        assert address.hostname is not None and address.port is not None
        self.address = (address.hostname, address.port)
        self.headers: dict[str, str] = {}  # of every request
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip())

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(*self.address, timeout=PATIENCE_S)

    def socket(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=PATIENCE_S)

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Reply:
        connection = self.connect()
        try:
            data = body if isinstance(body, bytes) or body is None else json.dumps(body)
            connection.request(method, path, data, {**self.headers, **(headers or {})})
            return Reply(connection.getresponse())
        finally:
            connection.close()

    def get(self, path: str, **kwargs: Any) -> Reply:
        return self.request("GET", path, **kwargs)

    def complete(self, prompt: str, **options: Any) -> Reply:
        body = {"model": MODEL, "prompt": prompt, **options}
        return self.request("POST", COMPLETIONS, body)

    def stream(self, prompt: str, **options: Any) -> Events:
        return Events(self, {"model": MODEL, "prompt": prompt, "stream": True, **options})

    def snapshot(self) -> dict[str, Any]:
        """What the page would show now."""
        connection = self.connect()
        try:
            connection.request("GET", "/page/events", headers=self.headers)
            line = connection.getresponse().readline()
            return dict(json.loads(line.removeprefix(b"data: ")))
        finally:
            connection.close()

    def rank(self, rank: int) -> dict[str, Any]:
        return dict(self.snapshot()["ranks"][rank])

    def kill(self, rank: int) -> None:
        os.kill(self.rank(rank)["pid"], signal.SIGKILL)

    def await_states(self, *states: str) -> None:
        def are_reached() -> bool:
            return tuple(rank["state"] for rank in self.snapshot()["ranks"]) == states

        eventually(are_reached, f"ranks are {states}")

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        text = self.get("/metrics").body.decode()
        found = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
        return sum(map(float, found))

    def await_log(self, pattern: str) -> str:
        def find() -> str | None:
            return next((line for line in list(self.log) if re.search(pattern, line)), None)

        return str(eventually(find, f"log has {pattern!r}"))

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


class Events:
    """A stream, read event by event."""

    def __init__(self, front: Front, body: dict[str, Any]) -> None:
        self._connection = front.connect()
        self._connection.request("POST", COMPLETIONS, json.dumps(body), front.headers)
        self._response = self._connection.getresponse()
        assert self._response.status == 200, self._response.read()
        assert self._response.getheader("content-type", "").startswith("text/event-stream")

    def __iter__(self) -> Iterator[Any]:
        """Documents, and at last "[DONE]" if the stream is complete."""
        while line := self._response.readline():
            if line.startswith(b"data: "):
                data = line.removeprefix(b"data: ").strip()
                yield "[DONE]" if data == b"[DONE]" else json.loads(data)

    def texts(self) -> list[str]:
        """The words of a stream that has to be complete."""
        *chunks, last = list(self)
        assert last == "[DONE]"
        return [chunk["choices"][0]["text"].strip() for chunk in chunks]

    @property
    def served_by(self) -> int:
        """The rank, as the next event says."""
        return int(next(iter(self))["system_fingerprint"].removeprefix("rank-"))

    def close(self) -> None:
        self._connection.close()


def spawn(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )


@contextmanager
def serving(num_ranks: int = 2, **options: Any) -> Iterator[Front]:
    """The real router over stand-in ranks. For the options see :func:`start_stand_ins`."""
    with running(start_stand_ins(num_ranks, **options)) as front:
        yield front


def start_stand_ins(
    num_ranks: int = 2,
    *,
    max_running: int = 8,
    limits: dict[str, int] | None = None,
    keys: tuple[str, ...] = (),
    exit_with: dict[str, int] | None = None,
    max_groups: int = 1000,
    watch: dict[str, float] | None = None,
    **settings: Any,
) -> subprocess.Popen[str]:
    options = {
        "num_ranks": num_ranks,
        "max_running": max_running,
        "limits": limits or {},
        "keys": keys,
        "exit_with": exit_with or {},
        "max_groups": max_groups,
        "watch": watch or QUICK_WATCH,
        "settings": settings,
    }
    program = Path(__file__).with_name("serve_stand_ins.py")
    return spawn([sys.executable, str(program), json.dumps(options)])


@contextmanager
def running(process: subprocess.Popen[str], pattern: str = r"ready (\S+)") -> Iterator[Front]:
    """The front of ``process`` once it has said that it is ready; the process is ended afterwards."""
    try:
        line = first_line(process)
        found = re.search(pattern, line)
        if found is None:
            process.kill()
            raise AssertionError((line, process.communicate()[1]))
        yield Front(process, found.group(1))
    finally:
        process.kill()
        process.wait()


def first_line(process: subprocess.Popen[str]) -> str:
    """The first line on its standard output; "" if there is none in time, when it is killed."""
    assert process.stdout is not None
    killer = threading.Timer(PATIENCE_S, process.kill)
    killer.start()
    try:
        return process.stdout.readline()
    finally:
        killer.cancel()
