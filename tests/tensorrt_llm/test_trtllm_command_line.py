"""``trtllm-serve ... --parallel dwdp``: options, the YAML file, and what is served."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from dwdp.config import DwdpConfig
from dwdp.engines.tensorrt_llm import command_line, launch

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def plain_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_prepared", None)


class Served:
    """``tensorrt_llm.commands.serve`` with its two servers replaced: they note what they were given."""

    def __init__(self, module: Any) -> None:
        self.main: click.Command = module.main
        self.given: list[tuple[Any, ...]] = []
        self.groups: list[tuple[Any, ...]] = []

    def note(
        self,
        host: str,
        port: int,
        llm_args: dict[str, Any],
        tool_parser: Any = None,
        chat_template: Any = None,
        metadata_server_cfg: Any = None,
        server_role: Any = None,
        disagg_cluster_config: Any = None,
        multimodal_server_config: Any = None,
    ) -> None:
        self.given.append((host, port, llm_args))
        if str(llm_args["model"]) == "FAILS":
            raise RuntimeError("Executor worker returned error") from ValueError("no such model")

    def note_group(self, config: DwdpConfig, llm_args: Any, *, host: str, port: int) -> int:
        self.groups.append((config, host, port))
        return 0

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(self.main, arguments)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    import tensorrt_llm  # noqa: F401
    from tensorrt_llm.commands import serve

    module: Any = serve
    served = Served(module)
    monkeypatch.setattr(
        module, "launch_server", command_line._serving(served.note, command_line._serve_http)
    )
    monkeypatch.setattr(
        module, "launch_grpc_server", command_line._serving(served.note, command_line._refuse_grpc)
    )
    monkeypatch.setattr(command_line, "serve_group", served.note_group)
    monkeypatch.setattr(module, "device_count", lambda: 1)
    return served


trtllm = pytest.mark.trtllm


@trtllm
def test_the_help_lists_every_option(served: Served) -> None:
    text = served.run("serve", "--help").output
    for name in DwdpConfig.model_fields:
        assert f"--dwdp_{name.removeprefix('dwdp_')}" in text
    assert "--parallel [dwdp]" in text
    assert "--dwdp_rank" in text and "--dwdp_rendezvous" in text


@trtllm
def test_without_the_option_nothing_changes(served: Served) -> None:
    assert served.run("MODEL", "--port", "9").exit_code == 0
    ((host, port, llm_args),) = served.given
    assert (host, port) == ("localhost", 9)
    assert not {"parallel", "dwdp_config"} & llm_args.keys()


@trtllm
def test_without_a_launcher_a_group_is_served(served: Served) -> None:
    result = served.run("MODEL", "--parallel", "dwdp", "--dwdp_size", "4", "--port", "9")
    assert result.exit_code == 0, result.output
    assert served.groups == [(DwdpConfig(dwdp_size=4), "localhost", 9)]
    assert served.given == []


@trtllm
def test_a_rank_serves_its_model(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_prepared", launch._Prepared({}, local_rank=1))
    result = served.run(
        "MODEL",
        *("--parallel", "dwdp", "--dwdp_size", "2", "--port", "9"),
        *("--dwdp_rank", "1", "--dwdp_rendezvous", "node0:4000", "--no_dwdp_contention_opt"),
    )
    assert result.exit_code == 0, result.output
    ((_, port, llm_args),) = served.given
    assert port == 10
    assert llm_args["parallel"] == "dwdp"
    assert llm_args["dwdp_config"] == {
        "dwdp_size": 2,
        "contention_opt": False,
        "rank": 1,
        "rendezvous": "node0:4000",
    }


@trtllm
def test_keys_of_the_file_win_over_options_one_by_one(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("parallel: dwdp\ndwdp_config:\n  num_slots: 5\n  fetch_mode: staged\n")
    result = served.run(
        *("MODEL", "--extra_llm_api_options", str(file), "--dwdp_size", "4"),
        *("--dwdp_num_slots", "3", "--dwdp_lane_depth", "2"),
    )
    assert result.exit_code == 0, result.output
    ((config, _, _),) = served.groups
    assert config == DwdpConfig(dwdp_size=4, num_slots=5, fetch_mode="staged", lane_depth=2)


@trtllm
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--parallel", "tp"), "Invalid value for '--parallel'"),
        (("--dwdp_size", "4"), "--dwdp_size: needs --parallel dwdp"),
        (("--parallel", "dwdp"), "dwdp_config has no dwdp_size"),
        (("--parallel", "dwdp", "--dwdp_size", "99"), "dwdp_config.dwdp_size is 99"),
        (("--parallel", "dwdp", "--dwdp_size", "4", "--tp_size", "2"), "tensor_parallel_size=2"),
        (
            ("--parallel", "dwdp", "--dwdp_size", "4", "--ep_size", "2"),
            "moe_expert_parallel_size=2",
        ),
        (("--parallel", "dwdp", "--dwdp_size", "4", "--backend", "trt"), "backend='tensorrt'"),
        (("--parallel", "dwdp", "--dwdp_size", "4", "--grpc"), "--grpc: the endpoint of a group"),
        (
            (
                *("--parallel", "dwdp", "--dwdp_size", "4"),
                *("--server_role", "context", "--disagg_cluster_uri", "http://h:1"),
            ),
            "is for one server, not for a group",
        ),
        (("--parallel", "dwdp", "--dwdp_size", "4", "--dwdp_rank", "1"), "does not know where"),
    ],
)
def test_what_does_not_fit_is_refused(
    served: Served, arguments: tuple[str, ...], text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    result = served.run("MODEL", *arguments)
    assert result.exit_code == 2
    assert text in result.output + result.stderr + capfd.readouterr().err
    assert served.given == [] and served.groups == []


@trtllm
def test_the_worker_of_another_command_has_no_options(served: Served) -> None:
    from tensorrt_llm.commands import serve

    llm_args, _ = serve.get_llm_args(model="M", gpus_per_node=1)
    assert "parallel" not in llm_args
    merged = serve.update_llm_args_with_extra_dict(
        llm_args, {"parallel": "dwdp", "dwdp_config": {"dwdp_size": 2}}
    )
    assert merged["dwdp_config"] == {"dwdp_size": 2}


@trtllm
@pytest.mark.timeout(120)
def test_a_rank_that_fails_tells_why_in_its_last_line(served: Served) -> None:
    from dwdp.rendezvous import prefixed, recorded_failure, serve_store

    store = serve_store("127.0.0.1", 0, 2)
    result = served.run(
        *("FAILS", "--parallel", "dwdp", "--dwdp_size", "2", "--dwdp_rank", "1"),
        *("--dwdp_rendezvous", f"127.0.0.1:{store.port}"),
    )
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "error: ValueError: no such model"
    failure = recorded_failure(prefixed(store))
    assert failure is not None
    assert (failure.rank, failure.message, failure.bad_input) == (
        1,
        "ValueError: no such model",
        True,
    )


_RANK = """
import json, os, sys
sys.argv = ["trtllm-serve", "MODEL", "--parallel", "dwdp", "--port", "8000"]
import tensorrt_llm.commands.serve as serve
from dwdp.engines.tensorrt_llm import command_line
from tensorrt_llm._utils import mpi_world_size, mpi_rank
from tensorrt_llm.llmapi.llm_args import TorchLlmArgs

