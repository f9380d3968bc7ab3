"""The command line and the environment of a rank process that this command starts itself."""

from __future__ import annotations

import os
import sys
from typing import Any

from dwdp.launch import (
    DWDP_ATTEMPT,
    DWDP_INCARNATION,
    DWDP_RANK,
    DWDP_RENDEZVOUS,
    DWDP_STORE_IS_SERVED,
    DWDP_STORE_TOKEN,
    DWDP_WORLD_SIZE,
    without_launcher,
)

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


# Ctrl-C reaches every process of the terminal; what becomes of a rank is for this command to say. The
# module search path is handed on, so that a rank imports the same dwdp wherever it runs.
_PROGRAM = """\
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
parent, module, path = sys.argv[1:]
sys.path[:] = path.split("\\n")
from dwdp.serving.lifetime import end_with_parent
end_with_parent(int(parent))
from importlib import import_module
sys.exit(import_module(module).main())
"""


def rank_command(module: str) -> list[str]:
    """What starts a process that runs ``module``'s ``main`` and ends when this one does."""
    own = [str(os.getpid()), module, "\n".join(sys.path)]
    return [sys.executable, "-c", _PROGRAM, *own]


def rank_environment(
    rank: int,
    size: int,
    *,
    rendezvous: str,
    incarnation: int,
    num_threads: int | None,
    store_token: str = "",
) -> dict[str, str]:
    """This process's environment, with what tells ``rank`` its place and nothing of any launcher.

    Args:
        rendezvous: address of the group's store, which this command serves.
        store_token: what that store has to be shown; none for a TCPStore.
        incarnation: how often the rank was started in this group before.
        num_threads: compute threads of the rank; None leaves them as they are.
    """
    own: dict[str, Any] = {
        DWDP_RANK: rank,
        DWDP_WORLD_SIZE: size,
        DWDP_RENDEZVOUS: rendezvous,
        DWDP_STORE_IS_SERVED: 1,
        DWDP_STORE_TOKEN: store_token,
        DWDP_INCARNATION: incarnation,
        DWDP_ATTEMPT: 0,
    }
    if num_threads is not None:
        own |= dict.fromkeys(_THREAD_VARIABLES, num_threads)
    return without_launcher(os.environ) | {key: str(value) for key, value in own.items()}
