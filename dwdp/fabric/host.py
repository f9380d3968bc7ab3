"""The host fabric: shared memory of one machine, copied by threads."""

from __future__ import annotations

import mmap
import resource
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dwdp import _C
from dwdp.fabric.base import Fabric, FabricError, Region

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


def raise_descriptor_limit() -> None:
    """Let this process open as many files as it is allowed to: every region is one or two.

    The usual limit of 1024 is there for programs that use ``select``, and too low for large models.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class HostFabric(Fabric):
    """Memory of this machine that its processes can map, and threads that copy it.

    Regions are sealed memfds, granularity is the page size, and descriptors reach peers through a
    socket that only processes of the same user with the group's token are served on. Making a fabric
    raises this process's soft limit of open files to the hard one.
    """

    name = "host"
    granularity = mmap.PAGESIZE

    def __init__(self) -> None:
        raise_descriptor_limit()
        self._server: _C.DescriptorServer | None = None

    def allocate(self, num_bytes: int) -> _C.HostRegion:
        return _C.HostRegion(num_bytes)

    def reserve(self, num_bytes: int) -> HostAddressRange:
        return HostAddressRange(num_bytes)

    def event(self) -> _C.HostEvent:
        return _C.HostEvent()

    def copy_engine(self, num_lanes: int, lane_depth: int) -> _C.HostCopyEngine:
        return _C.HostCopyEngine(num_lanes, lane_depth)

    def serve(self, token: bytes) -> str:
        if self._server is not None:
            raise FabricError(f"this fabric already serves its regions at {self._server.address}")
        self._server = _C.DescriptorServer(token)
        return self._server.address

    def publish(self, name: str, regions: Sequence[Region]) -> None:
        if self._server is None:
            raise FabricError(f"{name!r} cannot be published before serve() or after close()")
        self._server.publish(name, regions)

    def fetch_regions(
        self, address: str, token: bytes, name: str, sizes: Sequence[int], timeout_s: float
    ) -> list[Region]:
        return list(_C.fetch_regions(address, token, name, sizes, timeout_s))

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
