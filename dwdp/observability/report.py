"""The report of one run, as a versioned JSON document. docs/report.md explains it for readers.

``python -m dwdp.observability.report`` prints its JSON Schema, which docs/report.schema.json holds.
"""

from __future__ import annotations

import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from dwdp.config import DwdpConfig


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelReport(_Document):
    """The model that ran."""

    path: str = Field(description="Checkpoint directory, as it was given.")
    model_type: str = Field(description="Transformers' name of the architecture.")
    num_layers: int = Field(description="Decoder layers.")
    num_moe_layers: int = Field(description="Decoder layers with experts.")
    num_experts: int = Field(
        description="Experts of an MoE layer (the largest number, where layers differ)."
    )
    dtype: str = Field(description="Type of the weights in memory.")


class SamplingReport(_Document):
    """How tokens were chosen."""

    max_new_tokens: int = Field(description="Tokens generated per prompt at most.")
    temperature: float = Field(
        ge=0, allow_inf_nan=False, description="0: the likeliest token each time."
    )
    seed: int = Field(description="Seed of the first prompt; each further prompt uses one more.")


class RankReport(_Document):
    """One rank. For a rank that was lost: as of the last prompt that it finished."""

    rank: int = Field(description="0 to dwdp_size - 1.")
    num_prompts: int = Field(description="Prompts that this rank finished.")
    prompt_tokens: int = Field(description="Tokens of those prompts.")
    generated_tokens: int = Field(description="Tokens generated for them, end tokens included.")
    wall_s: float = Field(description="Seconds from its first prompt to the end of its last.")
    tokens_per_s: float = Field(description="generated_tokens / wall_s.")
    dense_bytes: int = Field(
        description="Weights that every rank holds whole: everything but the experts."
    )
    resident_expert_bytes: int = Field(
        description="Physical memory of the experts that this rank stores, page edges included."
    )
    staging_bytes: int = Field(
        description="Physical memory of the staging slots (0 in direct mode)."
    )
    num_slots: int = Field(description="Staging slots in use (0 in direct mode).")
    num_fetches: int = Field(
        description="Fetches of all remote experts of a layer, started since the rank was set up."
    )
    num_demands: int = Field(description="Fetches of a layer's activated experts, after routing.")
    fetched_bytes: int = Field(description="Bytes that all of those fetches move.")
    num_waits: int = Field(
        description="Times that compute found a layer's fetch unfinished; fetches on demand do not count."
    )
    exposed_wait_s: float = Field(
        description="Seconds that compute stood still because of that, or for a fetch on demand."
    )
    load_s: float = Field(description="Seconds that loading the checkpoint took.")
    peak_rss_bytes: int = Field(
        description="Most memory resident at once, with pages shared with peers counted in full."
    )


class Totals(_Document):
    """The group as a whole."""

    num_prompts: int = Field(description="Prompts of the run.")
    prompt_tokens: int = Field(description="Tokens of all prompts.")
    generated_tokens: int = Field(description="Tokens generated for all prompts.")
    wall_s: float = Field(
        description="Seconds from handing out the first prompt to the end of the last; loading is not in it."
    )
    tokens_per_s: float = Field(description="generated_tokens / wall_s.")
    dense_bytes: int = Field(description="Sum over the ranks.")
    resident_expert_bytes: int = Field(description="Sum over the ranks.")
    staging_bytes: int = Field(description="Sum over the ranks.")
    num_fetches: int = Field(description="Sum over the ranks.")
    num_demands: int = Field(description="Sum over the ranks.")
    fetched_bytes: int = Field(description="Sum over the ranks.")
    exposed_wait_s: float = Field(description="Sum over the ranks.")


class GenerateReport(_Document):
    """What ``dwdp generate --report`` writes."""

    schema_version: Literal[2] = Field(
        default=2,
        description="Version of this document.",
    )
    dwdp_version: str = Field(description="Version of dwdp that ran.")
    launcher: str = Field(description="Who started the ranks: dwdp, torchrun, mpirun or srun.")
    model: ModelReport = Field(description="The model that ran, see below.")
    sampling: SamplingReport = Field(description="How tokens were chosen, see below.")
    device: str = Field(description="What the ranks compute on.")
    threads_per_rank: int = Field(description="Compute threads of each rank.")
    fetch_mode: str = Field(
        description="The mode in force: direct, staged, demand, or auto (demand for steps of few tokens, "
        "staged for the others)."
    )
    config: DwdpConfig = Field(
        description="The group's options as they were given, by the names of their flags."
    )
    ranks: tuple[RankReport, ...] = Field(description="In rank order, lost ones included.")
    lost_ranks: tuple[int, ...] = Field(
        description="Ranks that died while they generated; the others finished their prompts."
    )
    totals: Totals = Field(description="The group as a whole, see below.")


def total(ranks: tuple[RankReport, ...], wall_s: float) -> Totals:
    """The totals of ``ranks`` over a run of ``wall_s`` seconds."""
    generated_tokens = sum(rank.generated_tokens for rank in ranks)
    return Totals(
        num_prompts=sum(rank.num_prompts for rank in ranks),
        prompt_tokens=sum(rank.prompt_tokens for rank in ranks),
        generated_tokens=generated_tokens,
        wall_s=wall_s,
        tokens_per_s=per_second(generated_tokens, wall_s),
        dense_bytes=sum(rank.dense_bytes for rank in ranks),
        resident_expert_bytes=sum(rank.resident_expert_bytes for rank in ranks),
        staging_bytes=sum(rank.staging_bytes for rank in ranks),
        num_fetches=sum(rank.num_fetches for rank in ranks),
        num_demands=sum(rank.num_demands for rank in ranks),
        fetched_bytes=sum(rank.fetched_bytes for rank in ranks),
        exposed_wait_s=sum(rank.exposed_wait_s for rank in ranks),
    )


def per_second(count: int, seconds: float) -> float:
    """``count / seconds``, and 0 for a rank that did nothing."""
    return count / seconds if seconds > 0 else 0.0


def schema_text() -> str:
    """The JSON Schema of :class:`GenerateReport`."""
    return json.dumps(GenerateReport.model_json_schema(mode="serialization"), indent=2) + "\n"


if __name__ == "__main__":
    print(schema_text(), end="")
