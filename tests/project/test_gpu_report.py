"""What of the GPU report needs no GPU: tables, limits, time limits, files, and what is not measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"
sys.path.append(str(FOLDER))

import demand_crossover  # noqa: E402
import fetch_bandwidth  # noqa: E402
import figures  # noqa: E402
import harness  # noqa: E402
import issue_time  # noqa: E402
import layer  # noqa: E402
import model_throughput  # noqa: E402
import overlap  # noqa: E402
import report  # noqa: E402

PROGRAMS = (fetch_bandwidth, issue_time, overlap, demand_crossover, model_throughput)


def sample_table(ratio: float | None) -> figures.Table:
    return figures.Table(
        "A table",
        (figures.Column("how"), figures.Column("GB/s", ".1f"), figures.Column("ratio", ".2f")),
        (("ours", 91.25, ratio), ("theirs", None, None)),
        ("Baseline: theirs.",),
        (figures.Limit.floor("ratio", [ratio, None], 0.95),),
    )


def sample_report(ratio: float | None, **problem: object) -> report.Report:
    environment = {"GPU": "NVIDIA H100 80GB HBM3", "torch": "2.11.0"}
    part = report.Part("fetch bandwidth", "python bench.py", 12.3, tables=[sample_table(ratio)])
    other = report.Part("model", "python model.py", 0.0, **problem)
    return report.Report("2026-11-21", "make gpu-report", 400.0, environment, [part, other])


def test_a_figure_that_was_not_measured_is_marked_and_judged_by_nobody() -> None:
    table = sample_table(None)
    assert table.texts() == [["ours", "91.2", "not measured"], ["theirs", *["not measured"] * 2]]
    (limit,) = table.limits
    assert not limit.is_missed
    assert str(limit) == "ratio: not measured (at least 0.95 is wanted)"


@pytest.mark.parametrize(
    ("limit", "is_missed"),
    [
        (figures.Limit.floor("x", [1.2, 0.95, None], 0.95), False),
        (figures.Limit.floor("x", [1.2, 0.949], 0.95), True),
        (figures.Limit.ceiling("x", [0.1, 0.2], 1 / 3), False),
        (figures.Limit.ceiling("x", [0.1, 0.4], 1 / 3), True),
        (figures.Limit("x", float("nan"), at_most=1.0), True),
    ],
)
def test_the_worst_figure_decides(limit: figures.Limit, is_missed: bool) -> None:
    assert limit.is_missed is is_missed
    assert ("MISSED" in str(limit)) is is_missed


def test_rows_must_fit_their_headings() -> None:
    with pytest.raises(ValueError, match="2 cells under 1 headings"):
        figures.Table("t", (figures.Column("a"),), ((1, 2),))


def test_tables_survive_the_trip_through_a_file(tmp_path: Path) -> None:
    tables = [sample_table(0.97), sample_table(None)]
    path = tmp_path / "deep" / "tables.json"
    figures.write_tables(path, tables)
    assert figures.read_tables(path) == tables
    json.loads(path.read_text(), parse_constant=pytest.fail)


def test_a_report_is_written_twice_under_the_gpus_name(tmp_path: Path) -> None:
    markdown, as_json = sample_report(0.97).write(tmp_path / "results")
    assert markdown.name == "h100-80gb-hbm3-2026-11-21.md"
    assert as_json.name == "h100-80gb-hbm3-2026-11-21.json"
    text = markdown.read_text()
    assert "| ours | 91.2 | 0.97 |" in text
    assert "| theirs | not measured | not measured |" in text
    assert "| --- | ---: | ---: |" in text
    assert "| torch | 2.11.0 |" in text and "`make gpu-report`" in text
    content = json.loads(as_json.read_text())
    assert content["environment"]["GPU"] == "NVIDIA H100 80GB HBM3"
    first, second = content["parts"]
    assert figures.Table.from_json(first["tables"][0]) == sample_table(0.97)
    assert second["tables"] == [] and second["outcome"] == "done"


@pytest.mark.parametrize(
    ("ratio", "problem", "is_good"),
    [
        (0.97, {}, True),
        (None, {}, True),
        (0.97, {"problem": "not measured: no time was left"}, True),
        (0.90, {}, False),
        (0.97, {"problem": "FAILED: no", "failed": True}, False),
    ],
)
def test_a_failure_or_a_missed_limit_fails_the_report(
    ratio: float | None, problem: dict[str, object], is_good: bool
) -> None:
    made = sample_report(ratio, **problem)
    assert made.is_good is is_good
    text = made.markdown()
    for words in problem.values():
        assert not isinstance(words, str) or words in text
    assert ("limit(s) missed" in text) == (ratio == 0.90)


def test_a_program_that_runs_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    alive = tmp_path / "pid"
    child = f"import os, time; open({str(alive)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    program = (
        "import subprocess, sys, time; print('begun', flush=True); "
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    done = report.run(("-c", program), 5.0)
    assert done.returncode is None and done.output.strip() == "begun"
    status = Path("/proc", alive.read_text(), "stat")
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def benchmark_of(tmp_path: Path, body: str, limit_s: float = 60.0) -> report.Part:
    program = tmp_path / "program.py"
    program.write_text(f"import pathlib, sys, time\n{body}\n")
    return report.benchmark(report.Step("b", (str(program),), limit_s), limit_s)


def test_what_a_benchmark_writes_is_read(tmp_path: Path) -> None:
    source = tmp_path / "source.json"
    figures.write_tables(source, [sample_table(0.5)])
    copy = f"pathlib.Path(sys.argv[4]).write_text(pathlib.Path({str(source)!r}).read_text())"
    part = benchmark_of(tmp_path, f"{copy}; sys.exit(1)")
    assert part.tables == [sample_table(0.5)]
    assert not part.failed and part.outcome == "1 limit(s) missed"


def test_a_benchmark_that_breaks_or_hangs_costs_its_own_figures_only(tmp_path: Path) -> None:
    broken = benchmark_of(tmp_path, "print('noise'); sys.exit('error: the GPU is on fire')")
    assert broken.failed
    assert broken.outcome == "FAILED, not measured: error: the GPU is on fire"
    late = benchmark_of(tmp_path, "time.sleep(60)", limit_s=2.0)
    assert not late.failed and late.outcome == "not measured: ran past 2 s"


def test_tests_are_rows_with_their_reasons(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    path.write_text(
        """<testsuites><testsuite>
        <testcase classname="tests.gpu.test_x" name="test_a[staged]" time="1.25" />
        <testcase classname="tests.gpu.test_x" name="test_b" time="0.5">
          <failure message="assert 1 == 2">long</failure></testcase>
        <testcase classname="tests.gpu.test_x" name="test_c" time="0">
          <skipped message="compute-sanitizer is not on PATH" /></testcase>
        </testsuite></testsuites>"""
    )
    table = report.read_junit(path)
    assert table.rows == (
        ("test_x::test_a[staged]", "passed", 1.25),
        ("test_x::test_b", "FAILED", 0.5),
        ("test_x::test_c", "skipped", 0.0),
    )
    assert table.notes == (
        "test_x::test_b: FAILED: assert 1 == 2",
        "test_x::test_c: skipped: compute-sanitizer is not on PATH",
    )


@pytest.mark.parametrize(("limit_s", "is_measured"), [(60.0, True), (report.LEAST_S / 2, False)])
def test_everything_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit_s: float, is_measured: bool
) -> None:
    source, program, test = (tmp_path / name for name in ("t.json", "program.py", "test_one.py"))
    figures.write_tables(source, [sample_table(0.99)])
    program.write_text(
        "import pathlib, sys\n"
        f"pathlib.Path(sys.argv[4]).write_text(pathlib.Path({str(source)!r}).read_text())\n"
    )
    test.write_text("def test_one() -> None:\n    assert True\n")
    monkeypatch.setattr(report, "BUILD", report.Step("build", ("-c", "pass"), 60))
    tests = ("-m", "pytest", "-q", f"--rootdir={tmp_path}", str(test))
    monkeypatch.setattr(report, "TESTS", report.Step("GPU tests", tests, 100))
    benchmarks = (report.Step("fetch bandwidth", (str(program),), limit_s),)
    monkeypatch.setattr(report, "BENCHMARKS", benchmarks)
    monkeypatch.setattr(report, "describe_environment", lambda: {"GPU": "NVIDIA H200"})
    folder = tmp_path / "results"
    done = CliRunner().invoke(report.main, ["--output-dir", str(folder)])
    assert done.exit_code == 0, done.output
    markdown, as_json = sorted(folder.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert markdown.name.startswith("h200-") and markdown.suffix == ".md"
    content = json.loads(as_json.read_text())
    built, tested, measured = content["parts"]
    assert built["outcome"] == tested["outcome"] == "done"
    assert tested["tables"][0]["rows"][0][1] == "passed"
    assert bool(measured["tables"]) is is_measured
    assert ("not measured: no time was left" in markdown.read_text()) is not is_measured


def test_a_build_that_fails_is_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = report.Step("build", ("-c", "import sys; sys.exit('error: no compiler')"), 60)
    monkeypatch.setattr(report, "BUILD", broken)
    done = CliRunner().invoke(report.main, ["--output-dir", str(tmp_path / "results")])
    assert done.exit_code == 1 and "error: no compiler" in done.output
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_every_benchmark_is_a_step_and_explains_itself(program: Any) -> None:
    steps = [step.arguments[0] for step in report.BENCHMARKS]
    assert f"benchmarks/gpu/{program.__name__}.py" in steps and len(steps) == len(PROGRAMS)
    done = CliRunner().invoke(program.main, ["--help"])
    assert done.exit_code == 0
    assert "--budget-s" in done.output and "--output" in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_programs_say_so_in_one_line(tmp_path: Path) -> None:
    words = "error: no CUDA device: GPU benchmarks need one (nothing was measured)"
    for program in PROGRAMS:
        output = tmp_path / "tables.json"
        done = CliRunner().invoke(program.main, ["--output", str(output)])
        assert done.exit_code == 1 and done.output.strip() == words
        assert not output.exists()
    done = report.run(("benchmarks/gpu/environment.py",), 120)
    assert done.returncode == 1 and done.output.strip() == words


def test_the_median_of_all_rounds_but_the_first_counts() -> None:
    figures_of = {"a": [100.0, 3.0, 1.0, 2.0], "b": [100.0, 5.0, 6.0, 7.0]}
    order: list[str] = []

    def measure(name: str) -> float:
        order.append(name)
        return figures_of[name].pop(0)

    medians = harness.interleaved({name: lambda n=name: measure(n) for name in figures_of}, 3)
    assert medians == {"a": 2.0, "b": 6.0}
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]


def test_a_spent_budget_leaves_one_measured_round() -> None:
    calls: list[int] = []
    medians = harness.interleaved(
        {"a": lambda: float(calls.append(1) or len(calls))}, 9, harness.Budget(0.0)
    )
    assert medians == {"a": 2.0}


@pytest.mark.parametrize("shape", fetch_bandwidth.SHAPES)
@pytest.mark.parametrize("part_bytes", [64 << 20, 1_000_000])
def test_slices_cover_every_byte_once(shape: fetch_bandwidth.Shape, part_bytes: int) -> None:
    sources = [1 << 40 | index << 32 for index in range(shape.sources)]
    lanes = fetch_bandwidth.lanes_of(sources, 0, part_bytes, 4 << 20, shape.lanes)
    assert len(lanes) == shape.lanes
    copies = sorted(copy for lane in lanes for copy in lane)
    end = 0
    for copy in copies:
        assert copy.dst == end and 0 < copy.num_bytes <= 4 << 20
        index, offset = divmod(copy.dst, part_bytes)
        assert copy.src == sources[index] + offset
        end += copy.num_bytes
    assert end == shape.sources * part_bytes
    if shape.lanes >= shape.sources:
        assert all(len({copy.src >> 32 for copy in lane}) == 1 for lane in lanes if lane)


def test_the_measured_sizes_are_those_of_the_published_models() -> None:
    r1 = layer.DEEPSEEK_R1
    assert sum(spec.expert_bytes for spec in r1.nvfp4_tensors()) == 24_772_608
    assert sum(spec.expert_bytes for spec in r1.bf16_tensors()) == 3 * 7168 * 2048 * 2
    qwen = layer.QWEN3_235B
    assert sum(spec.expert_bytes for spec in qwen.bf16_tensors()) == 3 * 4096 * 1536 * 2


def test_a_shape_is_halved_until_it_fits() -> None:
    full = layer.DEEPSEEK_R1
    assert demand_crossover.fitting(full, 10**12) == full
    half = demand_crossover.fitting(full, 40 * 10**9)
    assert (half.num_experts, half.top_k) == (128, 4)


@pytest.mark.parametrize(
    ("demand_ms", "text"),
    [
        ({1: 1.0, 64: 3.0, 256: 9.0}, "between 64 tokens (demand) and 256 tokens (staged)"),
        ({1: 1.0, 64: 3.0}, "demand is as fast or faster up to 64 tokens, the most that were"),
        ({1: 6.0, 64: 7.0}, "staged is faster from 1 token(s) on"),
        ({1: 1.0, 8: 6.0, 64: 3.0}, "not a single one: demand wins at 1, 64 tokens, staged at 8"),
        ({}, "not measured"),
    ],
)
def test_the_crossover_is_where_staged_becomes_faster(
    demand_ms: dict[int, float], text: str
) -> None:
    steps = {tokens: demand_crossover.Step(0.5, 5.0, ms, 0.0) for tokens, ms in demand_ms.items()}
    assert demand_crossover.crossover_text(steps).startswith(text)


def test_missing_baselines_and_rows_are_not_measured() -> None:
    table = issue_time.table_of(
        {issue_time.OURS: 100.0, issue_time.TORCH: 4000.0}, 1000, "cuda-python is not installed"
    )
    assert table.texts()[2][2:] == ["not measured"] * 3
    assert table.limits[0].worst == pytest.approx(0.025)
    assert "cuda-python is not installed" in " ".join(table.notes)

    one = {("copy engine", fetch_bandwidth.SHAPES[0], 4 << 20): (99.0, 100.0)}
    table = fetch_bandwidth.table_of(one, 1024)
    assert sum(row[-1] is not None for row in table.rows) == 1
    assert [limit.worst for limit in table.limits] == [0.99, None, None]

    table = overlap.table_of({("plain", 1.0): overlap.Measured(1 << 30, 4.0, 4.0, 5.0)}, "t")
    (row,) = [row for row in table.rows if row[1] is not None]
    assert row[-2:] == (1.25, 0.625)


def test_rates_of_ranks_are_added_and_compared_round_by_round() -> None:
    def rank(tokens_per_s: float, ratio: float) -> model_throughput.RankFigures:
        keys = [(n, v) for n in model_throughput.STEPS for v in model_throughput.VARIANTS]
        return model_throughput.RankFigures(
            {k: [tokens_per_s * (1 if k[1] == "unsharded" else ratio)] * 3 for k in keys},
            dict.fromkeys(keys, 2.0),
            dict.fromkeys(model_throughput.VARIANTS, 10**9),
            dict.fromkeys(model_throughput.MODES, 4 * 10**9),
        )

    rows = model_throughput.rows_of(2, [rank(100.0, 0.5), rank(300.0, 0.5)])
    assert rows[0] == (2, 8, "unsharded", 400.0, 1.0, 1.0, "-", "-")
    assert rows[1] == (2, 8, "staged", 200.0, 0.5, 1.0, 2.0, 2.0)
    unmeasured = model_throughput.rows_of(4, [])
    assert all(row[3:] == (None,) * 5 for row in unmeasured)
    assert model_throughput.table_of({4: []}, {4: 2}).texts()[0][3] == "not measured"


def test_layers_are_scaled_to_the_memory() -> None:
    assert model_throughput.scaled_layers(0, 4) == 2
    small, large = (model_throughput.scaled_layers(gib << 30, 4) for gib in (48, 84))
    assert 2 <= small < large <= model_throughput.MAX_LAYERS
    assert small % 2 == large % 2 == 0
