"""Options of a rank's server, defined once. The flags of ``dwdp serve`` are derived from the fields below."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Batching = Literal["auto", "continuous", "plain"]


class RankOptions(BaseModel):
    """How a rank serves requests, the same on every rank.

    Raises:
        pydantic.ValidationError: an unknown key, or a value outside its range; the text names both.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    batching: Batching = Field(
        default="auto",
        description="How a rank shares its model among requests: continuous (Transformers' continuous "
        "batching: new requests join the running ones at every step), plain (one after the other), or auto "
        "(continuous where the model supports it). In bfloat16 and float16, rounding depends on what else is "
        "in a batch: where two tokens are almost equally likely, continuous batching can answer differently "
        "from run to run, at temperature 0 too. In float32 that takes a far closer tie; plain never batches.",
    )
    max_sequence_length: int | None = Field(
        default=None,
        ge=2,
        description="Tokens of a prompt and its answer together. Default: what the model is made for, at "
        "most 8192.",
    )
    max_batch_tokens: int = Field(
        default=512,
        ge=1,
        description="Tokens of one forward (continuous batching). A longer prompt is read over several, "
        "so that running streams wait no longer than one of them.",
    )
    max_running: int = Field(
        default=64,
        ge=1,
        description="Answers a rank generates at the same time (continuous batching).",
    )
    max_waiting: int = Field(
        default=256,
        ge=0,
        description="Answers that wait for their turn on a rank; a request beyond that gets status 429.",
    )
    kv_cache_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens that a rank's key-value cache holds (continuous batching). Default: 32768, or "
        "what max_running sequences of full length can fill if that is less, or one such sequence needs if "
        "that is more. Its memory is taken when a rank starts.",
    )
    chat_template: str | None = Field(
        default=None,
        description="File with a Jinja chat template. Default: the checkpoint's; a plain one if it has none.",
    )
    drain_grace_s: float = Field(
        default=30.0,
        ge=0,
        le=86_400,
        description="Seconds that running requests are given to finish when the server is told to end.",
    )
