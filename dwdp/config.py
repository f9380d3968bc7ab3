"""Every option of dwdp, defined once. CLI flags and YAML keys are derived from the fields below."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_RANKS = 72
"""Ranks of one NVLink domain (NVL72), the largest group that placement is built and tested for."""

FetchMode = Literal["staged", "direct", "demand", "auto"]


class DwdpConfig(BaseModel):
    """Options of one DWDP group, the same on every rank.

    Raises:
        pydantic.ValidationError: an unknown key, or a value outside its range; the text names both.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dwdp_size: int = Field(
        default=1,
        ge=1,
        le=MAX_RANKS,
        description="Ranks in the group; together they hold every expert.",
    )
    num_groups: int = Field(
        default=1,
        ge=1,
        description="Groups that one launcher starts side by side, each with every expert; it starts "
        "num_groups x dwdp_size ranks, the first group's first.",
    )
    num_experts_per_worker: int | None = Field(
        default=None,
        ge=1,
        description="Experts each rank stores per layer. Default: an even share; more than that stores "
        "some experts on several ranks, so that less is fetched.",
    )
    num_prefetch_experts: int | None = Field(
        default=None,
        ge=1,
        description="Distance between the first experts of neighbouring ranks: rank r stores experts "
        "[r*P, r*P + num_experts_per_worker). Default: ranks are spread evenly over the experts.",
    )
    fetch_mode: FetchMode = Field(
        default="auto",
        description="How remote experts are read: staged (copied ahead into a ring of slots), direct "
        "(from the peer's memory, without a copy), demand (only activated ones are copied, after "
        "routing), or auto (direct where the fabric is shared host memory; on GPUs demand for steps of "
        "few tokens and staged for the others).",
    )
    demand_max_tokens: int | None = Field(
        default=None,
        ge=0,
        description="Steps of at most this many tokens fetch on demand (auto, on GPUs). Default: as the "
        "performance model expects for the device.",
    )
    num_slots: int = Field(
        default=2,
        ge=2,
        description="Staging slots of the ring (staged, auto). One more is used when the number of MoE "
        "layers is odd and only 2 are given, because the last layer and the first must not share one.",
    )
    slice_bytes: int = Field(
        default=4 << 20, ge=4096, description="Largest piece of one copy, in bytes (staged)."
    )
    num_lanes: int | None = Field(
        default=None,
        ge=1,
        description="Sources read at the same time (staged). Default: all of them.",
    )
    lane_depth: int = Field(
        default=1, ge=1, le=16, description="Slices in flight per source (staged)."
    )
    contention_opt: bool = Field(
        default=True,
        description="Read from all sources at once, in slices and in rotated order, so that no two ranks "
        "start on the same source (staged). Without it one source is read after the other, whole and in "
        "the order of ranks, and slice_bytes and num_lanes do nothing.",
    )
    setup_timeout_s: float = Field(
        default=600.0,
        gt=0,
        le=86_400,
        description="Seconds a rank waits for its peers while the group is set up.",
    )

    @model_validator(mode="after")
    def _check_prefetch(self) -> DwdpConfig:
        share, distance = self.num_experts_per_worker, self.num_prefetch_experts
        if share is not None and distance is not None and distance > share:
            raise ValueError(
                f"num_prefetch_experts ({distance}) is larger than num_experts_per_worker ({share}): "
                f"the experts between two ranks would be stored nowhere. Use at most {share}."
            )
        return self
