"""Which rank this process is: read from the launcher that started it.

torchrun, mpirun and srun tell a process its rank in the environment. MPICH's mpirun names no job, so
it needs ``DWDP_RENDEZVOUS`` besides. dwdp's own launcher uses the ``DWDP_*`` variables below, which win
over the others.

| variable | meaning |
| --- | --- |
| DWDP_RANK, DWDP_WORLD_SIZE | this process's rank and the number of ranks |
| DWDP_RENDEZVOUS | host:port of the group's store; unix:NAME for one that dwdp serves its own ranks |
| DWDP_STORE_TOKEN | what a rank presents to a store at unix:NAME |
| DWDP_STORE_IS_SERVED | 1: the launcher serves the store; otherwise rank 0 does |
| DWDP_INCARNATION | how often this rank was started before; above 0 it takes the place of a dead one |
| DWDP_ATTEMPT | keeps apart what meets at one store: groups side by side, ranks started again |
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

DWDP_RANK = "DWDP_RANK"
DWDP_WORLD_SIZE = "DWDP_WORLD_SIZE"
DWDP_RENDEZVOUS = "DWDP_RENDEZVOUS"
DWDP_STORE_IS_SERVED = "DWDP_STORE_IS_SERVED"
DWDP_STORE_TOKEN = "DWDP_STORE_TOKEN"
DWDP_INCARNATION = "DWDP_INCARNATION"
DWDP_ATTEMPT = "DWDP_ATTEMPT"

UNIX_SCHEME = "unix:"

_RANK_VARIABLES = (
    ("dwdp", DWDP_RANK, DWDP_WORLD_SIZE),
    ("torchrun", "RANK", "WORLD_SIZE"),
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("mpirun", "PMI_RANK", "PMI_SIZE"),
)
_HYDRA_LOCAL_RANK = "MPI_LOCALRANKID"
_LOCAL_RANK_VARIABLES = {
    "torchrun": ("LOCAL_RANK",),
    "mpirun": ("OMPI_COMM_WORLD_LOCAL_RANK", _HYDRA_LOCAL_RANK),
    "srun": ("SLURM_LOCALID",),
}
_JOB_VARIABLES = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "SLURM_JOB_ID", "SLURM_STEP_ID")
_FIRST_DERIVED_PORT, _NUM_DERIVED_PORTS = 20000, 10000

_LAUNCHER_PREFIXES = (
    "OMPI_",
    "PMI_",
    "PMIX_",
    "PRTE_",
    "HYDRA_",
    "MPI_LOCAL",
    "MPIR_CVAR_",
    "SLURM_",
    "TORCHELASTIC_",
)
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
# What users and container images set for any MPI program: which transports and collectives it may use, and
# on how few slots it may start others.
_KEPT_PREFIXES = (
    "OMPI_ALLOW_RUN_AS_ROOT",
    *(f"OMPI_MCA_{part}" for part in ("btl", "coll", "io", "mtl", "opal", "osc", "pml", "rmaps")),
    "PRTE_MCA_rmaps",
    "PMIX_MCA_gds",
)


class LaunchError(ValueError):
    """The launcher's environment is incomplete or contradicts itself."""


@dataclass(frozen=True)
class LaunchInfo:
    """What the launcher says about this process.

    Attributes:
        launcher: ``"dwdp"``, ``"torchrun"``, ``"mpirun"`` or ``"srun"``.
        rank: 0 to size - 1.
        size: ranks started together.
        host, port: where the group's store is, or will be; not for one that has a socket.
        store_is_served: whether somebody outside the group serves the store; otherwise rank 0 does.
        attempt: ranks of different attempts do not meet, though their store may be the same: how often
            the launcher has started the ranks before, or what DWDP_ATTEMPT says.
        incarnation: how often this rank alone was started before, while the others went on.
        socket, token: the abstract unix socket of a store on this machine, and what it has to be shown.
    """

    launcher: str
    rank: int
    size: int
    host: str
    port: int
    store_is_served: bool
    attempt: int = 0
    incarnation: int = 0
    socket: str = ""
    token: str = field(default="", repr=False)

    @property
    def rendezvous(self) -> str:
        """The store's address, as DWDP_RENDEZVOUS takes it."""
        return f"{UNIX_SCHEME}{self.socket}" if self.socket else f"{self.host}:{self.port}"


def discover_launch(environ: Mapping[str, str] = os.environ) -> LaunchInfo | None:
    """This process's rank, or None when no launcher started it.

    Raises:
        LaunchError: a variable is missing, is no number, or the rank is outside the size.
    """
    found = find_rank(environ)
    if found is None:
        return None
    launcher, rank, size = found
    name = _socket_name(environ)
    host, port = ("", 0) if name else _rendezvous(environ, launcher)
    # The agent of torchrun serves a store at its own address, not at one that the user names.
    served = (
        environ.get(DWDP_STORE_IS_SERVED) == "1"
        if DWDP_RENDEZVOUS in environ
        else environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    )
    attempt_key = "TORCHELASTIC_RESTART_COUNT" if launcher == "torchrun" else DWDP_ATTEMPT
    attempt = _number(environ, launcher, attempt_key) if attempt_key in environ else 0
    incarnation = _number(environ, launcher, DWDP_INCARNATION) if DWDP_INCARNATION in environ else 0
    token = environ.get(DWDP_STORE_TOKEN, "")
    return LaunchInfo(
        launcher, rank, size, host, port, served or bool(name), attempt, incarnation, name, token
    )


