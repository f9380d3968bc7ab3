"""The host fabric: shared memory of one machine, copied by threads."""

from __future__ import annotations

import mmap
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dwdp import _C
from dwdp.fabric.base import Fabric, FabricError, Region, checked_indices
from dwdp.fabric.descriptor_limit import raise_descriptor_limit
from dwdp.observability.spans import DEMAND_LANE, Span, fetch_lane

if TYPE_CHECKING:
    import torch


class HostAddressRange(_C.HostAddressRange):
    """A reserved address range whose bytes can be seen as a tensor."""

    def bytes_tensor(self, offset: int, num_bytes: int) -> torch.Tensor:
        """A ``uint8 [num_bytes]`` CPU tensor over the bytes at ``offset``, without a copy.

        The tensor keeps the range mapped. Torch does not know which bytes are mapped read-only:
        writing to those ends the process with SIGSEGV.

        Raises:
            FabricError: the bytes reach past the end of the range, or it is closed.
        """
        from torch.utils.dlpack import from_dlpack

        tensor: torch.Tensor = from_dlpack(self.bytes_capsule(offset, num_bytes))
        return tensor


class HostEvent(_C.HostEvent):
    """An event that counts the host's waits for it."""

    num_waits = 0
    waited_s = 0.0

    def wait(self) -> float:
        """Wait for the generation issued last. Returns the seconds waited."""
        seconds = super().wait()
        if seconds > 0:
            self.num_waits += 1
            self.waited_s += seconds
        return seconds


class HostCopyEngine(_C.HostCopyEngine):
    """Threads that copy slices, and copies on demand by the calling thread."""

    demanded_bytes = 0
    demand_waited_s = 0.0

    def fetch_activated(  # type: ignore[override]
        self, demand: _C.HostDemand, indices: torch.Tensor
    ) -> float:
        """Copy the experts that ``indices`` (int32 or int64, on the CPU) names; they are there at once.

        Returns the seconds that it took.
        """
        start = time.perf_counter()
        indices = checked_indices(indices, "cpu")
        self.demanded_bytes += super().fetch_activated(
            demand, indices.data_ptr(), indices.numel(), indices.itemsize
        )
        seconds = time.perf_counter() - start
        self.demand_waited_s += seconds
        return seconds

    def drain_spans(self) -> list[Span]:  # type: ignore[override]
        """When each lane copied, and when experts were fetched on demand, since the last call."""
        *lanes, demands = super().drain_spans()
        names = [fetch_lane(lane) for lane in range(len(lanes))]
        return [
            Span(name, *span)
            for name, spans in zip([*names, DEMAND_LANE], [*lanes, demands], strict=True)
            for span in spans
        ]


class HostFabric(Fabric):
    """Memory of this machine that its processes can map, and threads that copy it.

    Regions are sealed memfds, granularity is the page size, and descriptors reach peers through a
    socket that only processes of the same user with the group's token are served on. Making a fabric
    raises this process's soft limit of open files to the hard one.
    """

    name = "host"
    granularity = mmap.PAGESIZE
    times_copies = True
    regions_are_descriptors = True

    def __init__(self) -> None:
        raise_descriptor_limit()
        self._server: _C.DescriptorServer | None = None

    def allocate(self, num_bytes: int) -> _C.HostRegion:
        return _C.HostRegion(num_bytes)

    def reserve(self, num_bytes: int) -> HostAddressRange:
        return HostAddressRange(num_bytes)

    def event(self) -> HostEvent:
        return HostEvent()

    def copy_engine(self, num_lanes: int, lane_depth: int) -> HostCopyEngine:
        return HostCopyEngine(num_lanes, lane_depth)

    def serve(self, token: bytes) -> None:
        if self._server is not None:
            raise FabricError(f"this fabric already serves its regions at {self._server.address}")
        self._server = _C.DescriptorServer(token)

    def publish(self, name: str, regions: Sequence[Region]) -> None:
        self._serving().publish(name, regions)

    def ticket(self) -> bytes:
        return self._serving().address.encode()

    def fetch_regions(
        self, ticket: bytes, token: bytes, name: str, sizes: Sequence[int], timeout_s: float
    ) -> list[Region]:
        return list(_C.fetch_regions(ticket.decode(), token, name, sizes, timeout_s))

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def _serving(self) -> _C.DescriptorServer:
        if self._server is None:
            raise FabricError("regions cannot be published before serve() or after close()")
        return self._server