def note(host, port, llm_args, *others):
    llm_args.pop("build_config")
    args = TorchLlmArgs(**llm_args, skip_tokenizer_init=True)
    args.parallel_config.to_mapping()  # fails in a rank that takes itself for one of several GPUs
    line = {"port": port, "mpi": [mpi_rank(), mpi_world_size()], "env": args.env_overrides,
            "gpu": os.environ["CUDA_VISIBLE_DEVICES"]}
    sys.stdout.write(json.dumps(line) + "\\n")

serve.device_count = lambda: 1
serve.launch_server = command_line._serving(note, command_line._serve_http)
serve.main()
"""


@trtllm
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun")
@pytest.mark.timeout(600)
def test_ranks_of_mpirun_are_models_of_their_own(tmp_path: Path) -> None:
    program = tmp_path / "rank.py"
    program.write_text(_RANK)
    done = subprocess.run(
        [
            "mpirun",
            "--allow-run-as-root",
            "--oversubscribe",
            "-n",
            "2",
            sys.executable,
            str(program),
        ],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    ranks = sorted(map(json.loads, lines), key=lambda rank: rank["port"])
    assert [rank["port"] for rank in ranks] == [8000, 8001]
    assert [rank["gpu"] for rank in ranks] == ["0", "1"]
    assert [rank["mpi"] for rank in ranks] == [[0, 1], [0, 1]]
    assert [rank["env"]["DWDP_RANK"] for rank in ranks] == ["0", "1"]
    assert {rank["env"]["DWDP_WORLD_SIZE"] for rank in ranks} == {"2"}


@trtllm
@pytest.mark.timeout(300)
def test_the_module_as_a_program_has_the_options() -> None:
    program = [sys.executable, "-m", "tensorrt_llm.commands.serve", "serve", "--help"]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "--parallel [dwdp]" in done.stdout and "--dwdp_num_slots" in done.stdout


def test_options_follow_the_fields_of_the_config() -> None:
    """Without TensorRT-LLM: what is added to a command, on a command of this test's own."""
    options = command_line._options(lambda text, tag: f"[{tag}] {text}")
    by_name = {option.name: option for option in options}
    assert list(by_name) == [
        "parallel",
        *(f"dwdp_{name.removeprefix('dwdp_')}" for name in DwdpConfig.model_fields),
        "dwdp_rank",
        "dwdp_rendezvous",
    ]
    for name, field in DwdpConfig.model_fields.items():
        option = by_name[f"dwdp_{name.removeprefix('dwdp_')}"]
        assert option.help == f"[prototype] {field.description}"
        assert option.default is None and not option.expose_value
    assert isinstance(by_name["dwdp_fetch_mode"].type, click.Choice)
    seen: dict[str, Any] = {}

    @click.command(params=[*options])
    @click.pass_context
    def command(context: click.Context) -> None:
        seen.update(command_line._given())

    arguments = ["--dwdp_size", "3", "--no_dwdp_contention_opt", "--dwdp_setup_timeout_s", "1.5"]
    CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert seen == {"dwdp_size": 3, "dwdp_contention_opt": False, "dwdp_setup_timeout_s": 1.5}
