"""Checks the files of ``dwdp/perf/job_files.py`` where there is no Slurm, no GPU and no TensorRT-LLM.

Option names and types of TensorRT-LLM are recorded per version in ``dwdp/perf/data/tensorrt_llm``, each list
with the source file that it was read from.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from pydantic import ValidationError

from dwdp.config import DwdpConfig
from dwdp.perf.hardware import DATA_DIR
from dwdp.perf.job_files import CONTEXT, DISAGGREGATED, GENERATION, JOB

VERSION = "1.3.0rc3"
"""The version of TensorRT-LLM that files are checked against."""
SERVE_FLAGS = ("--parallel", "--dwdp_size")
"""Options that dwdp adds to ``trtllm-serve``."""
_DWDP_KEYS = {"parallel": "one of: dwdp", "dwdp_config": "mapping"}
_URL = re.compile(r"NODE_(\d+):(\d+)")
_START = re.compile(
    r"^start_worker (context|generation) (\d+) ([\d,]+) ([\d,]+) (\d+)$", re.MULTILINE
)
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "number": (int, float),
    "bool": (bool,),
    "str": (str,),
    "list": (list,),
    "mapping": (dict,),
}


@cache
def recorded_options() -> dict[str, Any]:
    """What :data:`VERSION` accepts: ``llm_args``, ``sections``, ``disaggregated``, flags of programs."""
    path = DATA_DIR / "tensorrt_llm" / f"{VERSION}.json"
    recorded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return recorded


def check_job(folder: Path) -> list[str]:
    """Everything wrong with the files in ``folder``, one line each that names the file and the key."""
    configs: dict[str, dict[str, Any]] = {}
    problems = []
    for name in (CONTEXT, GENERATION, DISAGGREGATED):
        try:
            content = yaml.safe_load((folder / name).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            problems.append(f"{name}: {' '.join(str(error).split())}")
            continue
        if not isinstance(content, dict):
            problems.append(f"{name}: not a mapping of keys to values")
            continue
        configs[name] = content
    if not problems:
        problems += [f"{CONTEXT}: {text}" for text in check_llm_args(configs[CONTEXT], dwdp=True)]
        problems += [f"{GENERATION}: {text}" for text in check_llm_args(configs[GENERATION])]
        problems += [f"{DISAGGREGATED}: {text}" for text in _check_front_end(configs)]
        if not problems:
            problems += [f"{JOB}: {text}" for text in _check_allocation(folder, configs)]
    for script in sorted([*folder.glob("*.sh"), *folder.glob("*.slurm")]):
        problems += [f"{script.name}: {text}" for text in check_script(script)]
    return problems


def check_llm_args(options: dict[str, Any], dwdp: bool = False) -> Iterator[str]:
    """Problems of one server's YAML. ``dwdp``: whether it may be a rank of a DWDP group."""
    recorded = recorded_options()
    known = recorded["llm_args"] | (_DWDP_KEYS if dwdp else {})
    yield from _check_keys(options, known, "")
    for name, fields in recorded["sections"].items():
        section = options.get(name)
        if isinstance(section, dict):
            yield from _check_keys(section, fields, f"{name}.")
    balancer = options.get("moe_config", {}).get("load_balancer")
    if isinstance(balancer, dict):
        fields = recorded["sections"]["load_balancer"]
        yield from _check_keys(balancer, fields, "moe_config.load_balancer.")
    if ("parallel" in options) != ("dwdp_config" in options):
        yield "parallel and dwdp_config: give both or neither"
    if isinstance(options.get("dwdp_config"), dict):
        yield from _check_dwdp(options)


def _check_dwdp(options: dict[str, Any]) -> Iterator[str]:
    try:
        DwdpConfig.model_validate(options["dwdp_config"])
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            key = ".".join(["dwdp_config", *map(str, problem["loc"])])
            yield f"{key}: {problem['msg']}"
    for name in ("tensor_parallel_size", "moe_expert_parallel_size"):
        if options.get(name, 1) != 1:
            yield f"{name}: {options[name]}, but a rank of a DWDP group is a replica of size 1"
    if options.get("enable_attention_dp"):
        yield "enable_attention_dp: true, but a rank of a DWDP group shares no attention"


def _check_keys(options: dict[str, Any], known: dict[str, str], prefix: str) -> Iterator[str]:
    for key, value in options.items():
        if key not in known:
            yield f"{prefix}{key}: not an option of TensorRT-LLM {VERSION}"
        elif not _is_of(value, known[key]):
            yield f"{prefix}{key}: {value!r} is not {known[key]}"


def _is_of(value: Any, kind: str) -> bool:
    base = kind.removesuffix(" or null")
    if value is None:
        return base != kind or kind == "any"
    if base.startswith("one of: "):
        return value in base.removeprefix("one of: ").split(", ")
    if base == "any":
        return True
    if isinstance(value, bool) and base != "bool":
        return False
    return isinstance(value, _TYPES[base])


def num_ranks(options: dict[str, Any]) -> int:
    """Tasks, and GPUs, of one server with these options."""
    ranks: int = (
        options.get("tensor_parallel_size", 1)
        * options.get("pipeline_parallel_size", 1)
        * options.get("context_parallel_size", 1)
    )
    return ranks


