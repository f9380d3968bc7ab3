"""What a run comes to, as text and as a document: the completions, the trace and the report."""

from __future__ import annotations

import json
from collections.abc import Mapping

from dwdp._version import __version__
from dwdp.config import DwdpConfig
from dwdp.observability.report import GenerateReport, RankReport, SamplingReport, per_second, total
from dwdp.observability.spans import Span
from dwdp.observability.trace import trace_text
from dwdp.serving.dispatcher import Outcome
from dwdp.serving.messages import Ready
from dwdp.serving.plan import RunPlan


def completion_lines(plan: RunPlan, outcome: Outcome) -> str:
    """One JSON line per prompt, in input order. ``text`` is null if the checkpoint has no tokenizer."""
    lines = []
    for (rank, completion), prompt_id in zip(outcome.completions, plan.prompt_ids, strict=True):
        text = None
        if plan.tokenizer is not None:
            text = plan.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        record = {
            "id": prompt_id,
            "rank": rank,
            "prompt_token_ids": plan.requests[completion.index].token_ids,
            "token_ids": completion.token_ids,
            "text": text,
            "finish_reason": completion.finish_reason,
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)


def trace_of(outcome: Outcome) -> str:
    """The trace of a run whose requests asked for one: see :mod:`dwdp.observability.trace`."""
    ranks: dict[int, list[Span]] = {rank: [] for rank in range(len(outcome.counters))}
    for rank, completion in outcome.completions:
        ranks[rank] += completion.spans
    return trace_text(ranks)


def make_report(
    plan: RunPlan,
    outcome: Outcome,
    ready: Mapping[int, Ready],
    *,
    config: DwdpConfig,
    sampling: SamplingReport,
    launcher: str,
    device: str,
    threads_per_rank: int,
) -> GenerateReport:
    """The report of a run. A rank that was lost before it was ever ready is in ``lost_ranks`` alone."""
    ranks = []
    for rank, facts in sorted(ready.items()):
        counters = outcome.counters[rank]
        ranks.append(
            RankReport(
                rank=rank,
                num_prompts=counters.num_prompts,
                prompt_tokens=counters.prompt_tokens,
                generated_tokens=counters.generated_tokens,
                wall_s=counters.wall_s,
                tokens_per_s=per_second(counters.generated_tokens, counters.wall_s),
                dense_bytes=facts.dense_bytes,
                resident_expert_bytes=facts.resident_expert_bytes,
                staging_bytes=facts.staging_bytes,
                num_slots=facts.num_slots,
                num_fetches=counters.num_fetches,
                num_demands=counters.num_demands,
                fetched_bytes=counters.fetched_bytes,
                num_waits=counters.num_waits,
                exposed_wait_s=counters.exposed_wait_s,
                load_s=facts.load_s,
                peak_rss_bytes=counters.peak_rss_bytes or facts.peak_rss_bytes,
            )
        )
    return GenerateReport(
        dwdp_version=__version__,
        launcher=launcher,
        model=plan.model,
        sampling=sampling,
        device=device,
        threads_per_rank=threads_per_rank,
        fetch_mode=next(iter(ready.values())).fetch_mode,
        config=config,
        ranks=tuple(ranks),
        lost_ranks=tuple(sorted(loss.rank for loss in outcome.lost)),
        totals=total(tuple(ranks), outcome.wall_s),
    )
