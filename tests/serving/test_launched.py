"""``dwdp generate`` as the ranks of a launcher: every process is a rank, and they end alike."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from checkpoints import make_checkpoint

from dwdp.rendezvous import prefixed, report_failure, serve_store

ROOT = Path(__file__).resolve().parents[2]
GOOD = ("--prompts", "{prompts}", "--max-new-tokens", "2", "--threads-per-rank", "1")


@dataclass
class Ended:
    """One rank's command."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("models") / "tokens")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"id": {i}, "prompt_token_ids": [5, {i}]}}\n' for i in range(4)))
    return path


def generate(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "dwdp", "generate", *map(str, arguments)]


def free_port() -> int:
    """A port that the kernel gives to nobody by itself: a rank binds it seconds later."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in random.sample(range(10_000, min(first, 20_000)), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def run_ranks(*commands: list[str], port: int | None = None) -> list[Ended]:
    """Each command as one rank of torchrun's environment, without an agent that ends the others.

    Rank 0 serves the store, unless ``port`` says where one is served.
    """
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port())}
    if port is not None:
        address["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    ranks = [
        subprocess.Popen(
            command,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "RANK": str(rank),
                "WORLD_SIZE": str(len(commands)),
                **address,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]
    outputs = [rank.communicate(timeout=200) for rank in ranks]
    return [
        Ended(rank.returncode, out, err) for rank, (out, err) in zip(ranks, outputs, strict=True)
    ]


def error_of(rank: Ended) -> str:
    """Its one line."""
    assert rank.out == ""
    assert rank.err.startswith("dwdp: error: ") and rank.err.count("\n") == 1, rank.err
    return rank.err


MISSING_PROMPTS = (("{model}", "--prompts", "/nowhere"), "/nowhere: No such file or directory")
REFUSED_BY_ANY_RANK = {
    "model": (("/nowhere", *GOOD), "/nowhere is not a directory"),
    "launcher": (("{model}", *GOOD, "--dwdp-size", "3"), "3: torchrun started 2 ranks"),
    "option": (("{model}", *GOOD, "--num-slots", "1"), "'--num-slots': 1 is not in the range"),
    "placement": (("{model}", *GOOD, "--num-experts-per-worker", "1"), "num_experts_per_worker"),
}


@pytest.mark.parametrize(
    ("bad_rank", "arguments", "what"),
    [
        pytest.param(0, *MISSING_PROMPTS, id="prompts"),
        *(
            pytest.param(rank, *case, id=f"{name} of rank {rank}")
            for name, case in REFUSED_BY_ANY_RANK.items()
            for rank in range(2)
        ),
    ],
)
def test_bad_input_of_one_rank_ends_all_with_code_2_and_its_message(
    model: Path, prompts: Path, bad_rank: int, arguments: tuple[str, ...], what: str
) -> None:
    def filled(words: tuple[str, ...]) -> list[str]:
        return generate(*(word.format(model=model, prompts=prompts) for word in words))

    good = filled(("{model}", *GOOD))
    bad = filled(arguments)
    ranks = run_ranks(*([bad, good] if bad_rank == 0 else [good, bad]))
    assert [rank.code for rank in ranks] == [2, 2], ranks
    assert what in error_of(ranks[bad_rank])
    quoted = error_of(ranks[1 - bad_rank])
    assert quoted.startswith(f"dwdp: error: rank {bad_rank}: ") and what in quoted


def test_bad_input_of_all_ranks_ends_all_with_code_2(model: Path) -> None:
    command = generate(model, "--prompt", "x", "--num-slots", "1")
    ranks = run_ranks(command, command)
    assert [rank.code for rank in ranks] == [2, 2]
    for rank in ranks:
        assert "'--num-slots': 1 is not in the range" in error_of(rank)


def test_a_failure_that_is_not_bad_input_ends_all_with_code_1(model: Path, prompts: Path) -> None:
    store = serve_store("127.0.0.1", 0, 2)
    report_failure(prefixed(store), 1, "no room for descriptors")
    command = generate(model, "--prompts", prompts)
    ranks = run_ranks(command, command, port=store.port)
    assert [rank.code for rank in ranks] == [1, 1]
    for rank in ranks:
        assert error_of(rank) == "dwdp: error: rank 1: no room for descriptors\n"


def test_ranks_with_different_options_end_with_code_1(model: Path, prompts: Path) -> None:
    command = generate(model, "--prompts", prompts)
    ranks = run_ranks(command, [*command, "--slice-bytes", "8192"])
    assert [rank.code for rank in ranks] == [1, 1]
    for rank in ranks:
        assert "have different expert tensors or dwdp options" in error_of(rank)


ON_A_HOST_OF_ITS_OWN = """\
import os, sys
from dataclasses import replace
from dwdp.process_identity import ProcessIdentity
mine = ProcessIdentity.current()
ProcessIdentity.current = classmethod(lambda cls: replace(mine, host=os.environ["RANK"]))
from dwdp.cli.main import main
main(sys.argv[1:])
"""


def test_ranks_on_several_hosts_are_refused(model: Path, prompts: Path) -> None:
    command = generate(model, "--prompts", prompts)
    command[1:3] = ["-c", ON_A_HOST_OF_ITS_OWN]
    ranks = run_ranks(command, command)
    assert [rank.code for rank in ranks] == [2, 2], ranks
    for rank in ranks:
        assert "runs on one host, and these 2 ranks are on several" in error_of(rank)


MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"]


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed")
def test_mpirun_starts_the_ranks(model: Path, prompts: Path, tmp_path: Path) -> None:
    output, report = tmp_path / "out.jsonl", tmp_path / "report.json"

    def start(prompts: Path) -> subprocess.CompletedProcess[str]:
        arguments = ("--prompts", prompts, "--output", output, "--report", report)
        return subprocess.run(
            [*MPIRUN, *generate(model, *arguments, "--max-new-tokens", "3")],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    done = start(prompts)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["id"] for line in lines] == [0, 1, 2, 3]
    assert {line["rank"] for line in lines} == {0, 1}
    assert done.stderr.count("mixtral: ") == 1, "rank 0 alone shows the table"
    summary = json.loads(report.read_text())
    assert (summary["launcher"], summary["config"]["dwdp_size"]) == ("mpirun", 2)

    refused = start(tmp_path / "nowhere.jsonl")
    assert refused.returncode == 2
    assert f"{tmp_path / 'nowhere.jsonl'}: No such file or directory" in refused.stderr
