"""Memory that peers can map and engines that copy it, one module per kind of device."""

from __future__ import annotations

from dwdp import _C
from dwdp.fabric.base import AddressRange, Copy, CopyEngine, Event, Fabric, FabricError, Region

__all__ = [
    "AddressRange",
    "Copy",
    "CopyEngine",
    "Event",
    "Fabric",
    "FabricError",
    "Region",
    "create_fabric",
]


def create_fabric(name: str, *, ordinal: int = 0, across_hosts: bool = False) -> Fabric:
    """The fabric called ``name``: ``"host"`` or ``"cuda"``.

    Args:
        ordinal: the CUDA device.
        across_hosts: whether the ranks run on several hosts.

    Raises:
        ValueError: there is no fabric of that name.
        FabricError: it cannot be used on this machine; the text says why.
    """
    if name == "host":
        from dwdp.fabric.host import HostFabric

        return HostFabric()
    if name == "cuda":
        if _C.build_info()["fabrics"] != "host+cuda":
            raise FabricError(
                "this build of dwdp has no CUDA fabric: build it where nvcc is (set CUDA_HOME if it is "
                "not found)"
            )
        from dwdp.fabric.cuda import CudaFabric

        return CudaFabric(ordinal, across_hosts=across_hosts)
    raise ValueError(f"there is no fabric {name!r}: use 'host' or 'cuda'")