def _check_front_end(configs: dict[str, dict[str, Any]]) -> Iterator[str]:
    recorded, config = recorded_options()["disaggregated"], configs[DISAGGREGATED]
    # Other keys at the top would be handed to the servers of both kinds.
    for key in config.keys() - set(recorded["top"]):
        yield f"{key}: not a key of the front end"
    addresses = [f"{config.get('hostname')}:{config.get('port')}"]
    for kind in ("context_servers", "generation_servers"):
        servers = config.get(kind)
        if not isinstance(servers, dict):
            yield f"{kind}: missing"
            continue
        for key in servers.keys() - set(recorded["servers"]):
            yield f"{kind}.{key}: not a key of the front end's servers"
        yield from _check_keys(servers.get("router", {}), recorded["router"], f"{kind}.router.")
        urls = servers.get("urls", [])
        if len(urls) != servers.get("num_instances") or not urls:
            yield f"{kind}.num_instances: {servers.get('num_instances')}, and {len(urls)} urls"
        addresses += urls
    for address, count in Counter(addresses).items():
        if count > 1:
            yield f"urls: {address} occurs {count} times"
        if not _URL.fullmatch(address) or int(address.rpartition(":")[2]) > 65535:
            yield f"urls: {address} is not NODE_i:port"
    dwdp = configs[CONTEXT].get("dwdp_config")
    if dwdp and isinstance(config.get("context_servers"), dict):
        ranks = dwdp.get("dwdp_size", 1) * dwdp.get("num_groups", 1)
        servers = config["context_servers"].get("num_instances")
        if ranks != servers:
            yield (
                f"context_servers.num_instances: {servers}, but dwdp_size times num_groups is {ranks}"
            )


def _check_allocation(folder: Path, configs: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The servers that the batch script starts: as many as configured, each on GPUs of its own that exist."""
    text = (folder / JOB).read_text(encoding="utf-8") if (folder / JOB).is_file() else ""
    limits = {
        name: int(value)
        for name, value in re.findall(
            r"^#SBATCH --(nodes|gpus-per-node|ntasks-per-node)=(\d+)$", text, re.MULTILINE
        )
    }
    for name in ("nodes", "gpus-per-node", "ntasks-per-node"):
        if name not in limits:
            yield f"#SBATCH --{name}: missing"
            return
    used: Counter[tuple[int, int]] = Counter()
    urls: dict[str, list[str]] = {"context": [], "generation": []}
    for role, index, nodes_text, gpus_text, port in _START.findall(text):
        nodes = [int(node) for node in nodes_text.split(",")]
        gpus = [int(gpu) for gpu in gpus_text.split(",")]
        name = f"{role} server {index}"
        ranks = num_ranks(configs[CONTEXT if role == "context" else GENERATION])
        if len(nodes) * len(gpus) != ranks:
            yield f"{name}: {len(nodes)} nodes times {len(gpus)} GPUs for {ranks} ranks"
        if max(nodes) >= limits["nodes"]:
            yield f"{name}: node {max(nodes)} of {limits['nodes']}"
        if max(gpus) >= limits["gpus-per-node"]:
            yield f"{name}: GPU {max(gpus)} of {limits['gpus-per-node']}"
        if len(gpus) > limits["ntasks-per-node"]:
            yield f"{name}: {len(gpus)} tasks on a node of {limits['ntasks-per-node']}"
        if int(index) != len(urls[role]):
            yield f"{name}: comes as number {len(urls[role])}"
        urls[role].append(f"NODE_{nodes[0]}:{port}")
        used.update((node, gpu) for node in nodes for gpu in gpus)
    for (node, gpu), count in used.items():
        if count > 1:
            yield f"node {node}, GPU {gpu}: given to {count} servers"
    for role, started in urls.items():
        expected = configs[DISAGGREGATED][f"{role}_servers"]["urls"]
        if started != expected:
            yield f"{role} servers: started at {started}, but the front end looks for {expected}"
    if {node for node, _ in used} != set(range(limits["nodes"])):
        yield f"nodes: {limits['nodes']} are asked for, and servers are on {len({n for n, _ in used})}"


def check_script(path: Path) -> Iterator[str]:
    """Syntax of a shell script, flags of TensorRT-LLM's programs in it, and files that it reads beside it."""
    done = subprocess.run(
        ["bash", "-n", str(path)], capture_output=True, text=True, check=False, timeout=60
    )
    if done.returncode:
        yield " ".join(done.stderr.split())
    text = path.read_text(encoding="utf-8")
    recorded = recorded_options()
    programs = {
        r"trtllm-serve disaggregated\b": recorded["trtllm_serve"]["disaggregated"],
        r"trtllm-serve (?!disaggregated)": [*recorded["trtllm_serve"]["serve"], *SERVE_FLAGS],
        r"[.{]benchmark_serving\b": recorded["benchmark_serving"],
    }
    joined = text.replace("\\\n", " ")
    for program, flags in programs.items():
        for match in re.finditer(program + r"(.*)", joined):
            for flag in re.findall(r"(?<=\s)(-{1,2}[a-z][\w-]*)", match.group(1)):
                if flag not in flags:
                    yield f"{flag}: not an option of {match.group(0).split()[0]}"
    for name in re.findall(r"command\+=\((.*)\)", text):
        for flag in re.findall(r"(--[\w-]+)", name):
            if flag not in SERVE_FLAGS:
                yield f"{flag}: not an option that dwdp adds to trtllm-serve"
    for name in re.findall(r"\$here/(\w[\w.-]*)(?=[\"\s])", text):
        if name != "run" and not (path.parent / name).is_file():
            yield f"{name}: not there"
