"""Requests that are mistakes, come too late, are given up, or may not be made at all; and what is counted."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import openai
import pytest
from rank_servers import MODEL, TOKEN, Rank

from dwdp.serving.rank_server.job import REQUEST_ID_HEADER, TIMEOUT_HEADER

ENDLESS = {"model": MODEL, "prompt": "a", "max_tokens": 2000, "temperature": 0, "ignore_eos": True}


def test_options_of_no_effect_and_their_opposites(rank: Rank) -> None:
    rank.client.completions.create(
        model=MODEL, prompt="a", max_tokens=1, user="me", frequency_penalty=0
    )
    with pytest.raises(openai.BadRequestError, match="frequency_penalty is not supported"):
        rank.client.completions.create(model=MODEL, prompt="a", frequency_penalty=1)


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"model": "other"}, 404, "model", "model_not_found"),
        ({"prompt": ""}, 400, "prompt", None),
        ({"prompt": [[]]}, 400, "prompt", None),
        ({"prompt": [2048]}, 400, "prompt", None),
        ({"prompt": [5] * 2048}, 400, "prompt", "context_length_exceeded"),
        ({"prompt": [5] * 2000, "max_tokens": 49}, 400, "prompt", "context_length_exceeded"),
        ({"prompt": ["a"] * 4, "n": 128}, 400, None, None),
        ({"temperature": 3}, 400, "temperature", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_mistakes_are_answered_in_openais_shape(
    rank: Rank,
    fields: dict[str, Any],
    status: int,
    param: str | None,
    code: str | None,
    stream: bool,
) -> None:
    body = {"model": MODEL, "prompt": "a", "stream": stream, **fields}
    response = rank.http.post("/v1/completions", json=body)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert error["message"]


def test_a_prompt_that_is_too_long_names_the_numbers(rank: Rank) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        rank.client.completions.create(model=MODEL, prompt=[5] * 2000, max_tokens=100)
    for number in ("2048", "2000", "100", "2100"):
        assert number in caught.value.message


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/none", 404, "not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models/tiny", 405, "method_not_allowed"),
        ("POST", "/health/live", 405, "method_not_allowed"),
    ],
)
def test_wrong_paths_and_methods(
    rank: Rank, method: str, path: str, status: int, code: str
) -> None:
    response = rank.http.request(method, path)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize("header", [None, "Bearer wrong", TOKEN, f"bearer {TOKEN}", "Bearer \xe9"])
def test_only_health_is_told_without_the_token(rank: Rank, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    transport = httpx.HTTPTransport(uds=f"\0{rank.name}")
    with httpx.Client(transport=transport, base_url="http://rank", headers=headers) as http:
        for path in ("/v1/models", "/internal/stats", "/nowhere"):
            response = http.get(path)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/health/live").json() == {"status": "live"}
        assert http.get("/health/ready").json() == {"status": "ready"}


def test_bodies_that_are_no_requests(rank: Rank) -> None:
    for body in (b"", b"{", b"[1]", b"\xff" * 100, b"[" * 100_000):
        response = rank.http.post("/v1/chat/completions", content=body)
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_the_request_id_becomes_part_of_the_answer(rank: Rank) -> None:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 1}
    response = rank.http.post("/v1/completions", json=body, headers={REQUEST_ID_HEADER: "abc-1"})
    assert response.json()["id"] == "cmpl-abc-1"
    assert response.headers[REQUEST_ID_HEADER] == "abc-1"
    response = rank.http.post("/v1/completions", json=body, headers={REQUEST_ID_HEADER: 'a"b'})
    assert response.headers[REQUEST_ID_HEADER] not in ("", 'a"b')


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_gives_the_work_up(rank: Rank, stream: bool) -> None:
    before = rank.stats()["requests"]["cancelled"]
    response = rank.http.post(
        "/v1/completions", json={**ENDLESS, "stream": stream}, headers={TIMEOUT_HEADER: "3"}
    )
    if not stream:
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "deadline_exceeded"
    else:
        assert response.status_code == 200
        *_, last = [line for line in response.text.splitlines() if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    rank.wait_for(lambda stats: stats["requests"]["cancelled"] == before + 1)
    rank.wait_for(lambda stats: stats["requests"]["running"] == 0)
    response = rank.http.post("/v1/completions", json=ENDLESS, headers={TIMEOUT_HEADER: "soon"})
    assert response.status_code == 400


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_work(rank: Rank, stream: bool) -> None:
    before = rank.stats()["requests"]["cancelled"]
    body = {**ENDLESS, "stream": stream, "n": 3}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(f"\0{rank.name}")
        content = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: rank\r\nAuthorization: Bearer {TOKEN}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        connection.sendall(head.encode() + content)
        stats = rank.wait_for(lambda stats: stats["requests"]["running"] == 3)
        assert stats["tokens"]["outstanding"] > 3 * 1000
    stats = rank.wait_for(lambda stats: stats["requests"]["cancelled"] == before + 3)
    assert stats["tokens"]["outstanding"] == 0
    rank.wait_for(lambda stats: stats["requests"]["running"] == 0)


def test_statistics_count_what_was_done(rank: Rank) -> None:
    before = rank.stats()
    rank.client.completions.create(model=MODEL, prompt=[5] * 7, max_tokens=9, n=2, temperature=0)
    after = rank.stats("?timeline")
    assert "timeline" not in before
    assert after["requests"]["finished"] == before["requests"]["finished"] + 2
    assert after["tokens"]["generated"] == before["tokens"]["generated"] + 18
    assert after["tokens"]["prompt"] == before["tokens"]["prompt"] + 14
    assert after["state"] == "ready"
    assert after["pid"] == rank.process.pid
    assert after["limits"]["max_sequence_length"] == 2048
    assert 0 < after["memory"]["rss_bytes"] <= after["memory"]["peak_rss_bytes"]
    assert after["runtime"]["resident_expert_bytes"] > 15 << 20
    [lane] = after["timeline"]["lanes"]
    assert lane["name"] == "compute"
    for (begin, end, _), (following, _, _) in zip(lane["spans"], lane["spans"][1:], strict=False):
        assert begin <= end <= following <= after["timeline"]["now_s"]
