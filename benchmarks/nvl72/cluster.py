"""The cluster file: what jobs need to know of the cluster. ``cluster.example.yaml`` explains its keys."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator
from sweep import read_section

from dwdp.perf.job_files import Cluster


class ClusterFile(BaseModel):
    """A cluster file. Paths are those of the cluster."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_path: str
    sbatch: tuple[str, ...] = ()
    gpus_per_node: PositiveInt = 4
    num_nodes: PositiveInt = 18
    one_nvlink_domain: bool = True
    container_image: str | None = None
    container_mounts: tuple[str, ...] = ()
    setup_command: str | None = None
    environment: dict[str, str] = {}
    numa_bind: bool = True
    start_timeout_s: PositiveInt = Field(default=3600, le=86_400)

    @field_validator("model_path")
    @classmethod
    def _absolute(cls, value: str) -> str:
        if not value.startswith("/") and not is_placeholder(value):
            raise ValueError(f"{value!r} is not an absolute path")
        return value

    @field_validator("sbatch")
    @classmethod
    def _arguments(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for argument in value:
            if not argument.startswith("-") or "\n" in argument:
                raise ValueError(
                    f"{argument!r} is not an argument of sbatch, such as --time=02:00:00"
                )
        return value

    @field_validator("container_mounts")
    @classmethod
    def _pairs(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for mount in value:
            if ":" not in mount:
                raise ValueError(f"{mount!r} is not host-path:container-path")
        return value

    @field_validator("environment")
    @classmethod
    def _variables(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise ValueError(f"{name!r} is not the name of a variable")
        return value

    def placeholders(self) -> list[str]:
        """Keys that still have a ``<...>`` of the example."""
        keys = []
        for key, value in self:
            texts = [value] if isinstance(value, str) else value
            if isinstance(texts, list | tuple) and any(is_placeholder(text) for text in texts):
                keys.append(key)
        return keys

    def for_job(self, num_nodes: int) -> Cluster:
        """What a job of ``num_nodes`` is given."""
        segment = (f"--segment={num_nodes}",) if self.one_nvlink_domain else ()
        return Cluster(
            gpus_per_node=self.gpus_per_node,
            model=self.model_path,
            sbatch=(*segment, *self.sbatch),
            container_image=self.container_image,
            container_mounts=self.container_mounts,
            environment=self.environment,
            setup_command=self.setup_command,
            numa_bind=self.numa_bind,
            start_timeout_s=self.start_timeout_s,
        )


def is_placeholder(text: str) -> bool:
    """Whether a value of the example was left as it is."""
    return re.search(r"<[^>]+>", text) is not None


def load_cluster(path: str | Path) -> ClusterFile:
    """Read a cluster file.

    Raises:
        ValueError: a key is missing, unknown or wrong; one line that names it.
    """
    cluster: ClusterFile = read_section(Path(path), ClusterFile)
    return cluster
