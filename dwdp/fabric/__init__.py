"""Memory that peers can map and engines that copy it, one module per kind of device."""

from __future__ import annotations

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


def create_fabric(name: str) -> Fabric:
    """The fabric called ``name``.

    Raises:
        ValueError: there is no fabric of that name.
    """
    if name == "host":
        from dwdp.fabric.host import HostFabric

        return HostFabric()
    raise ValueError(f"there is no fabric {name!r}; this build has: 'host'")
