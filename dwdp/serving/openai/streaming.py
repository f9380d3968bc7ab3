"""Server-sent events as OpenAI's streams use them: one JSON document per event, ``[DONE]`` at the end."""

from __future__ import annotations

import json

from dwdp.serving.openai.errors import ApiError

CONTENT_TYPE = "text/event-stream"

DONE = b"data: [DONE]\n\n"
"""Ends a stream that is complete. One that fails ends with an :func:`error_event` and without it."""


def event(document: bytes) -> bytes:
    """One event. JSON has no bare line breaks, so the document fits on the one line it needs."""
    return b"data: " + document + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """The last event of a stream that fails after it has begun. OpenAI's clients raise it as APIError."""
    return b"data: " + json.dumps(error.body(), ensure_ascii=False).encode() + b"\n\n"
