"""The environment of a rank process that this command starts itself."""

from __future__ import annotations

import os
from typing import Any

from dwdp.launch import (
    DWDP_ATTEMPT,
    DWDP_INCARNATION,
    DWDP_RANK,
    DWDP_RENDEZVOUS,
    DWDP_STORE_IS_SERVED,
    DWDP_WORLD_SIZE,
    without_launcher,
)

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def rank_environment(
    rank: int, size: int, *, rendezvous: str, incarnation: int, num_threads: int | None
) -> dict[str, str]:
    """This process's environment, with what tells ``rank`` its place and nothing of any launcher.

    Args:
        rendezvous: host:port of the group's store, which this command serves.
        incarnation: how often the rank was started in this group before.
        num_threads: compute threads of the rank; None leaves them as they are.
    """
    own: dict[str, Any] = {
        DWDP_RANK: rank,
        DWDP_WORLD_SIZE: size,
        DWDP_RENDEZVOUS: rendezvous,
        DWDP_STORE_IS_SERVED: 1,
        DWDP_INCARNATION: incarnation,
        DWDP_ATTEMPT: 0,
    }
    if num_threads is not None:
        own |= dict.fromkeys(_THREAD_VARIABLES, num_threads)
    return without_launcher(os.environ) | {key: str(value) for key, value in own.items()}
