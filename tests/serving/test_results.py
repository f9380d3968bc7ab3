"""What a run comes to."""

from __future__ import annotations

import json
from typing import Any

from dwdp.config import DwdpConfig
from dwdp.observability.report import ModelReport, SamplingReport
from dwdp.serving.dispatcher import LostRank, Outcome
from dwdp.serving.messages import Completion, Counters, Ready, Request
from dwdp.serving.plan import RunPlan
from dwdp.serving.results import completion_lines, make_report

SAMPLING = SamplingReport(max_new_tokens=4, temperature=0.0, seed=0)


class Letters:
    def decode(self, token_ids: tuple[int, ...], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(ord("a") + token_id) for token_id in token_ids) + "\u2028ü"


def run_plan(tokenizer: Any = None) -> RunPlan:
    model = ModelReport(
        path="m", model_type="x", num_layers=2, num_moe_layers=1, num_experts=8, dtype="float32"
    )
    requests = tuple(Request(index, (7, index), 4, 0.0, index) for index in range(2))
    return RunPlan(model, ("first", 2), requests, tokenizer)


def outcome(lost: tuple[LostRank, ...] = ()) -> Outcome:
    completions = (
        (1, Completion(0, (0, 1), "stop", Counters())),
        (0, Completion(1, (2,), "length", Counters())),
    )
    counters = (
        Counters(num_prompts=1, generated_tokens=1, wall_s=0.5, peak_rss_bytes=500),
        Counters(num_prompts=1, generated_tokens=2, wall_s=0.25, peak_rss_bytes=600),
        Counters(),
    )
    return Outcome(completions, counters, lost, wall_s=2.0)


def test_lines_are_json_in_input_order() -> None:
    lines = completion_lines(run_plan(Letters()), outcome()).split("\n")
    assert lines.pop() == ""
    assert [json.loads(line) for line in lines] == [
        {
            "id": "first",
            "rank": 1,
            "prompt_token_ids": [7, 0],
            "token_ids": [0, 1],
            "text": "ab\u2028ü",
            "finish_reason": "stop",
        },
        {
            "id": 2,
            "rank": 0,
            "prompt_token_ids": [7, 1],
            "token_ids": [2],
            "text": "c\u2028ü",
            "finish_reason": "length",
        },
    ]


def test_without_a_tokenizer_there_is_no_text() -> None:
    lines = completion_lines(run_plan(), outcome()).splitlines()
    assert [json.loads(line)["text"] for line in lines] == [None, None]


def test_lost_ranks_are_reported_as_far_as_they_came() -> None:
    ready = {rank: Ready("staged", 2, 10, 20, 30, 0.5, 400) for rank in (0, 2)}
    lost = (LostRank(2, "was killed by SIGKILL", 1), LostRank(1, "closed its connection", 0))
    report = make_report(
        run_plan(),
        outcome(lost),
        ready,
        config=DwdpConfig(dwdp_size=3),
        sampling=SAMPLING,
        launcher="mpirun",
        device="cpu",
        threads_per_rank=1,
    )
    assert report.lost_ranks == (1, 2)
    assert [(rank.rank, rank.num_prompts, rank.peak_rss_bytes) for rank in report.ranks] == [
        (0, 1, 500),
        (2, 0, 400),
    ]
    assert (report.fetch_mode, report.launcher) == ("staged", "mpirun")
    assert report.totals.staging_bytes == 60
