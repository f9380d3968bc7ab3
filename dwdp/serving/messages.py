"""What the dispatcher and the ranks say to each other, and its form on the wire.

Every message is one line of JSON, checked against the classes below when it is read::

    rank -> dispatcher    Hello, then Ready or Failed, then one Completion or PromptFailed per Request
    dispatcher -> rank    Request (at most a few ahead), at last Finish
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from dwdp.observability.spans import Span

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Hello:
    """The first message of a rank. ``token`` proves that it belongs to the dispatcher's group."""

    rank: int
    token: str
    kind: Literal["hello"] = "hello"


@dataclass(frozen=True)
class Ready:
    """A rank is set up; what it holds, in bytes. Everything here stays as it is from now on.

    Attributes:
        fetch_mode: the mode in force: ``direct``, ``staged``, ``demand`` or ``auto``.
        num_slots: staging slots (0 in direct mode).
        load_s: seconds that loading took.
        peak_rss_bytes: as in :class:`Counters`, so far.
    """

    fetch_mode: str
    num_slots: int
    dense_bytes: int
    resident_expert_bytes: int
    staging_bytes: int
    load_s: float
    peak_rss_bytes: int
    kind: Literal["ready"] = "ready"


@dataclass(frozen=True)
class Failed:
    """A rank could not be set up. ``bad_input``: because of what the user gave, not of the machine."""

    message: str
    bad_input: bool
    kind: Literal["failed"] = "failed"


@dataclass(frozen=True)
class Request:
    """Continue one prompt.

    Attributes:
        index: position of the prompt in the input.
        token_ids: the prompt.
        max_new_tokens: tokens to generate at most.
        temperature: 0 takes the likeliest token each time; above that, tokens are drawn.
        seed: of this prompt's draws, so that its text does not depend on the rank.
        trace: whether the completion is to tell what the rank did when.
    """

    index: int
    token_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    seed: int
    trace: bool = False
    kind: Literal["request"] = "request"


@dataclass(frozen=True)
class Counters:
    """What a rank has done so far; sent with every completion, so that a rank that dies is counted too.

    Attributes:
        wall_s: seconds from its first request to now.
        num_fetches, num_demands, fetched_bytes, num_waits, exposed_wait_s: as in the runtime's
            ``RuntimeStats``.
        peak_rss_bytes: the most memory that was resident at once, pages shared with peers included.
    """

    num_prompts: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    wall_s: float = 0.0
    num_fetches: int = 0
    num_demands: int = 0
    fetched_bytes: int = 0
    num_waits: int = 0
    exposed_wait_s: float = 0.0
    peak_rss_bytes: int = 0


@dataclass(frozen=True)
class Completion:
    """The tokens generated for request ``index``, the end token included where one was met.

    Attributes:
        spans: what the rank did meanwhile, if the request asked for it. Their clock is the machine's.
    """

    index: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    counters: Counters
    spans: tuple[Span, ...] = ()
    kind: Literal["completion"] = "completion"


@dataclass(frozen=True)
class PromptFailed:
    """Request ``index`` raised an error; the rank itself is fine."""

    index: int
    message: str
    kind: Literal["prompt_failed"] = "prompt_failed"


@dataclass(frozen=True)
class Finish:
    """There is nothing more to do. A connection that closes without it means that the dispatcher died."""

    kind: Literal["finish"] = "finish"


Message = Hello | Ready | Failed | Request | Completion | PromptFailed | Finish

_ADAPTER: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="kind")])


class MessageError(RuntimeError):
    """A line is not a message of this version of dwdp."""


def encode(message: Message) -> bytes:
    """One line, newline included."""
    return _ADAPTER.dump_json(message) + b"\n"


def decode(line: bytes) -> Message:
    """The message in one line.

    Raises:
        MessageError: there is none.
    """
    try:
        return _ADAPTER.validate_json(line)
    except ValidationError as error:
        raise MessageError(
            f"not a message: {line[:80]!r} ({error.error_count()} errors)"
        ) from error
