"""The fabric interface: who provides memory that peers can map, and engines that copy it.

Everything above this file (weights, pipeline, runtime) is written against these classes, so a fabric
is complete when it implements them. Two rules keep the interface implementable with CUDA's virtual
memory management as well as with ``mmap``:

* a :class:`Region` is always mapped whole, at offset 0 of itself (``cuMemMap`` accepts no other offset);
* an :class:`Event` behaves like a CUDA event: ``record`` and ``CopyEngine.submit`` issue a new
  generation, and a wait refers to the generation issued last, not to one issued later.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from dwdp.observability.spans import Span

if TYPE_CHECKING:
    import torch


class FabricError(RuntimeError):
    """A memory, mapping, descriptor or copy operation failed.

    The text names the call, the operating system's or driver's own words, and the sizes involved.
    """


class Copy(NamedTuple):
    """One slice of a fetch, as plain addresses of this process."""

    dst: int
    src: int
    num_bytes: int


class Region(Protocol):
    """A piece of physical memory that peers can map: a memfd, or a ``cuMemCreate`` handle."""

    @property
    def num_bytes(self) -> int: ...

    def close(self) -> None:
        """Drop this process's handle. Mappings of the region, here and in peers, stay valid."""


class AddressRange(Protocol):
    """A reserved range of addresses of this process, into which regions are mapped."""

    @property
    def address(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...

    def map(self, offset: int, region: Any) -> None:
        """Put all of ``region`` at ``offset`` (a multiple of the granularity), not accessible yet."""

    def enable_access(self, writable: bool) -> None:
        """Make everything mapped so far accessible; parts that touch each other in one call of the driver.

        NVLink fabric memory takes one of about 900 routing entries per GPU for every such call.
        """

    def bytes_tensor(self, offset: int, num_bytes: int) -> torch.Tensor:
        """A ``uint8 [num_bytes]`` view, without a copy. The view keeps the mapping alive."""

    def close(self) -> None:
        """Give the range up. It is unmapped when the last tensor that views it is gone."""


class Event(Protocol):
    """Orders compute and copies.

    Attributes:
        num_waits: waits that found the generation unfinished.
        waited_s: seconds compute stood still in them, as far as known by now.
    """

    @property
    def num_waits(self) -> int: ...

    @property
    def waited_s(self) -> float: ...

    def record(self) -> None:
        """Issue a generation that completes when the compute work submitted so far has finished."""

    def query(self) -> bool:
        """Whether the generation issued last has completed (true if none was issued)."""

    def wait(self) -> float:
        """Make compute wait for the generation issued last.

        Returns:
            Seconds that the calling thread stood still: 0 where the wait is the device's.
        """


class CopyEngine(Protocol):
    """Moves bytes: in the background, one lane per source and all lanes at once, or on demand.

    Attributes:
        demanded_bytes: bytes that ``fetch_activated`` has moved. Reading it may wait for compute.
        demand_waited_s: seconds compute stood still in ``fetch_activated``, as far as known by now.
    """

    @property
    def demanded_bytes(self) -> int: ...

    @property
    def demand_waited_s(self) -> float: ...

    def prepare(
        self, lanes: Sequence[Sequence[Copy]], ranges: Sequence[Any] = (), layer: int = 0
    ) -> Any:
        """Lay out a fetch once, so that submitting it costs no allocation. Returns an opaque fetch.

        Args:
            lanes: the slices of each lane, in order.
            ranges: address ranges that they lie in, which stay mapped at least as long as the fetch.
            layer: what the fetch's spans are marked with.
        """

    def submit(self, fetch: Any, *, after: Event | None, done: Event) -> None:
        """Start ``fetch`` once the last generation of ``after`` has completed; complete ``done`` at its end.

        Returns at once. Fetches submitted to one engine run in submission order on each lane.
        """

    def prepare_demand(
        self, experts: Sequence[Sequence[Copy]], ranges: Sequence[Any] = (), layer: int = 0
    ) -> Any:
        """Lay out what each expert of a layer takes to fetch (nothing for a resident one).

        Returns an opaque demand. ``ranges`` and ``layer`` as in ``prepare``.
        """

    def fetch_activated(self, demand: Any, indices: torch.Tensor) -> float:
        """Fetch the experts that ``indices`` names, in compute order: what follows finds them there.

        Args:
            indices: the router's choice, int32 or int64 of any shape, on the compute device. Ids
                outside the layer's experts are ignored.

        Returns:
            Seconds that the calling thread stood still: 0 where the device fetches.
        """

    def drain_spans(self) -> list[Span]:
        """When each lane copied, since the last call: one span for a lane's part of a fetch.

        The spans of a lane follow each other and do not overlap. A fetch's spans are there when it is
        done. Only the last thousand or so of each lane are kept. An engine that cannot tell without
        slowing compute down returns none. May be called by any thread.
        """

    def close(self) -> None:
        """Finish what was submitted and stop. Idempotent."""


class Fabric(ABC):
    """Memory and copy engines of one kind of device.

    Attributes:
        name: ``"host"`` or ``"cuda"``.
        granularity: bytes; offsets and sizes of every mapping are multiples of it.
        device_name: what the driver calls the device; empty on the host.
        times_copies: whether its copy engines tell when they copied, and its events' waits are the host's.
        regions_are_descriptors: whether a region is an open file of this process until it is closed, and
            published once more for peers, who get it after that too.
    """

    name: str
    granularity: int
    device_name: str = ""
    times_copies: bool = False
    regions_are_descriptors: bool = False

    def is_capturing(self) -> bool:
        """Whether compute is being captured into a graph, to run later any number of times."""
        return False

    def synchronize(self) -> None:
        """Wait until writes of this process to the fabric's memory can be seen by peers. Set-up only."""
        return

    @abstractmethod
    def allocate(self, num_bytes: int) -> Region:
        """Physical memory of ``num_bytes`` (a positive multiple of the granularity), zeroed.

        Raises:
            FabricError: the memory is not there.
        """

    @abstractmethod
    def reserve(self, num_bytes: int) -> AddressRange:
        """An address range with nothing mapped into it yet."""

    @abstractmethod
    def event(self) -> Event: ...

    @abstractmethod
    def copy_engine(self, num_lanes: int, lane_depth: int) -> CopyEngine:
        """An engine of ``num_lanes`` lanes that keeps up to ``lane_depth`` slices of each in flight."""

    @abstractmethod
    def serve(self, token: bytes) -> None:
        """Start handing out regions; ``token`` (16 bytes) must be presented by whoever asks for them."""

    @abstractmethod
    def publish(self, name: str, regions: Sequence[Region]) -> None:
        """Make ``regions`` available to peers under ``name``."""

    @abstractmethod
    def ticket(self) -> bytes:
        """What peers need to get the regions published so far: an address, or the handles themselves."""

    @abstractmethod
    def fetch_regions(
        self, ticket: bytes, token: bytes, name: str, sizes: Sequence[int], timeout_s: float
    ) -> list[Region]:
        """Regions that the peer who wrote ``ticket`` published under ``name``; read-only when mapped.

        Raises:
            FabricError: no answer in time, the peer refused, or a size differs from ``sizes``.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop serving. Regions and ranges handed out before stay valid. Idempotent."""


def checked_indices(indices: torch.Tensor, device_type: str) -> torch.Tensor:
    """``indices`` in one piece, after checking that a copy engine can read them where it runs.

    Raises:
        ValueError: they are no int32 or int64, or on another kind of device.
    """
    if (
        str(indices.dtype) not in ("torch.int32", "torch.int64")
        or indices.device.type != device_type
    ):
        raise ValueError(
            f"the router's choice is {indices.dtype} on {indices.device}: it has to be int32 or int64 "
            f"on the compute device ({device_type})"
        )
    return indices.contiguous()
