"""A whole group on one machine: ``trtllm-serve`` rank processes behind dwdp's router.

Every rank is this same command, on a loopback port of its own, with one GPU, and with nothing of any
launcher in its environment.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import socket
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dwdp.config import DwdpConfig
from dwdp.engines.tensorrt_llm.launch import DWDP_SUPERVISOR_PID, group_devices
from dwdp.engines.tensorrt_llm.rank_stats import STATS_PATH
from dwdp.local_store import LocalStoreServer
from dwdp.rendezvous import GroupError, prefixed, report_failure, report_loss
from dwdp.serving.dispatcher import BadInput, SetupFailed
from dwdp.serving.environment import rank_environment
from dwdp.serving.rank_exit import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_PEER_FAILED
from dwdp.serving.router.service import Service, run_service
from dwdp.serving.router.settings import RouterSettings
from dwdp.serving.supervisor.interface import RankEndpoint, RankStart
from dwdp.serving.supervisor.life import Watch

HOST = "127.0.0.1"
_FIRST_PORT = 10000
_EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_HEALTH = "/health"
_API_KEYS = "DWDP_API_KEY"
_LOADING_S = 3600.0
"""Reading a checkpoint and warming up take this long at most; then a rank that is not ready is killed."""


class TrtllmRanks:
    """A :class:`~dwdp.serving.supervisor.interface.RankLauncher` for ranks that ``trtllm-serve`` runs.

    Args:
        config: of the group.
        command: program and arguments of this process, without an address to listen on.
        devices: what ``CUDA_VISIBLE_DEVICES`` is for each rank.
    """

    exit_bad_input = EXIT_BAD_INPUT
    exit_peer_failed = EXIT_PEER_FAILED

    def __init__(self, config: DwdpConfig, command: Sequence[str], devices: Sequence[str]) -> None:
        self.num_ranks = config.dwdp_size
        self._command = list(command)
        self._devices = list(devices)
        self._ports: dict[int, int] = {}
        self._store: LocalStoreServer | None = None

    def new_group(self) -> None:
        """Serve a fresh store; the store before goes with its group."""
        if self._store is not None:
            self._store.close()
        self._store = LocalStoreServer()

    def start(self, rank: int, incarnation: int) -> RankStart:
        """See :class:`~dwdp.serving.supervisor.interface.RankLauncher`."""
        assert self._store is not None
        port = self._ports[rank] = _free_port(self._ports.values())
        environment = rank_environment(
            rank,
            self.num_ranks,
            rendezvous=self._store.address,
            store_token=self._store.token,
            incarnation=incarnation,
            num_threads=None,
        )
        environment["CUDA_VISIBLE_DEVICES"] = self._devices[rank]
        environment[DWDP_SUPERVISOR_PID] = str(os.getpid())
        return RankStart(
            # Of an option that is given twice the last counts.
            arguments=[*self._command, "--host", HOST, "--port", str(port)],
            environment=environment,
            stdin=b"",
            endpoint=RankEndpoint(
                base_url=f"http://{HOST}:{port}",
                live_path=_HEALTH,
                ready_path=_HEALTH,
                stats_path=STATS_PATH,
            ),
        )

    def report_death(self, rank: int, message: str) -> None:
        """See :class:`~dwdp.serving.supervisor.interface.RankLauncher`."""
        store = prefixed(self._store)
        report_failure(store, rank, message)
        report_loss(store, rank, message)


def serve_group(config: DwdpConfig, llm_args: Mapping[str, Any], *, host: str, port: int) -> int:
    """Start the ranks and serve one endpoint for them until SIGTERM or SIGINT; the exit code.

    What is wrong is said in one line on standard error.
    """
    logging.basicConfig(level=logging.INFO, format="dwdp: %(message)s")
    try:
        if config.num_groups != 1:
            raise ValueError(
                f"num_groups is {config.num_groups}: without a launcher one command starts one group; start "
                "it once per group, or all ranks with srun or mpirun"
            )
        devices = group_devices(config.dwdp_size, _device_count(), os.environ)
        ranks = TrtllmRanks(config, _own_command(), devices)
        model = served_name(str(llm_args["model"]))
        return run_service(lambda: _new_service(ranks, model, config, host=host, port=port))
    except (ValueError, BadInput) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except (SetupFailed, GroupError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED


def _new_service(
    ranks: TrtllmRanks, model: str, config: DwdpConfig, *, host: str, port: int
) -> Service:
    return Service(
        ranks,
        model,
        RouterSettings(),
        host=host,
        port=port,
        keys=os.environ.get(_API_KEYS, "").split(),
        relays=True,
        watch=Watch(start_timeout_s=config.setup_timeout_s + _LOADING_S),
        announce=_announce,
    )


def _announce(url: str, num_ranks: int) -> None:
    print(f"dwdp: ready at {url} with {num_ranks} rank(s)", flush=True)


def served_name(model: str) -> str:
    """What ``trtllm-serve`` calls ``model`` in its answers: a folder's own name, or all of it."""
    path = Path(model)
    return path.name if path.is_dir() else model


def _own_command() -> list[str]:
    """What this process was started with, as a script or with ``python -m``."""
    spec = sys.modules["__main__"].__spec__
    program = [sys.argv[0]] if spec is None else ["-m", spec.name]
    return [sys.executable, *program, *sys.argv[1:]]


def _device_count() -> int:
    import torch

    return torch.cuda.device_count()


def _free_port(given: Collection[int]) -> int:
    """A port that the kernel gives to no other socket by itself: a rank binds it a minute later.

    Raises:
        OSError: none is free.
    """
    first, last = map(int, _EPHEMERAL_PORTS.read_text().split())
    candidates = [*range(_FIRST_PORT, first), *range(last + 1, 1 << 16)]
    random.shuffle(candidates)
    for port in candidates:
        if port in given:
            continue
        with socket.socket() as probe, suppress(OSError):
            probe.bind((HOST, port))
            return port
    raise OSError(
        errno.EADDRINUSE,
        f"no free port outside the ephemeral ones ({first} to {last}, {_EPHEMERAL_PORTS})",
    )
