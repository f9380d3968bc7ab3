"""Which rank of which group a TensorRT-LLM process is. Standard library only: it runs before any import.

TensorRT-LLM initialises MPI when it is imported. As one of N processes of an mpirun or srun it would take
itself for rank r of one N-GPU model, so a process that is to be a DWDP rank forgets its launcher first:
:func:`prepare_process` remembers the environment, takes the launcher's variables out of it and leaves the
process one GPU. :func:`rank_of_process` reads the rank from what was remembered, once the configuration is
known. The result travels to the worker in ``env_overrides``.

| variable | meaning |
| --- | --- |
| DWDP_PARALLEL | ``dwdp``: this process is to be a rank; for programs, as ``trtllm-serve`` has options |
| DWDP_PREPARED | 1: this process, or the one that started it, has been through ``prepare_process`` |
| DWDP_SERVER_PID | the process that a worker belongs to, and ends with |
| DWDP_SUPERVISOR_PID | the process that started this rank, and that it ends with |
"""

from __future__ import annotations

import os
import re
import select
import sys
import threading
import time
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dwdp.launch import (
    DWDP_ATTEMPT,
    DWDP_INCARNATION,
    DWDP_RANK,
    DWDP_RENDEZVOUS,
    DWDP_STORE_IS_SERVED,
    DWDP_STORE_TOKEN,
    DWDP_WORLD_SIZE,
    LaunchError,
    discover_launch,
    find_local_rank,
    find_rank,
    without_launcher,
)
from dwdp.serving.lifetime import end_with_parent

if TYPE_CHECKING:
    from dwdp.config import DwdpConfig

DWDP_PARALLEL = "DWDP_PARALLEL"
DWDP_PREPARED = "DWDP_PREPARED"
DWDP_SERVER_PID = "DWDP_SERVER_PID"
DWDP_SUPERVISOR_PID = "DWDP_SUPERVISOR_PID"
INSTANCE_INDEX = "TLLM_DISAGG_INSTANCE_IDX"
"""Set by ``trtllm-serve disaggregated_mpi_worker``: the number of the server in its file, contexts first."""

_POLL_S = 0.5
_VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
_OTHER_COMMANDS = ("disaggregated", "disaggregated_mpi_worker", "mm_embedding_serve")
_YAML_OPTIONS = ("--config", "--extra_llm_api_options")
_YAML_PARALLEL = re.compile(r"""^parallel\s*:\s*["']?dwdp["']?\s*(#.*)?$""", re.MULTILINE)


@dataclass(frozen=True)
class RankPlace:
    """One rank's place.

    Attributes:
        rank, size: in its group.
        group: which of the launcher's groups; it has ``num_groups``.
        rendezvous, token: address of the store where the group meets, and what it has to be shown.
        is_served: whether a process outside the group serves the store; otherwise the group's rank 0 does.
        attempt: keeps this group's keys apart from others' in the same store.
        incarnation: how often this rank was started in its group before.
    """

    rank: int
    size: int
    rendezvous: str
    group: int = 0
    num_groups: int = 1
    is_served: bool = False
    attempt: int = 0
    incarnation: int = 0
    token: str = field(default="", repr=False)

    def variables(self) -> dict[str, str]:
        """The environment that tells a worker this place."""
        return {
            DWDP_RANK: str(self.rank),
            DWDP_WORLD_SIZE: str(self.size),
            DWDP_RENDEZVOUS: self.rendezvous,
            DWDP_STORE_IS_SERVED: str(int(self.is_served)),
            DWDP_ATTEMPT: str(self.attempt),
            DWDP_INCARNATION: str(self.incarnation),
            **({DWDP_STORE_TOKEN: self.token} if self.token else {}),
        }

    def __str__(self) -> str:
        group = f" of group {self.group}" if self.num_groups > 1 else ""
        return f"rank {self.rank} of {self.size}{group}, which meets at {self.rendezvous}"


@dataclass(frozen=True)
class _Prepared:
    """What ``prepare_process`` found.

    Attributes:
        environ: as the launcher left it.
        local_rank: ranks that the launcher started before this one on this host, and whose servers listen
            on the ports before; 0 if it did not say, or the user numbers the ranks.
        failure: why this process cannot be a rank; it is raised when the arguments are checked.
    """

    environ: Mapping[str, str]
    local_rank: int = 0
    failure: LaunchError | None = None


_prepared: _Prepared | None = None


