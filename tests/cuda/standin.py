"""The stand-in driver: built, loaded under the real one's name, steered, and looked into.

Loading it makes a later ``dlopen("libcuda.so.1")`` find it, because of its SONAME.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "standin"
LIBRARY = FOLDER / "build" / "libcuda.so.1"

# Kinds of things that must be gone when whoever took them is.
KINDS = (
    "handles",
    "mappings",
    "reservations",
    "allocations",
    "memory_bytes",
    "streams",
    "events",
    "graphs",
    "graph_execs",
    "modules",
    "contexts",
    "current",
    "descriptors",
    "orphans",
)


def cuda_home() -> Path | None:
    """The toolkit whose headers the stand-in is built with; None where there is none."""
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home and (Path(home) / "include" / "cudaTypedefs.h").exists():
            return Path(home)
    return None


def build() -> None:
    done = subprocess.run(
        ["make", "-C", str(FOLDER), "-j2", f"CUDA_HOME={cuda_home()}"],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the stand-in driver does not build:\n{done.stdout}{done.stderr}")


def real_device() -> bool:
    """Whether this machine has a CUDA device. Asked in another process, to load nothing here."""
    probe = (
        "import ctypes; cuda = ctypes.CDLL('libcuda.so.1'); count = ctypes.c_int(); "
        "assert cuda.cuInit(0) == 0 == cuda.cuDeviceGetCount(ctypes.byref(count)) and count.value"
    )
    return subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 0


class Standin:
    """The loaded stand-in of this process."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(LIBRARY))
        self.library.standin_calls.restype = ctypes.c_int64
        self.library.standin_misuses.restype = ctypes.c_int64
        self.library.standin_live.restype = ctypes.c_int64
        self.library.standin_fault_raised.restype = ctypes.c_char_p

    def set(self, name: str, value: object) -> None:
        """A setting of the stand-in, such as ``JITTER_US``, from now on and for this process."""
        self.library.standin_set(f"STANDIN_{name}".encode(), str(value).encode())

    def fail(self, name: str, nth: int = 1, code: int = 2) -> None:
        """The ``nth`` call of ``name`` from now on fails; ``"*"`` is any that does not give back."""
        self.library.standin_fail(name.encode(), ctypes.c_int64(nth), code)

    def fault_raised(self) -> str:
        """Where the last fault was raised; empty while it was not."""
        return str(self.library.standin_fault_raised().decode())

    def calls(self, name: str) -> int:
        return int(self.library.standin_calls(name.encode()))

    def misuses(self, what: str) -> int:
        """Calls so far that a GPU's driver might not survive: ``"dead stream"``, ``"unknown version"``."""
        return int(self.library.standin_misuses(what.encode()))

    def live(self) -> dict[str, int]:
        return {kind: int(self.library.standin_live(kind.encode())) for kind in KINDS}

    def context_error(self, device: int = 0) -> int:
        """The error that broke the context for good; 0 while it works."""
        return int(self.library.standin_context_error(device))