def find_rank(environ: Mapping[str, str] = os.environ) -> tuple[str, int, int] | None:
    """The launcher, this process's rank and the number of ranks; None when no launcher started it.

    Raises:
        LaunchError: a variable is missing, is no number, or the rank is outside the size.
    """
    found = _find_launcher(environ)
    if found is None:
        return None
    launcher, rank_key, size_key = found
    if launcher == "srun" and environ.get(size_key) == "1":
        return None  # A shell in an allocation is a step of one task.
    rank, size = _number(environ, launcher, rank_key), _number(environ, launcher, size_key)
    if not 0 <= rank < size:
        raise LaunchError(
            f"{launcher} says rank {rank} of {size} ({rank_key}, {size_key}): "
            "a rank lies between 0 and the size less one"
        )
    return launcher, rank, size


def find_local_rank(launcher: str, environ: Mapping[str, str] = os.environ) -> int | None:
    """How many ranks of lower number ``launcher`` started on this host; None if it does not say.

    Raises:
        LaunchError: it says something that is no number.
    """
    for key in _LOCAL_RANK_VARIABLES.get(launcher, ()):
        if key in environ:
            return _number(environ, launcher, key)
    return None


def without_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` for a process that must not take itself for one of a launcher's ranks.

    Left out is what mpirun, srun and torchrun tell their ranks. ``DWDP_*`` is kept, and so are Open MPI's
    settings that say which transports to use.
    """
    return {
        key: value
        for key, value in environ.items()
        if key.startswith(_KEPT_PREFIXES)
        or not (key in _LAUNCHER_VARIABLES or key.startswith(_LAUNCHER_PREFIXES))
    }


def _find_launcher(environ: Mapping[str, str]) -> tuple[str, str, str] | None:
    # salloc and sbatch set SLURM_PROCID too; only a step started by srun has a step's id.
    is_step = "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ
    for launcher, rank_key, size_key in _RANK_VARIABLES:
        # srun --mpi=pmi2 sets the PMI's variables as well, and says more about the rank in its own.
        is_sruns = rank_key == "PMI_RANK" and is_step and _HYDRA_LOCAL_RANK not in environ
        if rank_key in environ and not is_sruns:
            return launcher, rank_key, size_key
    if is_step:
        # A step may have fewer tasks than the allocation was made for.
        size_key = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
        return "srun", "SLURM_PROCID", size_key
    return None


def _number(environ: Mapping[str, str], launcher: str, key: str) -> int:
    text = environ.get(key)
    if text is None:
        raise LaunchError(f"{launcher} set no {key}; start every rank with the same launcher")
    try:
        return int(text)
    except ValueError:
        raise LaunchError(f"{key}={text!r} (set by {launcher}) is not a number") from None


def _socket_name(environ: Mapping[str, str]) -> str:
    """Of the store that dwdp serves its own ranks; empty for one that has a host and a port."""
    address = environ.get(DWDP_RENDEZVOUS, "")
    return address.removeprefix(UNIX_SCHEME) if address.startswith(UNIX_SCHEME) else ""


def _rendezvous(environ: Mapping[str, str], launcher: str) -> tuple[str, int]:
    if DWDP_RENDEZVOUS in environ:
        return parse_address(environ[DWDP_RENDEZVOUS], DWDP_RENDEZVOUS)
    if "MASTER_ADDR" in environ and "MASTER_PORT" in environ:
        return environ["MASTER_ADDR"], _number(environ, launcher, "MASTER_PORT")
    if launcher in ("dwdp", "torchrun"):
        raise LaunchError(f"{launcher} set no {DWDP_RENDEZVOUS} and no MASTER_ADDR and MASTER_PORT")
    # mpirun and srun name no port: every rank derives the same one from the job's name.
    job = ".".join(environ[key] for key in _JOB_VARIABLES if key in environ)
    if not job:
        raise LaunchError(f"{launcher} names no job; set {DWDP_RENDEZVOUS}=host:port on every rank")
    num_nodes = environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES", "1"))
    local_size = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    if launcher == "mpirun" and local_size is not None:
        # It may use less than its allocation has.
        num_nodes = "1" if local_size == environ.get("OMPI_COMM_WORLD_SIZE") else "several"
    if num_nodes != "1":
        raise LaunchError(
            f"{launcher} runs on {num_nodes} nodes; set {DWDP_RENDEZVOUS}=host:port on every rank, "
            "with the node of rank 0"
        )
    return "127.0.0.1", _FIRST_DERIVED_PORT + zlib.crc32(job.encode()) % _NUM_DERIVED_PORTS


def parse_address(text: str, what: str) -> tuple[str, int]:
    """``"host:port"`` as a pair.

    Raises:
        LaunchError: not of that form, or the port is not between 1 and 65535.
    """
    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise LaunchError(f"{what}={text!r} is not host:port")
    return host, int(port)