def prepare_process(
    argv: Sequence[str] | None = None, environ: MutableMapping[str, str] = os.environ
) -> None:
    """Before TensorRT-LLM is imported: if this is to be a DWDP rank, forget the launcher and take one GPU.

    Does nothing in a process that is not asked to be one, nor in one that such a process has started.
    Never raises: what is wrong is said when the arguments are checked.
    """
    global _prepared
    if DWDP_SUPERVISOR_PID in environ:
        end_with_parent(int(environ.pop(DWDP_SUPERVISOR_PID)))
    arguments = sys.argv if argv is None else argv
    if environ.get(DWDP_PREPARED) == "1" or not _is_asked_for(arguments, environ):
        return
    _prepared = _prepare(environ)
    kept = without_launcher(environ)
    for key in [key for key in environ if key not in kept]:
        del environ[key]
    environ[DWDP_PREPARED] = "1"


def _is_asked_for(argv: Sequence[str], environ: Mapping[str, str]) -> bool:
    arguments = list(argv[1:])
    if arguments and arguments[0] in _OTHER_COMMANDS:
        return False
    if environ.get(DWDP_PARALLEL) == "dwdp" or DWDP_RANK in environ:
        return True
    values = _option_values(arguments, ("--parallel",))
    if values:
        return values[-1] == "dwdp"
    return any(_asks_for_dwdp(path) for path in _option_values(arguments, _YAML_OPTIONS)[-1:])


