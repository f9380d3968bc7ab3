"""Starts rank processes that serve with Transformers."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from dwdp.config import DwdpConfig
from dwdp.local_store import LocalStoreServer
from dwdp.rendezvous import prefixed, report_failure, report_loss
from dwdp.serving.environment import rank_command, rank_environment
from dwdp.serving.rank_exit import EXIT_BAD_INPUT, EXIT_PEER_FAILED
from dwdp.serving.rank_server.job import RankServerJob
from dwdp.serving.rank_server.options import RankOptions
from dwdp.serving.supervisor.interface import RankEndpoint, RankStart


class TransformersRanks:
    """A :class:`~dwdp.serving.supervisor.interface.RankLauncher` for checkpoints that Transformers runs.

    Args:
        model_name: what requests call the model.
        dtype, device: as in :func:`dwdp.engines.transformers.load`.
        num_threads: compute threads of each rank.
    """

    exit_bad_input = EXIT_BAD_INPUT
    exit_peer_failed = EXIT_PEER_FAILED

    def __init__(
        self,
        model_dir: Path,
        model_name: str,
        config: DwdpConfig,
        options: RankOptions,
        *,
        dtype: str,
        num_threads: int,
        device: str = "cpu",
    ) -> None:
        self.num_ranks = config.dwdp_size
        self._model_dir = model_dir
        self.model_name = model_name
        self._config = config
        self._options = options
        self._dtype = dtype
        self._device = device
        self._num_threads = num_threads
        self._token = secrets.token_hex(16)
        self._store: LocalStoreServer | None = None

    def new_group(self) -> None:
        """Serve a fresh store; the store before goes with its group."""
        if self._store is not None:
            self._store.close()
        self._store = LocalStoreServer()

    def start(self, rank: int, incarnation: int) -> RankStart:
        """See :class:`~dwdp.serving.supervisor.interface.RankLauncher`."""
        assert self._store is not None
        endpoint = RankEndpoint(
            socket=f"dwdp-rank-{secrets.token_hex(8)}",
            headers={"Authorization": f"Bearer {self._token}"},
        )
        assert endpoint.socket is not None
        job = RankServerJob(
            model_dir=str(self._model_dir),
            served_model_name=self.model_name,
            dtype=self._dtype,
            device=self._device,
            num_threads=self._num_threads,
            config=self._config,
            options=self._options,
            socket=endpoint.socket,
            token=self._token,
            parent_pid=os.getpid(),
        )
        return RankStart(
            arguments=rank_command("dwdp.serving.rank_server.process"),
            environment=rank_environment(
                rank,
                self.num_ranks,
                rendezvous=self._store.address,
                store_token=self._store.token,
                incarnation=incarnation,
                num_threads=self._num_threads,
            ),
            stdin=job.model_dump_json().encode() + b"\n",
            endpoint=endpoint,
        )

    def report_death(self, rank: int, message: str) -> None:
        """See :class:`~dwdp.serving.supervisor.interface.RankLauncher`."""
        store = prefixed(self._store)
        report_failure(store, rank, message)  # for ranks that set up the group
        report_loss(store, rank, message)  # for ranks that rejoin it
