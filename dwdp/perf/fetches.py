"""What a fetch consists of in the simulator, and in which order its pieces go out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dwdp.placement import Placement

HOST = -1
"""The source of what a rank reads from its own host's memory."""


@dataclass(frozen=True)
class FetchPolicy:
    """How a rank pulls a layer's remote experts.

    Attributes:
        order: ``rotated``: rank r starts at r + 1; ``fixed``: every rank starts at the lowest peer.
        num_lanes: sources read at the same time, one piece each; None: all of them.
        chunks_per_source: pieces of a source's share that alternate with those of other sources.
            Within a piece, slices follow each other without a break.
        slice_bytes: bytes of one copy command.
        lane_depth: copy commands in flight per lane; what overlaps their set-up.
        wrap_around: the first fetches of a forward start while the one before ends.
        host_share: share of the remote experts read from host memory, beside the peers.
    """

    order: Literal["rotated", "fixed"] = "rotated"
    num_lanes: int | None = None
    chunks_per_source: int = 1
    slice_bytes: int = 4 << 20
    lane_depth: int = 1
    wrap_around: bool = True
    host_share: float = 0.0

    def __post_init__(self) -> None:
        for name in ("chunks_per_source", "slice_bytes", "lane_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: use at least 1.")
        if self.num_lanes is not None and self.num_lanes < 1:
            raise ValueError(f"num_lanes is {self.num_lanes}: use at least 1.")
        if not 0 <= self.host_share <= 1:
            raise ValueError(f"host_share is {self.host_share}: use 0 to 1.")


ALL_AT_ONCE = FetchPolicy()
"""One lane per source, all at once: what this package does."""

SERIAL_FIXED = FetchPolicy(order="fixed", num_lanes=1, slice_bytes=1 << 40, wrap_around=False)
"""One pull at a time from the lowest peer up, and none before the forward starts: the paper's design."""

SLICED_SERIAL = FetchPolicy(num_lanes=2, chunks_per_source=8, wrap_around=False)
"""The paper's mitigation of contention, coarser: eighths of a share, in turn over two sources at a time."""


class Chunk(NamedTuple):
    """``num_bytes`` to pull from ``source``."""

    source: int
    num_bytes: float


def source_bytes(placement: Placement, rank: int, expert_bytes: float) -> dict[int, float]:
    """Bytes of a layer that ``rank`` reads from each source."""
    totals: dict[int, float] = {}
    for source in placement.sources[rank]:
        if source != rank:
            totals[source] = totals.get(source, 0.0) + expert_bytes
    return totals


def order_chunks(
    rank: int, num_ranks: int, by_source: dict[int, float], policy: FetchPolicy
) -> Sequence[Chunk]:
    """The chunks of one fetch in the order in which they may start."""
    if policy.order == "fixed":
        peers = sorted(by_source)
    else:
        peers = sorted(by_source, key=lambda source: (source - rank) % num_ranks)
    pieces = policy.chunks_per_source
    from_peers = 1 - policy.host_share
    chunks = [
        Chunk(source, by_source[source] * from_peers / pieces)
        for _ in range(pieces)
        for source in peers
        if by_source[source] and from_peers
    ]
    if policy.host_share and by_source:
        chunks.insert(0, Chunk(HOST, sum(by_source.values()) * policy.host_share))
    return chunks
