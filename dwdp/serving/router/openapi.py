"""The endpoint's OpenAPI document, made from the models that requests are checked with."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from dwdp._version import __version__
from dwdp.serving.openai.responses import (
    ChatCompletion,
    Completion,
    ErrorResponse,
    Model,
    ModelList,
)

_SCHEMAS: tuple[type[BaseModel], ...] = (
    ChatCompletion,
    Completion,
    ErrorResponse,
    Model,
    ModelList,
)

_ERRORS = {
    400: "The request is malformed, or asks for what is not supported.",
    401: "The API key is missing or wrong.",
    404: "There is no such model or path.",
    405: "The path takes another method.",
    408: "The request took too long to arrive.",
    413: "The body is too long.",
    429: "Queues are full: try again after Retry-After seconds.",
    431: "The headers are too long.",
    500: "The server failed.",
    503: "No rank can take the request now: try again after Retry-After seconds.",
    504: "The answer was not finished in time.",
}
_READ_ERRORS = (401, 404, 405, 408, 431)
_WRITE_ERRORS = tuple(_ERRORS)


def openapi_document(
    model: str | None, completion: type[BaseModel], chat: type[BaseModel], *, needs_key: bool
) -> dict[str, Any]:
    """OpenAPI 3.1.

    Args:
        model: what requests have to call the model; None: the ranks know.
        completion, chat: what the two paths that generate text are asked.
        needs_key: whether clients have to send an API key.
    """
    _, definitions = models_json_schema(
        [(request, "validation") for request in (chat, completion)]
        + [(schema, "serialization") for schema in _SCHEMAS],
        ref_template="#/components/schemas/{model}",
    )
    if model is not None:
        for request in (chat, completion):
            definitions["$defs"][request.__name__]["properties"]["model"]["enum"] = [model]
    components: dict[str, Any] = {"schemas": definitions["$defs"]}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "dwdp",
            "version": __version__,
            "description": "OpenAI-compatible inference over the independent ranks of a DWDP group.",
        },
        "paths": _paths(completion, chat),
        "components": components,
    }
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _paths(completion: type[BaseModel], chat: type[BaseModel]) -> dict[str, Any]:
    model_id = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "/v1/models": {"get": _read("The model that is served.", ModelList)},
        "/v1/models/{model}": {
            "parameters": [model_id],
            "get": _read("One model.", Model),
        },
        "/v1/completions": {
            "post": _write("Continue one or several prompts.", completion, Completion)
        },
        "/v1/chat/completions": {"post": _write("Answer a conversation.", chat, ChatCompletion)},
        "/health/live": {"get": _probe("Whether the router runs.", (200,))},
        "/health/ready": {"get": _probe("Whether any rank takes requests.", (200, 503))},
        "/health": {"get": _probe("The state of every rank.", (200, 503))},
        "/metrics": {
            "get": {
                "summary": "Figures for Prometheus.",
                "responses": {
                    "200": {"description": "Text.", "content": {"text/plain": {}}},
                    **_errors(_READ_ERRORS),
                },
            }
        },
        "/openapi.json": {"get": _probe("This document.", (200,), more=_READ_ERRORS)},
    }


def _read(summary: str, answer: type[BaseModel]) -> dict[str, Any]:
    return {
        "summary": summary,
        "responses": {
            "200": {"description": "The answer.", "content": {"application/json": _ref(answer)}},
            **_errors(_READ_ERRORS),
        },
    }


def _write(summary: str, request: type[BaseModel], answer: type[BaseModel]) -> dict[str, Any]:
    content = {
        "application/json": _ref(answer),
        "text/event-stream": {"schema": {}},
    }
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": _ref(request)}},
        "responses": {
            "200": {
                "description": "The answer, or with stream=true events that end with [DONE].",
                "content": content,
            },
            **_errors(_WRITE_ERRORS),
        },
    }


def _probe(summary: str, statuses: tuple[int, ...], more: tuple[int, ...] = ()) -> dict[str, Any]:
    body = {"application/json": {"schema": {"type": "object"}}}
    return {
        "summary": summary,
        "responses": {
            **{str(status): {"description": "The state.", "content": body} for status in statuses},
            **_errors(more or (405, 408, 431)),
        },
    }


def _errors(statuses: tuple[int, ...]) -> dict[str, Any]:
    content = {"application/json": _ref(ErrorResponse)}
    return {
        str(status): {"description": _ERRORS[status], "content": content} for status in statuses
    }


def _ref(model: type[BaseModel]) -> dict[str, Any]:
    return {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
