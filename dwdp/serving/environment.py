"""The environment of a rank process that this command starts itself."""

from __future__ import annotations

import os
from typing import Any

from dwdp.launch import (
    DWDP_INCARNATION,
    DWDP_RANK,
    DWDP_RENDEZVOUS,
    DWDP_STORE_IS_SERVED,
    DWDP_WORLD_SIZE,
)

# A rank must not take itself for one of the launcher that this command may have been started by.
_LAUNCHER_PREFIXES = ("OMPI_", "PMI_", "PMIX_", "SLURM_", "TORCHELASTIC_")
_LAUNCHER_VARIABLES = frozenset(
    {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
    }
)
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def rank_environment(
    rank: int, size: int, *, rendezvous: str, incarnation: int, num_threads: int
) -> dict[str, str]:
    """This process's environment, with what tells ``rank`` its place and nothing of any launcher.

    Args:
        rendezvous: host:port of the group's store, which this command serves.
        incarnation: how often the rank was started in this group before.
        num_threads: compute threads of the rank.
    """
    inherited = {
        key: value
        for key, value in os.environ.items()
        if key not in _LAUNCHER_VARIABLES and not key.startswith(_LAUNCHER_PREFIXES)
    }
    own: dict[str, Any] = {
        DWDP_RANK: rank,
        DWDP_WORLD_SIZE: size,
        DWDP_RENDEZVOUS: rendezvous,
        DWDP_STORE_IS_SERVED: 1,
        DWDP_INCARNATION: incarnation,
        **dict.fromkeys(_THREAD_VARIABLES, num_threads),
    }
    return inherited | {key: str(value) for key, value in own.items()}
