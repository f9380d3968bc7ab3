"""What of the GPU report needs no GPU: tables, limits, time limits, files, and what is not measured."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"
sys.path.append(str(FOLDER))

import demand_crossover  # noqa: E402
import fetch_bandwidth  # noqa: E402
import figures  # noqa: E402
import gpu_tests  # noqa: E402
import harness  # noqa: E402
import issue_time  # noqa: E402
import layer  # noqa: E402
import model_throughput  # noqa: E402
import overlap  # noqa: E402
import prerequisites  # noqa: E402
import report_command  # noqa: E402
import steps  # noqa: E402

PROGRAMS = (fetch_bandwidth, issue_time, overlap, demand_crossover, model_throughput)


def sample_table(ratio: float | None) -> figures.Table:
    return figures.Table(
        "A table",
        (figures.Column("how"), figures.Column("GB/s", ".1f"), figures.Column("ratio", ".2f")),
        (("ours", 91.25, ratio), ("theirs", None, None)),
        ("Baseline: theirs.",),
        (figures.Limit.floor("ratio", [ratio, None], 0.95),),
    )


def sample_report(ratio: float | None, **problem: object) -> report_command.Report:
    environment = {"GPU": "NVIDIA H100 80GB HBM3", "torch": "2.11.0"}
    part = figures.Part("fetch bandwidth", "python bench.py", 12.3, tables=[sample_table(ratio)])
    other = figures.Part("model", "python model.py", 0.0, **problem)
    return report_command.Report("2026-11-21", "make gpu-report", 400.0, environment, [part, other])


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
    for is_complete in (False, True):
        figures.write_tables(path, tables, is_complete=is_complete)
        assert figures.read_tables(path) == (tables, is_complete)
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
    done = steps.run(("-c", program), 5.0)
    assert done.returncode is None and done.output.strip() == "begun"
    status = Path("/proc", alive.read_text(), "stat")
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def benchmark_of(tmp_path: Path, body: str, limit_s: float = 60.0) -> figures.Part:
    """A program for which ``write(ratio, is_complete)`` is there to write a table with."""
    program = tmp_path / "program.py"
    for name, ratio in (("table", 0.99), ("missed", 0.5)):
        for is_complete in (False, True):
            path = tmp_path / f"{name}-{is_complete}.json"
            figures.write_tables(path, [sample_table(ratio)], is_complete=is_complete)
    program.write_text(
        "import pathlib, sys, time\n"
        "def write(name, is_complete):\n"
        f"    source = pathlib.Path({str(tmp_path)!r}, f'{{name}}-{{is_complete}}.json')\n"
        "    pathlib.Path(sys.argv[4]).write_text(source.read_text())\n"
        f"{body}\n"
    )
    return steps.benchmark(steps.Step("b", (str(program),), limit_s, 0.0), limit_s)


def test_what_a_benchmark_writes_is_read(tmp_path: Path) -> None:
    part = benchmark_of(tmp_path, "write('missed', True); sys.exit(1)")
    assert part.tables == [sample_table(0.5)]
    assert not part.failed and part.outcome == "1 limit(s) missed"


@pytest.mark.parametrize("has_tables", [False, True])
def test_a_benchmark_that_breaks_or_hangs_costs_only_figures_that_were_to_come(
    tmp_path: Path, has_tables: bool
) -> None:
    first = "write('table', False); " if has_tables else ""
    missing = "not all measured" if has_tables else "not measured"
    broken = benchmark_of(tmp_path, f"{first}print('noise'); sys.exit('error: the GPU is on fire')")
    assert broken.failed
    assert broken.outcome == f"FAILED, {missing}: error: the GPU is on fire"
    late = benchmark_of(tmp_path, f"{first}time.sleep(60)", limit_s=5.0)
    assert not late.failed and late.outcome == f"{missing}: ran past 5 s"
    for part in (broken, late):
        assert part.tables == [sample_table(0.99)] * has_tables


def test_a_benchmark_that_breaks_at_its_very_end_has_failed(tmp_path: Path) -> None:
    part = benchmark_of(tmp_path, "write('table', True); import os; os._exit(3)")
    assert part.failed and part.outcome == "FAILED: ended with code 3"
    assert part.tables == [sample_table(0.99)]


@pytest.fixture
def few_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pytest in other processes starts with what it is given: loading all that is installed takes seconds."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "pytest_timeout")


def run_tests(tmp_path: Path, text: str) -> figures.Part:
    """The part of a report that tests with this source make."""
    file = tmp_path / "test_x.py"
    file.write_text(f"import os, time, pytest\n{text}")
    arguments = ("-m", "pytest", "-q", f"--rootdir={tmp_path}", str(file))
    return gpu_tests.gpu_tests(steps.Step("GPU tests", arguments, 100.0, 0.0), 100.0)


def rows_of(part: figures.Part) -> list[tuple[str, str]]:
    return [(str(row[0]), str(row[1])) for row in part.tables[0].rows]


@pytest.mark.usefixtures("few_plugins")
def test_tests_are_rows_with_their_reasons(tmp_path: Path) -> None:
    part = run_tests(
        tmp_path,
        """
