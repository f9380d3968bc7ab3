"""Errors of the endpoint, in the shape and with the status codes that OpenAI's clients expect."""

from __future__ import annotations

import math
from typing import Any


class ApiError(Exception):
    """What a client is told instead of an answer.

    Args:
        status: HTTP status code.
        message: what is wrong, with the value seen and what to do.
        type: OpenAI's class of the error.
        param: the request's field that is at fault.
        code: a name that programs can act on.
        retry_after_s: seconds after which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The JSON document of the response, and of an error event in a stream."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        """Headers that belong to the response."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request cannot be carried out as it is."""
    return ApiError(400, message, param=param, code=code)


def context_length_exceeded(message: str, param: str) -> ApiError:
    """400: prompt and answer together are longer than the server takes."""
    return ApiError(400, message, param=param, code="context_length_exceeded")


def unauthorized(message: str) -> ApiError:
    """401: no API key, or a wrong one."""
    return ApiError(401, message, code="invalid_api_key")


def model_not_found(name: str, served: str) -> ApiError:
    """404: the request names another model than the one that is served."""
    return ApiError(
        404,
        f"The model {name!r} does not exist here; this server has {served!r}",
        param="model",
        code="model_not_found",
    )


def not_found(path: str) -> ApiError:
    """404: there is no such path."""
    return ApiError(404, f"There is nothing at {path}", code="not_found")


def method_not_allowed(method: str, path: str) -> ApiError:
    """405: the path exists, for another method."""
    return ApiError(405, f"{path} does not take {method}", code="method_not_allowed")


def too_large(limit_bytes: int) -> ApiError:
    """413: the body is longer than ``limit_bytes``."""
    return ApiError(
        413, f"The request's body is longer than {limit_bytes} bytes", code="request_too_large"
    )


def overloaded(message: str, retry_after_s: float) -> ApiError:
    """429: queues are full; nothing was begun."""
    return ApiError(
        429, message, type="rate_limit_error", code="queue_full", retry_after_s=retry_after_s
    )


def internal(message: str = "The server failed to carry out this request") -> ApiError:
    """500: our own mistake."""
    return ApiError(500, message, type="server_error", code="internal_error")


def unavailable(message: str, code: str, retry_after_s: float) -> ApiError:
    """503: the server is starting, ending (``draining``) or broken (``engine_failed``)."""
    return ApiError(503, message, type="server_error", code=code, retry_after_s=retry_after_s)


def deadline_exceeded(timeout_s: float) -> ApiError:
    """504: the work was given up because its time was over."""
    return ApiError(
        504,
        f"The answer was not finished within {timeout_s:g} s",
        type="server_error",
        code="deadline_exceeded",
    )
