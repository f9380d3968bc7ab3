"""``parallel`` and ``dwdp_config`` among the arguments of LLM: what is accepted, refused, and changed."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel, Field

from dwdp.config import DwdpConfig
from dwdp.engines.tensorrt_llm import arguments, launch
from dwdp.engines.tensorrt_llm.conflicts import CONFLICTS, refuse_conflicts

PLACE = {"DWDP_RANK": "1", "DWDP_RENDEZVOUS": "127.0.0.1:4000"}


@pytest.fixture(autouse=True)
def plain_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_prepared", None)


def asked(**config: Any) -> dict[str, Any]:
    return {"parallel": "dwdp", "dwdp_config": config}


def test_keys_of_tensorrt_llms_own_config_are_accepted() -> None:
    request = arguments.read_request(
        asked(
            dwdp_size=4,
            num_groups=2,
            num_experts_per_worker=64,
            num_prefetch_experts=64,
            contention_opt=False,
        )
    )
    assert request is not None
    assert request.config == DwdpConfig(
        dwdp_size=4,
        num_groups=2,
        num_experts_per_worker=64,
        num_prefetch_experts=64,
        contention_opt=False,
    )


def test_a_config_may_be_a_model_or_a_mapping_with_a_place() -> None:
    config = DwdpConfig(dwdp_size=4, num_slots=3)
    request = arguments.read_request({"parallel": "dwdp", "dwdp_config": config})
    assert request == arguments.Request(config)
    assert request is not None and request.as_dict() == {"dwdp_size": 4, "num_slots": 3}
    placed = asked(dwdp_size=4, rank=2, rendezvous="node0:4000")
    request = arguments.read_request(placed)
    assert request == arguments.Request(DwdpConfig(dwdp_size=4), 2, "node0:4000")
    assert request is not None and request.as_dict() == placed["dwdp_config"]


def test_who_does_not_ask_gets_nothing() -> None:
    assert arguments.read_request({"model": "m", "dwdp_config": {"dwdp_size": 4}}) is None
    assert arguments.read_request({"parallel": None}) is None


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"parallel": "tp"}, "parallel is 'tp'; it can be 'dwdp'"),
        ({"parallel": "dwdp", "dwdp_config": 4}, "dwdp_config is 4; it has to be a mapping"),
        (asked(dwdp_size=0), "dwdp_config.dwdp_size is 0: .* greater than or equal to 1"),
        (
            asked(dwdp_size=4, slots=3),
            "dwdp_config has no key 'slots'; it has dwdp_size, .*rendezvous",
        ),
        (
            asked(dwdp_size=4, num_experts_per_worker=2, num_prefetch_experts=3),
            r"dwdp_config: num_prefetch_experts \(3\) is larger",
        ),
        (asked(dwdp_size=4, rank=-1), "dwdp_config.rank is -1"),
        (asked(dwdp_size=4, rank=True), "dwdp_config.rank is True"),
        (asked(dwdp_size=4, rendezvous=4000), "dwdp_config.rendezvous is 4000"),
        (asked(), "no dwdp_size, and no launcher says"),
    ],
)
def test_wrong_values_are_named(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        arguments.read_request(settings)


def test_the_launcher_says_how_large_a_group_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DWDP_RANK", "5")
    monkeypatch.setenv("DWDP_WORLD_SIZE", "8")
    for config, size in (({}, 8), ({"num_groups": 2}, 4)):
        request = arguments.read_request(asked(**config))
        assert request is not None and request.config.dwdp_size == size
    with pytest.raises(ValueError, match=r"num_groups is 3, and 8 ranks were started"):
        arguments.read_request(asked(num_groups=3))


REFUSED: dict[str, Any] = {
    "backend": "tensorrt",
    "tensor_parallel_size": 2,
    "pipeline_parallel_size": 2,
    "context_parallel_size": 2,
    "moe_tensor_parallel_size": 2,
    "moe_expert_parallel_size": 4,
    "moe_cluster_parallel_size": 2,
    "enable_attention_dp": True,
    "enable_lm_head_tp_in_adp": True,
    "moe_config.load_balancer": {"num_slots": 288},
    "moe_config.backend": "WIDEEP",
    "lora_config": {"lora_target_modules": ["attn_q", "moe_gate"]},
    "enable_sleep": True,
    "sleep_config": {"restore_modes": {}},
    "orchestrator_type": "ray",
    "ray_worker_extension_cls": "module.Class",
    "ray_placement_config": {"placement_groups": []},
    "torch_compile_config.enable_piecewise_cuda_graph": True,
    "torch_compile_config.max_num_streams": 2,
    "enable_min_latency": True,
    "mm_encoder_only": True,
    "load_format": "dummy",
}


def nested(name: str, value: Any) -> dict[str, Any]:
    outer, _, inner = name.partition(".")
    return {outer: {inner: value} if inner else value}


def test_every_conflict_is_tried() -> None:
    assert list(REFUSED) == [conflict.name for conflict in CONFLICTS]


@pytest.mark.parametrize("name", REFUSED)
def test_a_conflict_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f'parallel="dwdp" does not go together with {name}='):
        refuse_conflicts(nested(name, REFUSED[name]), {})


def test_all_conflicts_are_named_at_once() -> None:
    settings = {"tensor_parallel_size": 2, "enable_lora": True}
    with pytest.raises(
        ValueError, match=r"tensor_parallel_size=2: .*; enable_lora=True: .*; TLLM_DIS"
    ):
        refuse_conflicts(settings, {"TLLM_DISABLE_MPI": "1"})


def test_one_model_on_all_processes_of_a_launcher_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environ = {"TLLM_SPAWN_PROXY_PROCESS": "1"}
    with pytest.raises(ValueError, match="start it without trtllm-llmapi-launch"):
        refuse_conflicts({}, environ)
    refuse_conflicts({}, {"TLLM_SPAWN_PROXY_PROCESS": "0"})
    monkeypatch.setenv("TLLM_SPAWN_PROXY_PROCESS", "1")
    with pytest.raises(ValueError, match="start it without trtllm-llmapi-launch"):
        arguments.read_request(asked())  # Rather than: nobody says how many ranks there are.
    # A server of disaggregated_mpi_worker has a worker of its own.
    refuse_conflicts({}, environ | {"TLLM_DISAGG_INSTANCE_IDX": "0"})


@pytest.mark.parametrize("key", ["dwdp_size", "num_groups", "num_slots", "setup_timeout_s"])
def test_a_number_is_not_true_or_false(key: str) -> None:
    with pytest.raises(ValueError, match=rf"dwdp_config.{key} is True; it cannot be true or false"):
        arguments.read_request(asked(**{"dwdp_size": 2, key: True}))


def test_settings_that_ask_for_nothing_are_no_conflicts() -> None:
    refuse_conflicts(
        {
            "backend": "pytorch",
            "tensor_parallel_size": 1,
            "moe_expert_parallel_size": -1,
            "moe_tensor_parallel_size": None,
            "enable_attention_dp": False,
            "moe_config": {"backend": "CUTLASS"},
            "lora_config": {"lora_target_modules": ["attn_q"]},
            "load_format": "auto",
            "orchestrator_type": "rpc",
            "torch_compile_config": {"max_num_streams": 1},
        },
        {},
    )


@pytest.fixture
def torch_llm_args() -> Any:
    """TensorRT-LLM's class, with the plugin's fields."""
    import tensorrt_llm  # noqa: F401
    from tensorrt_llm.llmapi import llm_args

    return llm_args.TorchLlmArgs


def make(cls: Any, **settings: Any) -> Any:
    return cls(model="/nowhere", skip_tokenizer_init=True, gpus_per_node=1, **settings)


@pytest.mark.trtllm
def test_the_arguments_of_llm(
    torch_llm_args: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = make(torch_llm_args)
    assert (plain.parallel, plain.dwdp_config, arguments.config_of(plain)) == (None, None, None)

    owner = make(torch_llm_args, **asked(dwdp_size=2, num_slots=3))
    assert owner.env_overrides is None  # a plain process: it owns the group
    assert arguments.config_of(owner) == DwdpConfig(dwdp_size=2, num_slots=3)
    assert owner.cuda_graph_config == plain.cuda_graph_config

    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TLLM_AUTOTUNER_CACHE_PATH", "/cache")
    rank = make(torch_llm_args, **asked(dwdp_size=2), env_overrides={"OTHER": 1})
    assert rank.env_overrides == {
        "OTHER": "1",
        "DWDP_RANK": "1",
        "DWDP_WORLD_SIZE": "2",
        "DWDP_RENDEZVOUS": "127.0.0.1:4000",
        "DWDP_STORE_IS_SERVED": "0",
        "DWDP_ATTEMPT": "0",
        "DWDP_INCARNATION": "0",
        "DWDP_SERVER_PID": str(os.getpid()),
        "TLLM_AUTOTUNER_CACHE_PATH": "/cache.rank1",
    }
    again = torch_llm_args.model_validate(
        {"model": "/x", "skip_tokenizer_init": True, **asked(dwdp_size=2)}
    )
    assert again.env_overrides["DWDP_RANK"] == "1"


@pytest.mark.trtllm
@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"dwdp_config": {"dwdp_size": 2}}, 'it needs parallel="dwdp"'),
        (asked(dwdp_size=2, num_slots=1), "dwdp_config.num_slots is 1"),
        ({**asked(dwdp_size=2), "enable_attention_dp": True}, "enable_attention_dp=True"),
        ({**asked(dwdp_size=2), "tensor_parallel_size": 2}, "tensor_parallel_size=2"),
        ({**asked(dwdp_size=2), "no_such_setting": 2}, "no_such_setting"),
        ({"parallel": 7}, "parallel is 7"),
    ],
)
def test_bad_arguments_of_llm(torch_llm_args: Any, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make(torch_llm_args, **settings)


@pytest.mark.trtllm
def test_nested_settings_may_be_objects(torch_llm_args: Any) -> None:
    from tensorrt_llm.llmapi.llm_args import MoeConfig, TorchCompileConfig

    with pytest.raises(ValueError, match=r"moe_config\.load_balancer='file.yaml'"):
        make(torch_llm_args, **asked(dwdp_size=2), moe_config=MoeConfig(load_balancer="file.yaml"))
    with pytest.raises(ValueError, match=r"torch_compile_config\.max_num_streams=2"):
        make(
            torch_llm_args,
            **asked(dwdp_size=2),
            torch_compile_config=TorchCompileConfig(max_num_streams=2),
        )


@pytest.mark.trtllm
def test_the_keys_are_known_to_llm_itself(torch_llm_args: Any) -> None:
    from tensorrt_llm import LLM

    with pytest.raises(ValueError, match="enable_sleep=True"):
        LLM("/nowhere", skip_tokenizer_init=True, enable_sleep=True, **asked(dwdp_size=2))
    with pytest.raises(ValueError, match="invalid argument: parallell"):
        LLM("/nowhere", skip_tokenizer_init=True, parallell="dwdp")


_READ = """
import pickle, sys
args = pickle.load(open(sys.argv[1], "rb"))
print(args.parallel, args.dwdp_config, type(args.dwdp_config).__module__, args.env_overrides)
print("parallel" in type(args).model_fields)
"""


@pytest.mark.trtllm
@pytest.mark.timeout(300)
def test_arguments_survive_a_child_without_the_plugin(torch_llm_args: Any, tmp_path: Any) -> None:
    owner = make(torch_llm_args, **asked(dwdp_size=2, fetch_mode="staged"))
    copy = pickle.loads(pickle.dumps(owner))
    assert arguments.config_of(copy) == DwdpConfig(dwdp_size=2, fetch_mode="staged")
    file = tmp_path / "args.pickle"
    file.write_bytes(pickle.dumps(owner))
    done = subprocess.run(
        [sys.executable, "-c", _READ, str(file)],
        env={**os.environ, "DWDP_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    read, is_field = done.stdout.splitlines()[-2:]
    assert read == "dwdp {'dwdp_size': 2, 'fetch_mode': 'staged'} builtins None"
    assert is_field == "False"


def field(default: Any, *, description: str, status: str) -> Any:
    return Field(default=default, description=description, json_schema_extra={"status": status})


def patched(model: type[BaseModel], monkeypatch: pytest.MonkeyPatch) -> Any:
    """``model`` in the place of TensorRT-LLM's class."""
    monkeypatch.setattr(arguments.log, "info", lambda message: None)
    arguments.patch(SimpleNamespace(TorchLlmArgs=model, Field=field))
    return model