@pytest.mark.parametrize("mode", ["staged"])
def test_a(mode): pass
def test_b(): assert 1 == 2
def test_c(): pytest.skip("compute-sanitizer is not on PATH")
@pytest.fixture
def broken():
    yield
    raise RuntimeError("cannot be torn down")
def test_d(broken): pass
""",
    )
    assert rows_of(part) == [
        ("test_x::test_a[staged]", "passed"),
        ("test_x::test_b", "FAILED"),
        ("test_x::test_c", "skipped"),
        ("test_x::test_d", "FAILED"),
    ]
    notes = part.tables[0].notes
    assert notes[0].startswith("test_x::test_b: FAILED: assert 1 == 2")
    assert notes[1] == "test_x::test_c: skipped: compute-sanitizer is not on PATH"
    assert notes[2] == "test_x::test_d: FAILED: RuntimeError: cannot be torn down"
    assert part.failed and part.outcome == "FAILED: 2 of 4 tests failed"


@pytest.mark.usefixtures("few_plugins")
def test_tests_that_pass_make_a_good_part(tmp_path: Path) -> None:
    part = run_tests(tmp_path, "def test_a(): pass")
    assert not part.failed and part.outcome == "done"


@pytest.mark.usefixtures("few_plugins")
@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("def test_a(): pytest.skip('no')", "FAILED: 0 of 1 tests passed: 1 skipped"),
        ("import no_such_module\ndef test_a(): pass", "FAILED: 1 of 1 tests failed"),
        ("def helper(): pass", "FAILED: 0 of 0 tests passed: no tests ran"),
    ],
)
def test_without_a_test_that_passes_the_part_fails(tmp_path: Path, text: str, outcome: str) -> None:
    part = run_tests(tmp_path, text)
    assert part.failed and part.outcome.startswith(outcome)


@pytest.mark.usefixtures("few_plugins")
def test_no_test_is_begun_late_and_that_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_tests, "LAST_TEST_S", 1000.0)
    part = run_tests(tmp_path, "def test_a(): pass\ndef test_b(): pass")
    assert rows_of(part) == [("test_x::test_a", "not run"), ("test_x::test_b", "not run")]
    assert not part.failed and part.outcome == "not all run: 0 of 2, the time was up"


def test_a_test_that_is_cut_off_was_not_run(tmp_path: Path) -> None:
    """What had passed until then counts; so does a line that was not written to its end."""
    path = tmp_path / "log.jsonl"
    path.write_text(
        '{"collected": ["t.py::a", "t.py::b", "t.py::c"]}\n{"started": "t.py::a", "at": 90.0}\n'
        '{"test": "t.py::a", "outcome": "passed", "seconds": 1.0, "reason": ""}\n'
        '{"started": "t.py::b", "at": 95.0}\n{"test": "t.py::b", "outc'
    )
    log = gpu_tests.Log.read(path)
    done = steps.Outcome(None, 100.0, "")
    log.end(done, 100.0)
    assert [row[1] for row in log.table().rows] == ["passed", "not run", "not run"]
    assert gpu_tests.verdict(log, done) == (False, "not all run: 1 of 3, the time was up")


@pytest.mark.usefixtures("few_plugins")
def test_a_test_that_ends_pytest_has_failed(tmp_path: Path) -> None:
    part = run_tests(tmp_path, "def test_a(): pass\ndef test_b(): os._exit(7)\ndef test_c(): pass")
    assert part.failed and part.outcome == "FAILED: 1 of 3 tests failed"
    assert part.tables[0].notes == ("test_x::test_b: FAILED: pytest ended in it, with code 7",)


def test_a_test_that_hangs_has_failed_whatever_else_was_run() -> None:
    log = gpu_tests.Log(["t.py::a", "t.py::b"], {"t.py::a": ("passed", 1.0, "")})
    log.running = ("t.py::b", 100.0)
    done = steps.Outcome(None, 170.0, "")
    log.end(done, 100.0 + gpu_tests.TEST_LIMIT_S)
    assert gpu_tests.verdict(log, done) == (True, "FAILED: 1 of 2 tests failed")
    assert log.table().notes == ("t::b: FAILED: did not end within 60 s",)


def test_every_file_of_gpu_tests_is_named_once() -> None:
    """Pytest takes a file out of its turn where the folder is named as well."""
    named = [path for path in report_command.TESTS.arguments if path.startswith("tests/")]
    files = [str(path.relative_to(steps.ROOT)) for path in steps.ROOT.glob("tests/gpu/test_*.py")]
    assert sorted(named) == sorted([*files, "tests/cuda"])


@pytest.mark.parametrize("taken", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("build_s", [0.0, 90.0, report_command.BUILD.limit_s])
def test_the_limits_fit_the_time_and_leave_every_step_its_least(
    build_s: float, taken: float
) -> None:
    """Whatever share of its limit each step takes."""
    sequence = (report_command.TESTS, *report_command.BENCHMARKS)
    left_s = report_command.TOTAL_S - build_s - 20.0  # to look at the environment
    for index, step in enumerate(sequence):
        limit_s = report_command.limit_of(step, sequence[index + 1 :], left_s)
        assert step.least_s <= limit_s <= min(step.limit_s, left_s)
        left_s -= taken * limit_s
    assert left_s >= 0.0


def test_a_step_without_its_least_is_left_out() -> None:
    sequence = report_command.BENCHMARKS
    first = sequence[0]
    assert report_command.limit_of(first, sequence[1:], first.least_s - 1.0) == 0.0
    assert report_command.limit_of(first, sequence[1:], first.least_s) == first.least_s


def test_nine_minutes_are_enough() -> None:
    """The last step ends by the total, but for the killing of what does not end by itself."""
    assert report_command.TOTAL_S + steps.KILL_S * 3 < 9 * 60


@pytest.mark.usefixtures("few_plugins")
@pytest.mark.parametrize(("least_s", "is_measured"), [(10.0, True), (1000.0, False)])
def test_everything_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least_s: float, is_measured: bool
) -> None:
    source, program, test = (tmp_path / name for name in ("t.json", "program.py", "test_one.py"))
    folder = tmp_path / "results"
    figures.write_tables(source, [sample_table(0.99)], is_complete=True)
    # The report is there already: all parts, with what came of the tests.
    program.write_text(
        "import json, pathlib, sys\n"
        f"(written,) = pathlib.Path({str(folder)!r}).glob('*.json')\n"
        "parts = json.loads(written.read_text())['parts']\n"
        "outcomes = [part['outcome'] for part in parts]\n"
        "assert outcomes == ['done', 'done', 'not measured: not reached'], outcomes\n"
        f"pathlib.Path(sys.argv[4]).write_text(pathlib.Path({str(source)!r}).read_text())\n"
    )
    test.write_text("def test_one() -> None:\n    assert True\n")
    monkeypatch.setattr(report_command, "BUILD", steps.Step("build", ("-c", "pass"), 60, 0))
    tests = ("-m", "pytest", "-q", f"--rootdir={tmp_path}", str(test))
    monkeypatch.setattr(report_command, "TESTS", steps.Step("GPU tests", tests, 100, 50))
    benchmarks = (steps.Step("fetch bandwidth", (str(program),), 60.0, least_s),)
    monkeypatch.setattr(report_command, "BENCHMARKS", benchmarks)
    environment = {"GPU": "NVIDIA H200"}
    monkeypatch.setattr(report_command, "describe_environment", lambda limit_s: environment)
    done = invoke(folder)
    assert done.exit_code == 0, done.output
    markdown, as_json = sorted(folder.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert markdown.name.startswith("h200-") and markdown.suffix == ".md"
    content = json.loads(as_json.read_text())
    built, tested, measured = content["parts"]
    assert built["outcome"] == tested["outcome"] == "done"
    assert tested["tables"][0]["rows"][0][1] == "passed"
    assert bool(measured["tables"]) is is_measured
    assert ("not measured: no time was left" in markdown.read_text()) is not is_measured


def invoke(folder: Path) -> Result:
    """The report, begun now."""
    arguments = ["--output-dir", str(folder)]
    return CliRunner().invoke(report_command.report, arguments, obj=time.monotonic())


def test_a_build_that_fails_is_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = steps.Step("build", ("-c", "import sys; sys.exit('error: no compiler')"), 60, 0)
    monkeypatch.setattr(report_command, "BUILD", broken)
    done = invoke(tmp_path / "results")
    assert done.exit_code == 1 and "error: no compiler" in done.output
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_every_benchmark_is_a_step_and_explains_itself(program: Any) -> None:
    names = [step.arguments[0] for step in report_command.BENCHMARKS]
    assert f"benchmarks/gpu/{program.__name__}.py" in names and len(names) == len(PROGRAMS)
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
    done = steps.run(("benchmarks/gpu/environment.py",), 120)
    assert done.returncode == 1 and done.output.strip() == words


def test_a_benchmark_writes_its_tables_whenever_there_are_new_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "tables.json"

    @harness.benchmark_command
    def command(budget: harness.Budget) -> Iterator[list[figures.Table]]:
        yield [sample_table(0.96)]
        assert figures.read_tables(output) == ([sample_table(0.96)], False)
        yield [sample_table(0.97)]

    monkeypatch.setattr(harness, "require_device", lambda: None)
    done = CliRunner().invoke(command, ["--output", str(output)])
    assert done.exit_code == 0, done.output
    assert figures.read_tables(output) == ([sample_table(0.97)], True)


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


def test_packages_are_looked_for_in_one_go_and_named_with_their_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prerequisites.require_packages()
    installed = {"click": "8.1.7", "setuptools": "68.1.2", "torch": "2.11.0a0+nv25.09"}

    def version(name: str) -> str:
        if name not in installed:
            raise prerequisites.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(prerequisites, "version", version)
    needed = {"click": "8.1", "hypothesis": "6.100", "setuptools": "77", "torch": "2.9"}
    with pytest.raises(SystemExit) as end:
        prerequisites.require_packages(needed)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "lacks hypothesis>=6.100, setuptools>=77 (68.1.2 is installed): " in line
    assert f"{sys.executable} -m pip install 'hypothesis>=6.100' 'setuptools>=77'" in line


def test_the_packages_are_those_of_the_project() -> None:
    text = (FOLDER.parents[1] / "pyproject.toml").read_text()
    named = re.findall(r'"([\w-]+)>=([\d.]+)[";]', text)
    assert prerequisites.REQUIREMENTS.items() <= set(named)
    (of_dwdp,) = re.findall(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert set(re.findall(r'"([\w-]+)>=', of_dwdp)) <= prerequisites.REQUIREMENTS.keys()


def test_the_command_looks_before_it_imports(tmp_path: Path) -> None:
    """Without a package it ends in one line; here there is none, as Python looks for them elsewhere."""
    done = steps.run(("-S", "-E", "benchmarks/gpu/report.py", "--help"), 60.0)
    assert done.returncode == 2
    (line,) = done.output.splitlines()
    assert "lacks annotated-types>=" in line and "-m pip install" in line