def _option_values(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
    values = []
    for index, argument in enumerate(arguments):
        name, separator, value = argument.partition("=")
        if name in names:
            values += [value] if separator else list(arguments[index + 1 : index + 2])
    return values


def _asks_for_dwdp(path: str) -> bool:
    """Whether a YAML file has ``parallel: dwdp`` at its top level. There is no YAML parser yet."""
    try:
        with open(path, encoding="utf-8") as file:
            return _YAML_PARALLEL.search(file.read()) is not None
    except (OSError, UnicodeDecodeError):
        return False


def _prepare(environ: MutableMapping[str, str]) -> _Prepared:
    before = dict(environ)
    launcher_only = {key: value for key, value in before.items() if key != DWDP_RANK}
    try:
        found = find_rank(launcher_only)
        if found is None or found[2] == 1:
            return _Prepared(before)
        mpi = sys.modules.get("mpi4py.MPI")
        if mpi is not None and mpi.Is_initialized():
            raise LaunchError(
                f"{found[0]} started {found[2]} processes, and MPI was initialised in this one before "
                "tensorrt_llm was imported; import tensorrt_llm first, and no mpi4py before it"
            )
        local_rank = find_local_rank(found[0], launcher_only)
        if DWDP_RANK not in before or _VISIBLE_DEVICES not in before:
            _take_one_device(found[0], local_rank, environ)
        # Whoever numbers the ranks gives them their ports as well.
        return _Prepared(before, 0 if DWDP_RANK in before else local_rank or 0)
    except LaunchError as error:
        return _Prepared(before, failure=error)


def _take_one_device(
    launcher: str, local_rank: int | None, environ: MutableMapping[str, str]
) -> None:
    visible = environ.get(_VISIBLE_DEVICES)
    devices = None if visible is None else visible.split(",")
    if devices is not None and len(devices) == 1:
        return
    if local_rank is None:
        raise LaunchError(
            f"{launcher} does not say how many ranks of this host come before this one; set "
            f"{_VISIBLE_DEVICES} to one GPU for every rank"
        )
    if devices is not None and local_rank >= len(devices):
        raise LaunchError(
            f"{_VISIBLE_DEVICES}={visible} has {len(devices)} GPUs, but {launcher} started at least "
            f"{local_rank + 1} ranks on this host; every rank needs one of its own"
        )
    environ[_VISIBLE_DEVICES] = str(local_rank) if devices is None else devices[local_rank]


def rank_of_process(
    config: DwdpConfig,
    *,
    rank: int | None = None,
    rendezvous: str | None = None,
    environ: Mapping[str, str] = os.environ,
) -> RankPlace | None:
    """This process's place among the ``config.num_groups x config.dwdp_size`` ranks of its launcher.

    Args:
        rank: its number among all of them, if the user gives one.
        rendezvous: host:port at which they meet, if the user gives one. The environment's wins.
        environ: this process's environment now.

    Returns:
        None in a process that no launcher started: it owns its group.

    Raises:
        LaunchError: the launcher's environment is incomplete, or was seen too late.
        ValueError: the launcher started another number of ranks than the configuration says.
    """
    if _prepared is not None and _prepared.failure is not None:
        raise _prepared.failure
    total = config.num_groups * config.dwdp_size
    known = dict(_prepared.environ if _prepared is not None else environ)
    known |= {key: value for key, value in environ.items() if key.startswith("DWDP_")}
    if rank is not None:
        known[DWDP_RANK] = str(rank)
    if rendezvous is not None:
        known.setdefault(DWDP_RENDEZVOUS, rendezvous)
    if INSTANCE_INDEX in environ and DWDP_RANK not in known:
        known[DWDP_RANK] = environ[INSTANCE_INDEX]
        _check_instance(int(environ[INSTANCE_INDEX]), config)
    if DWDP_RANK in known:
        known.setdefault(DWDP_WORLD_SIZE, str(total))
        _check_rendezvous(known)
    found = find_rank(known)
    if found is None or (found[0] != "dwdp" and found[2] == 1):
        return None
    launcher, _, size = found
    if launcher != "dwdp" and _prepared is None and environ.get(DWDP_PREPARED) != "1":
        raise LaunchError(
            f"{launcher} started {size} processes, but tensorrt_llm was imported before dwdp knew that each "
            f"of them is a rank; set {DWDP_PARALLEL}=dwdp in the environment of all "
            f"(mpirun -x {DWDP_PARALLEL}=dwdp)"
        )
    if size != total:
        raise ValueError(
            f"{launcher} started {size} ranks, but num_groups x dwdp_size is {config.num_groups} x "
            f"{config.dwdp_size}; start {total}, or change one of them"
        )
    launch = discover_launch(known)
    assert launch is not None
    group, own_rank = divmod(launch.rank, config.dwdp_size)
    return RankPlace(
        rank=own_rank,
        size=config.dwdp_size,
        rendezvous=launch.rendezvous,
        token=launch.token,
        group=group,
        num_groups=config.num_groups,
        # All groups meet at one store, which rank 0 of the first one serves unless somebody else does.
        is_served=launch.store_is_served or group > 0,
        attempt=launch.attempt * config.num_groups + group,
        incarnation=launch.incarnation,
    )


def _check_instance(index: int, config: DwdpConfig) -> None:
    total = config.num_groups * config.dwdp_size
    if index >= total:
        raise ValueError(
            f"server {index} asks for parallel dwdp, but num_groups x dwdp_size is {config.num_groups} x "
            f"{config.dwdp_size}: give context_servers num_instances {total}, and parallel and dwdp_config "
            "to context_servers alone"
        )


def _check_rendezvous(known: Mapping[str, str]) -> None:
    if DWDP_RENDEZVOUS not in known and not {"MASTER_ADDR", "MASTER_PORT"} <= known.keys():
        raise LaunchError(
            f"rank {known[DWDP_RANK]} does not know where its group meets: give every rank the same "
            f"{DWDP_RENDEZVOUS}=host:port (or rendezvous in dwdp_config), with the host of rank 0"
        )


def num_launched_ranks(environ: Mapping[str, str] = os.environ) -> int | None:
    """How many ranks this process's launcher started; None if none did.

    Raises:
        LaunchError: the launcher's environment is incomplete.
    """
    if _prepared is not None and _prepared.failure is not None:
        raise _prepared.failure
    known = dict(_prepared.environ if _prepared is not None else environ)
    if DWDP_RANK in known and DWDP_WORLD_SIZE not in known:
        return None
    found = find_rank(known)
    return None if found is None or (found[0] != "dwdp" and found[2] == 1) else found[2]


def server_port(port: int) -> int:
    """The port that this rank's server listens on: ``port`` and as many more as ranks come before it here."""
    return port + (_prepared.local_rank if _prepared is not None and port else 0)


def environment_of(llm_args: Any) -> dict[str, str]:
    """This process's environment with the ``env_overrides`` of ``llm_args``: what a worker goes by."""
    return {**os.environ, **(llm_args.env_overrides or {})}


def end_with_server(environ: Mapping[str, str] = os.environ) -> None:
    """In a worker: end this process when the one named by ``DWDP_SERVER_PID`` does, however it ends.

    An MPI worker is not the server's own child, and would keep its GPU's memory when the server is killed.
    """
    pid = int(environ.get(DWDP_SERVER_PID, "0"))
    if pid in (0, os.getpid()):
        return

    def wait() -> None:
        _wait_for_end(pid)
        os._exit(1)

    threading.Thread(target=wait, name="dwdp-server", daemon=True).start()


def _wait_for_end(pid: int) -> None:
    """Return when there is no process ``pid``."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    except OSError:  # A kernel before 5.3, or a container that does not allow the call.
        with suppress(ProcessLookupError):
            while True:
                os.kill(pid, 0)
                time.sleep(_POLL_S)
        return
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.poll()


def group_devices(num_ranks: int, num_devices: int, environ: Mapping[str, str]) -> list[str]:
    """A GPU for every rank, in the names that ``CUDA_VISIBLE_DEVICES`` uses.

    Args:
        num_devices: GPUs that this process sees.

    Raises:
        ValueError: there are fewer GPUs than ranks.
    """
    if num_devices < num_ranks:
        raise ValueError(
            f"dwdp_size is {num_ranks}, and {num_devices} GPU(s) are visible here: every rank needs one of "
            "its own. Use fewer ranks, or start them on several nodes with srun or mpirun."
        )
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    names = list(map(str, range(num_devices))) if visible is None else visible.split(",")
    return names[:num_ranks]
