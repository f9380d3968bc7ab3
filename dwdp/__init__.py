"""DWDP: mixture-of-experts inference in which expert weights travel and tokens stay.

The names below are imported on first use, so ``import dwdp`` loads neither torch nor pydantic.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dwdp._version import __version__

if TYPE_CHECKING:
    from dwdp.config import DwdpConfig
    from dwdp.group import Group
    from dwdp.placement import Placement, build_placement
    from dwdp.runtime import DwdpRuntime

__all__ = [
    "DwdpConfig",
    "DwdpRuntime",
    "Group",
    "Placement",
    "__version__",
    "build_placement",
]

_HOME = {
    "DwdpConfig": "dwdp.config",
    "DwdpRuntime": "dwdp.runtime",
    "Group": "dwdp.group",
    "Placement": "dwdp.placement",
    "build_placement": "dwdp.placement",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dwdp' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
