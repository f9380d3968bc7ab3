"""``dwdp generate`` from end to end, on tiny checkpoints."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from checkpoints import VOCAB_SIZE, make_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dwdp.cli.display import RunProgress
from dwdp.cli.main import run
from dwdp.engines.transformers.make_model import write_checkpoint
from dwdp.observability.report import GenerateReport
from dwdp.serving.generation import Generator
from dwdp.serving.messages import Completion, Request

ROOT = Path(__file__).resolve().parents[2]
MAX_NEW_TOKENS = 6
TOKEN_PROMPTS = [[5 + index, 9, 40 + index, 7][: 2 + index % 3] for index in range(6)]


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "text"
    write_checkpoint(path, "qwen3_moe", overrides={"num_hidden_layers": 4, "num_experts": 6})
    return path


@pytest.fixture(scope="module")
def without_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("models") / "tokens")


def expected_tokens(model_dir: Path, prompts: list[list[int]]) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "dwdp", "generate", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}


@dataclass
class Finished:
    """A run of the command that has ended."""

    returncode: int
    out: str
    err: str


def run_command(arguments: list[str]) -> Finished:
    done = subprocess.run(
        arguments, capture_output=True, text=True, env=environment(), timeout=300, check=False
    )
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def staged_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("staged")


@pytest.fixture(scope="module")
def staged(
    with_tokenizer: Path, staged_folder: Path
) -> tuple[Finished, list[dict[str, Any]], GenerateReport]:
    """One run on two ranks, text and tokens mixed, read by several tests."""
    records: list[dict[str, Any]] = [
        {"id": index, "prompt_token_ids": prompt} for index, prompt in enumerate(TOKEN_PROMPTS)
    ]
    records.append({"id": "text", "prompt": "dé"})
    prompts = write_lines(staged_folder / "prompts.jsonl", *records)
    output, report = staged_folder / "out.jsonl", staged_folder / "report.json"
    done = run_command(
        command(
            *(with_tokenizer, "--dwdp-size", "2", "--fetch-mode", "staged", "--num-lanes", "1"),
            *("--prompts", prompts, "--output", output, "--report", report),
            *("--trace", staged_folder / "trace.json"),
            *("--max-new-tokens", str(MAX_NEW_TOKENS), "--threads-per-rank", "1"),
        )
    )
    assert done.returncode == 0, done.err
    assert sorted(path.name for path in staged_folder.iterdir()) == [
        "out.jsonl",
        "prompts.jsonl",
        "report.json",
        "trace.json",
    ]
    return (
        done,
        read_lines(output.read_text(encoding="utf-8")),
        GenerateReport.model_validate_json(report.read_text()),
    )


def test_completions_equal_transformers_own(
    staged: tuple[Finished, list[dict[str, Any]], GenerateReport], with_tokenizer: Path
) -> None:
    _, lines, _ = staged
    tokenizer = AutoTokenizer.from_pretrained(with_tokenizer)
    prompts = [*TOKEN_PROMPTS, tokenizer("dé")["input_ids"]]
    expected = expected_tokens(with_tokenizer, prompts)
    assert [line["id"] for line in lines] == [*range(len(TOKEN_PROMPTS)), "text"]
    assert [line["prompt_token_ids"] for line in lines] == prompts
    assert [line["token_ids"] for line in lines] == expected
    assert {line["rank"] for line in lines} == {0, 1}
    for line, token_ids in zip(lines, expected, strict=True):
        assert line["text"] == tokenizer.decode(token_ids, skip_special_tokens=True)
        ended = token_ids[-1] == tokenizer.eos_token_id
        assert line["finish_reason"] == ("stop" if ended else "length")


def test_the_report_adds_up(
    staged: tuple[Finished, list[dict[str, Any]], GenerateReport],
) -> None:
    _, lines, report = staged
    assert report.model.model_type == "qwen3_moe"
    assert (report.model.num_layers, report.model.num_moe_layers) == (4, 4)
    assert (report.model.num_experts, report.model.dtype) == (6, "float32")
    assert (report.launcher, report.fetch_mode, report.threads_per_rank) == ("dwdp", "staged", 1)
    assert (report.config.dwdp_size, report.config.num_lanes) == (2, 1)
    assert report.lost_ranks == ()
    assert [rank.rank for rank in report.ranks] == [0, 1]
    for rank in report.ranks:
        mine = [line for line in lines if line["rank"] == rank.rank]
        assert rank.num_prompts == len(mine) > 0
        assert rank.prompt_tokens == sum(len(line["prompt_token_ids"]) for line in mine)
        assert rank.generated_tokens == sum(len(line["token_ids"]) for line in mine)
        # Each forward makes one token and starts one fetch per layer; the ring was filled before.
        assert rank.num_slots == 2
        assert rank.num_fetches == rank.num_slots + 4 * rank.generated_tokens
        assert rank.fetched_bytes > 0
        assert rank.staging_bytes > 0
        assert rank.dense_bytes > 0
        assert 0 < rank.wall_s <= report.totals.wall_s * 1.5
        assert rank.peak_rss_bytes > rank.dense_bytes + rank.resident_expert_bytes
        assert rank.load_s > 0
    assert report.totals.num_prompts == len(lines)
    assert report.totals.tokens_per_s == pytest.approx(
        report.totals.generated_tokens / report.totals.wall_s
    )


def test_the_trace_holds_what_the_report_counts(
    staged: tuple[Finished, list[dict[str, Any]], GenerateReport], staged_folder: Path
) -> None:
    _, _, report = staged
    events = json.loads((staged_folder / "trace.json").read_text())["traceEvents"]
    for rank in report.ranks:
        rows = rows_of(events, rank.rank)
        assert len(rows["compute"]) == rank.generated_tokens
        assert len(rows["exposed wait"]) == rank.num_waits
        # All but what was still on its way at the end, for a forward that did not come.
        layer_bytes = rank.fetched_bytes // rank.num_fetches
        assert {event["args"]["bytes"] for event in rows["fetch 0"]} == {layer_bytes}
        num_missing = rank.num_fetches - len(rows["fetch 0"])
        assert 0 <= num_missing <= rank.num_slots
        for lane in rows.values():
            for earlier, later in pairwise(lane):
                assert earlier["ts"] + earlier["dur"] <= later["ts"] + 0.01  # rounded


def rows_of(events: list[dict[str, Any]], rank: int) -> dict[str, list[dict[str, Any]]]:
    """The events of one rank of a trace by the name of their row, in order."""
    own = [event for event in events if event["pid"] == rank]
    names = {event["tid"]: event["args"]["name"] for event in own if event["name"] == "thread_name"}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}
    for event in own:
        if event["ph"] == "X":
            rows[names[event["tid"]]].append(event)
    return rows


def test_only_the_table_is_shown(
    staged: tuple[Finished, list[dict[str, Any]], GenerateReport],
) -> None:
    done, _, report = staged
    assert done.out == ""
    lines = [line for line in done.err.splitlines() if line.strip()]
    assert lines[0].startswith("qwen3_moe: 4 of 4 layers with 6 experts, float32, staged")
    assert [line.split()[0] for line in lines if line.strip()[0].isdigit()] == ["0", "1"]
    assert lines[-1].split()[:2] == ["all", str(report.totals.num_prompts)]


def test_torchrun_starts_the_ranks(without_tokenizer: Path, tmp_path: Path) -> None:
    prompts = write_lines(
        tmp_path / "prompts.jsonl",
        *({"id": index, "prompt_token_ids": prompt} for index, prompt in enumerate(TOKEN_PROMPTS)),
    )
    report = tmp_path / "report.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = command(
        *(without_tokenizer, "--prompts", prompts, "--report", report),
        *("--max-new-tokens", str(MAX_NEW_TOKENS), "--temperature", "2", "--seed", "3"),
    )[1:]
    done = run_command([*launcher, *arguments])
    assert done.returncode == 0, done.err
    lines = read_lines(done.out)
    assert [line["id"] for line in lines] == list(range(len(TOKEN_PROMPTS)))
    assert [line["text"] for line in lines] == [None] * len(lines)

    generator = Generator(AutoModelForCausalLM.from_pretrained(without_tokenizer, dtype="auto"))
    for index, (line, prompt) in enumerate(zip(lines, TOKEN_PROMPTS, strict=True)):
        request = Request(index, tuple(prompt), MAX_NEW_TOKENS, 2.0, 3 + index)
        assert line["token_ids"] == list(generator.generate(request)[0])
    summary = GenerateReport.model_validate_json(report.read_text())
    assert (summary.launcher, summary.config.dwdp_size) == ("torchrun", 2)
    assert sum(rank.num_prompts for rank in summary.ranks) == len(TOKEN_PROMPTS)
    assert done.err.count("mixtral: ") == 1, "rank 0 alone shows the table"

    write_lines(prompts, {"id": 1, "prompt": "text"})
    report.unlink()
    refused = run_command([*launcher, *arguments])
    assert refused.returncode != 0
    assert refused.out == ""
    # torchrun ends the other rank as soon as one has ended, so there may be one line or two.
    errors = [line for line in refused.err.splitlines() if line.startswith("dwdp: error: ")]
    assert errors
    for error in errors:
        assert f"{prompts}:1: the checkpoint has no tokenizer" in error
    assert not report.exists()


def test_a_rank_killed_while_generating_is_reported(
    without_tokenizer: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others = set(psutil.Process().children())  # such as multiprocessing's resource tracker

    def kill_rank_1(progress: RunProgress, completion: Completion) -> None:
        children = [child for child in psutil.Process().children() if child not in others]
        ranks = sorted(children, key=lambda process: process.pid)
        if len(ranks) == 2:
            ranks[1].kill()

    monkeypatch.setattr(RunProgress, "prompt_is_finished", kill_rank_1)
    # So many that rank 1 holds some whenever it is killed.
    token_prompts = [*TOKEN_PROMPTS] * 10
    prompts = write_lines(
        tmp_path / "prompts.jsonl",
        *({"id": index, "prompt_token_ids": prompt} for index, prompt in enumerate(token_prompts)),
    )
    output, report = tmp_path / "out.jsonl", tmp_path / "report.json"
    arguments = ["generate", without_tokenizer, "--dwdp-size", 2, "--prompts", prompts]
    arguments += ["--output", output, "--report", report, "--max-new-tokens", MAX_NEW_TOKENS]
    assert run([str(word) for word in arguments]) == 0
    lines = read_lines(output.read_text())
    expected = expected_tokens(without_tokenizer, TOKEN_PROMPTS) * 10
    assert [line["token_ids"] for line in lines] == expected
    summary = GenerateReport.model_validate_json(report.read_text())
    assert summary.lost_ranks == (1,)
    assert [rank.rank for rank in summary.ranks] == [0, 1]
    assert summary.totals.num_prompts == len(token_prompts)
    error = capfd.readouterr().err
    assert "dwdp: warning: rank 1 was killed by SIGKILL; its " in error
    assert "1 lost" in error


@pytest.fixture
def running(without_tokenizer: Path, tmp_path: Path) -> Iterator[psutil.Popen]:
    """The command with its two ranks being set up, or soon after."""
    prompts = write_lines(tmp_path / "p.jsonl", {"id": 1, "prompt_token_ids": [5] * 8})
    process = psutil.Popen(
        command(
            *(without_tokenizer, "--dwdp-size", "2", "--prompts", prompts),
            *("--output", tmp_path / "out.jsonl", "--max-new-tokens", "400"),
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    deadline = time.monotonic() + 120
    while len(process.children()) < 2:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()


def test_a_rank_killed_during_set_up_ends_the_run_within_10_s(
    running: psutil.Popen, tmp_path: Path
) -> None:
    ranks = running.children()
    ranks[1].kill()
    _, err = running.communicate(timeout=10)
    assert running.returncode == 1
    assert err == "dwdp: error: rank 1 was killed by SIGKILL during set-up\n"
    assert not any(rank.is_running() for rank in ranks)
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_a_killed_command_leaves_no_process(running: psutil.Popen, tmp_path: Path) -> None:
    ranks = running.children()
    time.sleep(3)
    ranks[0].suspend()
    running.kill()
    running.wait()
    _, alive = psutil.wait_procs(ranks, timeout=10)
    for rank in alive:
        rank.kill()
    assert alive == []
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_an_interrupt_ends_the_run_quietly(running: psutil.Popen, tmp_path: Path) -> None:
    ranks = running.children()
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=20)
    assert running.returncode == 130
    assert err.strip() == ""
    assert not any(rank.is_running() for rank in ranks)
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


# Bad input: one line, exit code 2, nothing left behind, and no process started.


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "dense"
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def corrupt(without_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    weights = (without_tokenizer / "model.safetensors").read_bytes()
    (path / "config.json").write_bytes((without_tokenizer / "config.json").read_bytes())
    (path / "model.safetensors").write_bytes(weights[:-100])
    return path


@pytest.fixture
def refuse(
    without_tokenizer: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """Runs the command in this process, and checks that it refuses properly. Returns its one line."""

    def start(*_: Any, **__: Any) -> None:
        pytest.fail("a process was started")

    monkeypatch.setattr("dwdp.serving.processes.subprocess.Popen", start)
    prompts = write_lines(tmp_path / "p.jsonl", {"id": 1, "prompt_token_ids": [1, 2]})

    def refuse(*arguments: str | Path, model: Path = without_tokenizer) -> str:
        before = sorted(tmp_path.rglob("*"))
        defaults: list[str | Path] = ["generate", model]
        if "--prompts" not in arguments and "--prompt" not in arguments:
            defaults += ["--prompts", prompts]
        for flag in ("--output", "--report"):
            if flag not in arguments:
                defaults += [flag, tmp_path / flag.lstrip("-")]
        code = run([str(word) for word in (*defaults, *arguments)])
        captured = capfd.readouterr()
        assert code == 2, captured.err
        assert captured.out == ""
        assert captured.err.startswith("dwdp: error: ")
        assert captured.err.count("\n") == 1, captured.err
        assert sorted(tmp_path.rglob("*")) == before
        return captured.err

    return refuse


def test_bad_models_are_refused(refuse: Any, dense: Path, corrupt: Path, tmp_path: Path) -> None:
    assert "none is not a directory" in refuse(model=tmp_path / "none")
    assert "config.json" in refuse(model=tmp_path)
    assert "corrupt or incomplete" in refuse(model=corrupt)
    assert "llama is a dense model" in refuse(model=dense)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--dwdp-size", "0"), "'--dwdp-size': 0 is not in the range 1<=x<=72"),
        (("--dwdp-size", "abc"), "'--dwdp-size': 'abc' is not a valid integer (see"),
        (("--dwdp-size", "2.5"), "'--dwdp-size': '2.5' is not a valid integer (see"),
        (("--temperature", "hot"), "'--temperature': 'hot' is not a valid number (see"),
        (("--dwdp-size", "11"), "11"),
        (("--dwdp-size", "2", "--num-experts-per-worker", "3"), "num_experts_per_worker"),
        (("--dwdp-size", "2", "--num-prefetch-experts", "4"), "num_prefetch_experts"),
        (
            ("--num-experts-per-worker", "2", "--num-prefetch-experts", "3"),
            r"num_prefetch_experts (3) is larger",
        ),
        (("--fetch-mode", "psychic"), "'psychic' is not one of"),
        (("--device", "tpu"), "'tpu' is not"),
        (("--dtype", "int3"), "'int3' is not one of"),
        (("--num-slots", "1"), "'--num-slots'"),
        (("--temperature", "-1"), "'--temperature'"),
        (("--temperature", "1e-40"), "--temperature: 1e-40: use 0"),
        (("--threads-per-rank", "100000"), "'--threads-per-rank'"),
        (("--temperature", "nan"), "'--temperature': 'nan' is not a finite number (see"),
        (("--max-new-tokens", "0"), "'--max-new-tokens'"),
        (("--max-new-tokens", "511"), "more than the 512 positions"),
        (("--setup-timeout-s", "inf"), "setup"),
        (("--prompt", "text"), "the checkpoint has no tokenizer"),
        (("--output", "/nowhere/out.jsonl"), "there is no directory /nowhere"),
        (("--output", "/dev/fd"), "/dev/fd is a directory"),
        (("--report", "/"), "/ is a directory"),
        (("--prompts", "/nowhere/p.jsonl"), "/nowhere/p.jsonl: No such file"),
        (("--prompts", "/"), "/: Is a directory"),
        (("--no-such-option",), "No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_options_are_refused(refuse: Any, arguments: tuple[str, ...], what: str) -> None:
    assert what in refuse(*arguments)


def test_bad_prompts_are_refused_by_line(refuse: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": 1, "prompt_token_ids": [1]}\n{"id": 2}\n')
    assert f"{prompts}:2: give one of" in refuse("--prompts", prompts)
    prompts.write_text(f'{{"id": 1, "prompt_token_ids": [{VOCAB_SIZE}]}}\n')
    assert f"{prompts}:1: token id 128 at position 0" in refuse("--prompts", prompts)
    assert "different files" in refuse("--prompts", prompts, "--output", prompts)
    assert "either --prompts FILE or --prompt TEXT" in refuse("--prompts", prompts, "--prompt", "x")


@pytest.fixture
def linked(without_tokenizer: Path, tmp_path: Path) -> Path:
    """A checkpoint whose files can be replaced."""
    model = tmp_path / "model"
    model.mkdir()
    for file in without_tokenizer.iterdir():
        (model / file.name).symlink_to(file)
    return model


def test_a_broken_tokenizer_is_refused(refuse: Any, linked: Path) -> None:
    (linked / "tokenizer.json").write_text("{")
    assert f"the tokenizer in {linked} cannot be loaded" in refuse(model=linked)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "is not valid JSON: Expecting property name"),
        ("", "is not valid JSON: Expecting value"),
        ("[]", "holds a JSON list, not an object"),
        (
            '{"cache_implementation": "nope"}',
            "is not usable: Invalid `cache_implementation` (nope)",
        ),
    ],
)
def test_a_broken_generation_config_is_refused(
    refuse: Any, linked: Path, text: str, what: str
) -> None:
    path = linked / "generation_config.json"
    path.unlink()
    path.write_text(text)
    assert f"{path} {what}" in refuse(model=linked)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_a_fifo_in_place_of_a_file_does_not_hang(refuse: Any, linked: Path, name: str) -> None:
    path = linked / name
    path.unlink()
    os.mkfifo(path)
    assert f"{path} is a FIFO, not a file" in refuse(model=linked)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_directory_in_place_of_a_file_is_refused(refuse: Any, linked: Path, name: str) -> None:
    path = linked / name
    path.unlink()
    path.mkdir()
    assert f"cannot read {path}: Is a directory" in refuse(model=linked)


def test_a_checkpoint_without_generation_config_is_not_refused_for_it(
    refuse: Any, linked: Path, tmp_path: Path
) -> None:
    (linked / "generation_config.json").unlink()
    assert "the checkpoint has no tokenizer" in refuse("--prompt", "x", model=linked)


def test_more_memory_than_there_is_is_refused(refuse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dwdp.serving.plan.available_memory_bytes", lambda: 1 << 20)
    assert "GiB are available" in refuse("--dwdp-size", "2")


def test_a_taken_port_is_refused(refuse: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}: Address already in use" in refuse("--port", str(port))


def test_a_launcher_that_contradicts_itself_is_refused(
    refuse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert "torchrun set no WORLD_SIZE" in refuse()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "2900")
    assert "torchrun has chosen where" in refuse("--port", "2901")
    assert "3: torchrun started 2 ranks" in refuse("--dwdp-size", "3")
