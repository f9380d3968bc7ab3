"""Settings of TensorRT-LLM that do not go together with ``parallel="dwdp"``, and why."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dwdp.engines.tensorrt_llm.launch import INSTANCE_INDEX

_LAUNCHED_WORKERS = "TLLM_SPAWN_PROXY_PROCESS"
_EXPERT_LORA_MODULES = frozenset({"moe_h_to_4h", "moe_4h_to_h", "moe_gate"})


@dataclass(frozen=True)
class Conflict:
    """A setting that is refused.

    Attributes:
        name: dotted path from the arguments of ``LLM``.
        refuses: whether a value is in the way; not called with None.
        reason: why, and what to do instead.
    """

    name: str
    refuses: Callable[[Any], bool]
    reason: str


def _is_parallel(size: Any) -> bool:
    """What is no number is TensorRT-LLM's to refuse, which names the setting."""
    try:
        return int(size) > 1
    except (TypeError, ValueError):
        return False


def _is_expert_lora(config: Any) -> bool:
    modules = value_of(config, "lora_target_modules") or ()
    return not modules or not _EXPERT_LORA_MODULES.isdisjoint(modules)


_WHOLE_MODEL = "every rank computes the whole model on one GPU; leave it at 1"
_SLEEP = "a sleeping rank would take away memory that its peers read"
_RAY = "ranks are processes that MPI or dwdp starts; leave Ray out"

CONFLICTS = (
    Conflict("backend", lambda name: name != "pytorch", "only the PyTorch backend can be extended"),
    Conflict("tensor_parallel_size", _is_parallel, _WHOLE_MODEL),
    Conflict("pipeline_parallel_size", _is_parallel, _WHOLE_MODEL),
    Conflict("context_parallel_size", _is_parallel, _WHOLE_MODEL),
    Conflict("moe_tensor_parallel_size", _is_parallel, _WHOLE_MODEL),
    Conflict(
        "moe_expert_parallel_size",
        _is_parallel,
        "experts are shared out by dwdp_config.dwdp_size; leave it at 1",
    ),
    Conflict("moe_cluster_parallel_size", _is_parallel, _WHOLE_MODEL),
    Conflict(
        "enable_attention_dp",
        bool,
        "every rank is a data-parallel replica by itself, with requests of its own; leave it out",
    ),
    Conflict("enable_lm_head_tp_in_adp", bool, "it needs attention data parallelism; leave it out"),
    Conflict(
        "moe_config.load_balancer",
        lambda _: True,
        "EPLB moves experts between ranks, and here every rank computes with all of them; leave it out",
    ),
    Conflict(
        "moe_config.backend",
        lambda name: str(name).upper() == "WIDEEP",
        "it needs expert parallelism over several GPUs; use CUTLASS, TRTLLM, CUTEDSL or DEEPGEMM",
    ),
    Conflict(
        "lora_config",
        _is_expert_lora,
        "adapters of experts are not supported; name lora_target_modules outside the experts (not "
        f"{', '.join(sorted(_EXPERT_LORA_MODULES))})",
    ),
    Conflict("enable_sleep", bool, _SLEEP),
    Conflict("sleep_config", lambda _: True, _SLEEP),
    Conflict("orchestrator_type", lambda name: name == "ray", _RAY),
    Conflict("ray_worker_extension_cls", lambda _: True, _RAY),
    Conflict("ray_placement_config", lambda _: True, _RAY),
    Conflict(
        "torch_compile_config.enable_piecewise_cuda_graph",
        bool,
        "a piece that is replayed would not wait for its experts; set it to false",
    ),
    Conflict(
        "torch_compile_config.max_num_streams",
        _is_parallel,
        "layers that run on several streams at once have no order to fetch in; leave it at 1",
    ),
    Conflict(
        "enable_min_latency",
        bool,
        "that mode computes its experts by a path of its own, which waits for no fetch; leave it out",
    ),
    Conflict("mm_encoder_only", bool, "an encoder alone has no experts to share out"),
    Conflict(
        "load_format",
        lambda value: str(getattr(value, "name", value)).upper() != "AUTO",
        "a rank reads its own experts from the checkpoint, and nothing that is made up; leave it at auto",
    ),
)


def refuse_conflicts(settings: Any, environ: Mapping[str, str] = os.environ) -> None:
    """Refuse what does not go together with ``parallel="dwdp"``, all of it at once.

    Args:
        settings: arguments of ``LLM`` as a mapping, or the validated object. Nested settings may be either.

    Raises:
        ValueError: the text names every setting that is in the way, its value, and what to do.
    """
    found = []
    for conflict in CONFLICTS:
        value = value_of(settings, conflict.name)
        if value is not None and conflict.refuses(value):
            found.append(f"{conflict.name}={_shown(value)}: {conflict.reason}")
    if value_of(settings, "enable_lora") and value_of(settings, "lora_config") is None:
        found.append("enable_lora=True: give lora_config with lora_target_modules instead")
    if environ.get("TLLM_DISABLE_MPI") == "1":
        found.append(f"TLLM_DISABLE_MPI=1: {_RAY}")
    # disaggregated_mpi_worker gives every server one such worker of its own, which is a rank.
    if environ.get(_LAUNCHED_WORKERS) == "1" and INSTANCE_INDEX not in environ:
        found.append(
            f"{_LAUNCHED_WORKERS}=1: trtllm-llmapi-launch runs one model on all processes of its launcher, "
            "and every rank is a model by itself; start it without trtllm-llmapi-launch"
        )
    if found:
        raise ValueError('parallel="dwdp" does not go together with ' + "; ".join(found))


def value_of(settings: Any, path: str) -> Any:
    """What ``settings`` have at a dotted path, through mappings and objects; None where there is nothing."""
    for name in path.split("."):
        if settings is None:
            return None
        settings = (
            settings.get(name) if isinstance(settings, Mapping) else getattr(settings, name, None)
        )
    return settings


def _shown(value: Any) -> str:
    if isinstance(value, str | int | float | bool):
        return repr(value)
    return str(getattr(value, "name", type(value).__name__))