def test_a_version_without_a_config_of_its_own_gets_the_fields(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Older(BaseModel, extra="forbid"):
        env_overrides: dict[str, str] | None = None
        enable_sleep: bool = False

    cls = patched(Older, monkeypatch)
    asks = asked(dwdp_size=2)
    assert cls().parallel is None
    assert cls(**asks).dwdp_config == {"dwdp_size": 2}
    assert cls.model_validate(asks).parallel == "dwdp"
    assert cls(**asks, env_overrides={"A": "1"}).env_overrides == {"A": "1"}
    assert arguments.config_of(cls(**asks)) == DwdpConfig(dwdp_size=2)
    for settings, text in (
        ({"dwdp_config": {"dwdp_size": 2}}, 'it needs parallel="dwdp"'),
        ({**asks, "enable_sleep": True}, "enable_sleep=True"),
        ({**asks, "other": 1}, "other"),
    ):
        with pytest.raises(ValueError, match=text):
            cls(**settings)

    class Derived(cls):
        more: int = 0

    assert Derived(more=1, **asks).parallel == "dwdp"
    with pytest.raises(ValueError, match="enable_sleep=True"):
        Derived.model_validate({**asks, "enable_sleep": True})


def test_a_version_with_a_config_of_its_own_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class OwnConfig(BaseModel):
        dwdp_size: int = 1

    class Newer(BaseModel, extra="forbid"):
        dwdp_config: OwnConfig | None = None
        env_overrides: dict[str, str] | None = None

    cls = patched(Newer, monkeypatch)
    assert cls(dwdp_config={"dwdp_size": 3}).dwdp_config == OwnConfig(dwdp_size=3)
    ours = cls(parallel="dwdp", dwdp_config=OwnConfig(dwdp_size=2))
    assert ours.dwdp_config is None
    assert json.loads(ours.env_overrides["DWDP_CONFIG"])["dwdp_size"] == 2
    assert arguments.config_of(ours) == DwdpConfig(dwdp_size=2)
