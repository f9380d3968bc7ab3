"""Plans: when DWDP pays, how it is set up, and what is written for it."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwdp.cli.main import run
from dwdp.perf.candidates import Workload
from dwdp.perf.fetches import ALL_AT_ONCE
from dwdp.perf.hardware import Hardware, load_hardware
from dwdp.perf.job_check import check_job
from dwdp.perf.job_files import Cluster, write_job
from dwdp.perf.launch_files import dwdp_options, job_of_plan
from dwdp.perf.model import Model
from dwdp.perf.model_config import load_model, parse_config
from dwdp.perf.plan_report import as_json, layer_lanes, memory_bar, pareto_front
from dwdp.perf.plan_trace import serve_trace
from dwdp.perf.planner import Plan, plan
from dwdp.perf.serving import PrefillScenario, prefill_rate
from dwdp.perf.workload import Lengths, poisson_requests
from dwdp.placement import build_placement

R1, QWEN = load_model("deepseek-r1-nvfp4"), load_model("qwen3-235b-a22b")
GB200 = load_hardware("gb200")
PREFILL = Workload(8192, 1024)


@pytest.fixture(scope="module")
def answer() -> Plan:
    return plan(R1, GB200, PREFILL)


def small_model() -> Model:
    return parse_config(
        {
            "hidden_size": 1024,
            "num_hidden_layers": 8,
            "num_attention_heads": 16,
            "num_experts": 16,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 512,
            "vocab_size": 1000,
        },
        "small",
    )


def with_link(gbs: float) -> Hardware:
    return GB200.model_copy(update={"link": GB200.link.model_copy(update={"gbs": gbs})})


def test_it_pays_where_the_paper_found_it_pays(answer: Plan) -> None:
    assert answer.verdict == "yes"
    assert answer.prefill_gain is not None and 1.05 < answer.prefill_gain < 1.3
    assert answer.gain is not None and 1.02 < answer.gain < answer.prefill_gain
    assert answer.best is not None and answer.best.memory.fits
    assert any("hidden" in reason for reason in answer.reasons)


@pytest.mark.parametrize(
    ("hardware", "workload"),
    [(GB200, Workload(1024, 1024, max_num_tokens=2048)), (with_link(50.0), PREFILL)],
    ids=["short forwards", "slow link"],
)
def test_it_says_no_where_the_fetch_is_not_hidden(hardware: Hardware, workload: Workload) -> None:
    answer = plan(R1, hardware, workload)
    assert answer.verdict == "no"
    assert answer.prefill_gain is not None and answer.prefill_gain < 0.8
    assert any("not hidden" in reason for reason in answer.reasons)


def test_a_model_that_fits_on_one_device_needs_no_group() -> None:
    answer = plan(small_model(), GB200, PREFILL)
    assert answer.verdict == "not needed"
    assert answer.best is not None and answer.best.group.size == 1
    assert job_of_plan(answer).dwdp_config is None


def test_a_model_that_fits_nowhere_is_said_so_with_figures() -> None:
    answer = plan(R1, load_hardware("h100"), Workload(8192, 1024, num_gpus=8))
    assert answer.verdict == "does not fit" and answer.best is None
    assert "80 GB" in answer.reasons[0]
    assert json.loads(json.dumps(as_json(answer)))["verdict"] == "does not fit"


def test_candidates_fit_cover_uneven_groups_and_spend_spare_memory(answer: Plan) -> None:
    assert all(candidate.memory.fits for candidate in answer.candidates)
    sizes = {candidate.group.size for candidate in answer.candidates}
    assert {3, 5, 6} <= sizes
    rates = [candidate.tokens_per_s for candidate in answer.candidates]
    assert rates == sorted(rates, reverse=True)
    fullest = max(answer.candidates, key=lambda candidate: candidate.memory.used)
    one_more = (fullest.group.num_experts_per_worker or 0) + 1
    layers = len(R1.moe_layers)
    grown = fullest.memory.used + (layers - 2) * R1.expert_bytes(R1.moe)
    assert one_more > 256 / fullest.group.size and grown > fullest.memory.capacity
    for candidate in answer.candidates:
        if candidate.from_host:
            twin = next(
                c for c in answer.candidates if c.group == candidate.group and not c.from_host
            )
            assert candidate.prefetch_s < twin.prefetch_s


@pytest.mark.parametrize("tokens", [8192, 32768])
def test_estimates_agree_with_the_simulator(tokens: int) -> None:
    workload = replace(PREFILL, length_ratio=1.0, max_num_tokens=tokens)
    policy = replace(ALL_AT_ONCE, slice_bytes=64 << 20)
    scenario = PrefillScenario(workload.lengths, tokens, num_iterations=3)
    candidates = [
        candidate
        for candidate in plan(R1, GB200, workload).candidates
        if candidate.group.size <= 6 and not candidate.from_host
    ]
    assert len(candidates) >= 6
    for candidate in candidates:
        simulated = prefill_rate(R1, GB200, candidate.group, scenario, "dwdp", policy)
        assert candidate.tokens_per_s == pytest.approx(simulated.tokens_per_s, rel=0.05), candidate


def test_memory_is_what_the_parts_add_up_to(answer: Plan) -> None:
    assert answer.best is not None
    parts = answer.best.memory.parts()
    assert sum(parts.values()) == pytest.approx(answer.best.memory.capacity)
    assert parts["slots"] == pytest.approx(
        answer.num_slots * (256 - -(-256 // answer.best.group.size)) * R1.expert_bytes(R1.moe)
    )
    bar, legend = memory_bar(parts, width=50)
    assert len(bar) == 52 and len(legend) == len(parts)


def test_lanes_show_which_side_is_longer(answer: Plan) -> None:
    compute, fetch = layer_lanes(answer)
    assert "experts" in compute and compute.count("|") > fetch.count("|")
    assert fetch.count("=") < 40
    slow = layer_lanes(plan(R1, with_link(50.0), PREFILL))
    assert "wait" in slow[0] and slow[1].count("=") == 60


def test_the_front_falls_and_is_above_that_of_expert_parallelism(answer: Plan) -> None:
    points = pareto_front(answer)
    rates = [point.dwdp_tps_per_gpu for point in points]
    assert all(a is not None and b is not None and a >= b for a, b in pairwise(rates))
    assert all(point.dwdp_tps_per_gpu > point.dep_tps_per_gpu for point in points[:5])  # type: ignore[operator]


@pytest.mark.parametrize(
    ("model", "workload"),
    [
        (R1, PREFILL),
        (QWEN, PREFILL),
        (R1, replace(PREFILL, num_gpus=24)),
        (small_model(), replace(PREFILL, num_gpus=8)),
    ],
    ids=["R1", "Qwen3", "24 GPUs", "no group"],
)
def test_the_files_of_a_plan_are_valid_and_fit_its_gpus(
    model: Model, workload: Workload, tmp_path: Path
) -> None:
    answer = plan(model, GB200, workload)
    assert answer.best is not None
    job = job_of_plan(answer)
    if job.dwdp_config is not None:
        options = dwdp_options(answer)
        num_groups = options.pop("num_groups")
        build_placement(model.moe.num_experts, options.pop("dwdp_size"), **options)
        assert job.context.num_servers == num_groups * answer.best.group.size
        assert options.items() <= job.dwdp_config.items()
        assert job.dwdp_config["slice_bytes"] == answer.policy.slice_bytes
    assert job.context.num_gpus == answer.num_prefill_gpus
    assert job.context.num_gpus + job.generation.num_gpus <= workload.num_gpus
    assert model.moe.num_experts % job.generation.gpus_per_server == 0
    assert job.context_options["disable_overlap_scheduler"] is True
    write_job(job, Cluster(gpus_per_node=4), tmp_path)
    assert check_job(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "named"), [({"tps_per_user": 5000.0}, "not that fast"), ({"num_gpus": 4}, "4 GPUs")]
)
def test_a_plan_that_is_no_deployment_says_why(changes: dict[str, Any], named: str) -> None:
    answer = plan(R1, GB200, replace(PREFILL, **changes))
    assert dwdp_options(answer)["num_groups"] >= 1
    with pytest.raises(ValueError, match=named):
        job_of_plan(answer)


@given(st.integers(1, 100), st.integers(1, 100))
def test_forwards_shorter_than_a_prompt_are_refused(tokens: int, isl: int) -> None:
    if tokens < isl:
        with pytest.raises(ValueError, match="max_num_tokens"):
            Workload(isl, 1, max_num_tokens=tokens)
    else:
        assert Workload(isl, 1, max_num_tokens=tokens).batch.num_tokens >= 1


@pytest.mark.parametrize("name", ["load_cv", "tps_per_user"])
def test_a_workload_has_no_figure_that_is_not_a_number(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is nan"):
        replace(PREFILL, **{name: float("nan")})


def test_many_short_prompts_hide_the_fetch_as_few_long_ones_do() -> None:
    answer = plan(R1, GB200, replace(PREFILL, isl=1, osl=1))
    assert answer.best is not None and answer.best.window_ratio > 1
    assert answer.prefill_tokens_to_hide is not None
    assert 64 < answer.prefill_tokens_to_hide < PREFILL.max_num_tokens


def test_gpus_that_are_no_deployment_are_said_to_be_too_few() -> None:
    assert any(
        "too few" in reason for reason in plan(R1, GB200, replace(PREFILL, num_gpus=4)).reasons
    )


@pytest.mark.parametrize("model", ["deepseek-r1-nvfp4", "qwen3-235b-a22b"])
def test_the_command_answers_and_writes_its_files(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan"
    arguments = ["plan", model, "--hardware", "gb200", "--isl", "8192", "--osl", "1024"]
    assert run([*arguments, "--out", str(out), "--json", str(tmp_path / "p.json")]) == 0
    text = capsys.readouterr().out
    assert "Does DWDP pay here? yes" in text and "dwdp_size" in text
    assert {"plan.json", "context.yaml", "disaggregated.yaml", "job.slurm"} <= {
        path.name for path in out.iterdir()
    }
    assert check_job(out) == []
    written = json.loads((tmp_path / "p.json").read_text())
    assert written == json.loads((out / "plan.json").read_text())
    assert written["schema"] == "dwdp-plan-1" and written["pareto"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["no-such-model", "--hardware", "gb200"], "no-such-model"),
        (["deepseek-r1", "--hardware", "v100"], "v100"),
        (["deepseek-r1", "--hardware", "gb200", "--max-num-tokens", "10"], "max_num_tokens"),
    ],
)
def test_bad_input_is_one_line_that_names_it(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", *arguments, "--isl", "8192", "--osl", "1024"]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1


def test_a_trace_is_served_by_both_strategies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    requests = poisson_requests(Lengths(8192, ratio=0.8), 512, 40.0, 400)
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(request._asdict()) + "\n" for request in requests))
    arguments = [
        "plan",
        "deepseek-r1-nvfp4",
        "--hardware",
        "gb200",
        "--isl",
        "8192",
        "--osl",
        "512",
    ]
    assert run([*arguments, "--trace", str(path)]) == 0
    text = capsys.readouterr().out
    assert "trace.jsonl" in text and "expert parallelism" in text and "first token" in text


def test_more_load_than_prefill_can_take_shows_in_the_first_tokens(answer: Plan) -> None:
    def median_ttft_s(requests_per_s: float) -> float:
        requests = poisson_requests(Lengths(8192, ratio=0.8), 256, requests_per_s, 1500)
        return serve_trace(answer, requests)[0].result.ttft_percentile_s(50)

    assert answer.dwdp is not None
    capacity = answer.num_prefill_gpus * answer.dwdp.tokens_per_s / PREFILL.lengths.mean
    assert median_ttft_s(2 * capacity) > 2 * median_ttft_s(0.3 * capacity)


def test_a_trace_needs_a_deployment() -> None:
    nowhere = plan(R1, load_hardware("h100"), Workload(8192, 1024, num_gpus=8))
    with pytest.raises(ValueError, match="needs"):
        serve_trace(nowhere, poisson_requests(Lengths(8192), 16, 1.0, 3))


def test_the_pareto_plot_is_drawn_twice_the_same(answer: Plan, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from dwdp.perf.plots import plot_pareto

    paths = [tmp_path / "a.svg", tmp_path / "a.png"]
    plot_pareto(pareto_front(answer), paths)
    first = paths[0].read_bytes()
    plot_pareto(pareto_front(answer), paths)
    assert paths[0].read_bytes() == first and paths[1].stat().st_size > 1000
