"""What a run leaves behind: whole files or none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dwdp.config import DwdpConfig
from dwdp.memory_plan import MemoryPlan
from dwdp.observability.report import ModelReport, SamplingReport
from dwdp.serving.dispatcher import LostRank, Outcome
from dwdp.serving.messages import Completion, Counters, Ready, Request
from dwdp.serving.plan import RunPlan
from dwdp.serving.results import check_writable, completion_lines, make_report, write_files

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
    return RunPlan(model, MemoryPlan((), (), ()), ("first", 2), requests, tokenizer)


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


def test_files_are_replaced_whole_with_usual_permissions(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        (tmp_path / "a").write_text("old")
        (tmp_path / "link").symlink_to(tmp_path / "target")
        (tmp_path / "target").write_text("old")
        write_files({tmp_path / "a": "new", tmp_path / "link": "ünicode", Path("/dev/null"): "x"})
    finally:
        os.umask(old)
    assert (tmp_path / "a").read_text() == "new"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text(encoding="utf-8") == "ünicode"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "link", "target"]


def test_if_one_file_cannot_be_written_none_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match="gone"):
        write_files({tmp_path / "a": "new", tmp_path / "gone" / "b": "new"})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("folder", "is a directory; name a file"),
        ("none/file", "there is no directory"),
        ("file/file", "there is no directory"),
        ("/proc/dwdp", "cannot be written"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=what):
        check_writable(tmp_path / name)


def test_the_check_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "out")
    check_writable(Path("/dev/null"))
    assert list(tmp_path.iterdir()) == []
