"""A process that ends with its parent. Imports next to nothing: it is a rank's first act."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends, even if neither can act any more.

    Linux takes the thread that started this process for its parent, so that has to be one that stays.

    Args:
        parent_pid: who started this process; if that is not the parent any more, it ends at once.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl(PR_SET_PDEATHSIG): {os.strerror(code)}")
    if os.getppid() != parent_pid:
        sys.exit(1)
