"""The router's options, defined once; ``dwdp serve`` makes its flags from them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class RouterSettings(BaseModel):
    """Limits and patience of the router.

    Raises:
        pydantic.ValidationError: an unknown key, or a value outside its range; the text names both.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_queued: int = Field(
        default=1024,
        ge=0,
        description="Requests that wait in the router for a rank; beyond that, 429.",
    )
    max_attempts: int = Field(
        default=8,
        ge=1,
        description="Ranks a request is given to, one after another, while each dies before the first token.",
    )
    request_timeout_s: float = Field(
        default=600.0,
        gt=0,
        le=86_400,
        description="Seconds from a request's arrival to the end of its answer at most.",
    )
    max_body_bytes: int = Field(
        default=4 << 20, ge=1024, description="Longest body of a request, in bytes."
    )
    max_buffered_bytes: int = Field(
        default=256 << 20,
        ge=1024,
        description="Bodies that the router holds at a time, all requests together, in bytes; and as much "
        "again of answers that are not streamed.",
    )
    body_timeout_s: float = Field(
        default=30.0, gt=0, description="Seconds that a request's body may take to arrive."
    )
    max_header_bytes: int = Field(
        default=16 << 10, ge=1024, description="Longest request line and headers, in bytes."
    )
    header_timeout_s: float = Field(
        default=10.0,
        gt=0,
        description="Seconds from connecting, or from a request's first byte, to the end of its headers.",
    )
    keep_alive_s: int = Field(
        default=30,
        ge=1,
        description="Seconds that an idle connection is kept for further requests.",
    )
    write_timeout_s: float = Field(
        default=60.0,
        gt=0,
        description="Seconds that a client may leave what it is sent unread, without reading anything of it.",
    )
    max_connections: int | None = Field(
        default=None,
        ge=1,
        description="Open connections. Default: as many as the process's limit on descriptors allows for.",
    )
    grace_s: float = Field(
        default=30.0,
        ge=0,
        description="Seconds that running requests are given to finish on SIGTERM.",
    )
