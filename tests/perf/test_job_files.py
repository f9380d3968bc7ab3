"""Files of a Slurm job: which server gets which GPUs, and what the check of the files finds."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dwdp.perf.gpu_placement import Servers, num_nodes, place_servers
from dwdp.perf.hardware import DATA_DIR
from dwdp.perf.job_check import check_job, check_llm_args, num_ranks
from dwdp.perf.job_files import Cluster, Job, write_job
from dwdp.perf.server_options import ServerSettings

SETTINGS = ServerSettings(max_seq_len=9216, mtp_layers=1)
DWDP = {"dwdp_size": 3, "num_groups": 2, "num_experts_per_worker": 86, "num_prefetch_experts": 85}


def job(generation_gpus: int = 8) -> Job:
    """Two DWDP groups of three ranks, and one generation server."""
    return Job(
        "job",
        Servers(6, 1),
        Servers(1, generation_gpus),
        SETTINGS.context(4, 32768, 0.5, dwdp_config=DWDP),
        SETTINGS.generation(64, 0.75, generation_gpus, expert_slots=288),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_job(job(), Cluster(), tmp_path)
    return tmp_path


def edit(path: Path, change: Callable[[Any], None]) -> None:
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content))


@given(
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from([1, 2, 3, 4, 8, 16])), max_size=2),
    st.sampled_from([1, 2, 4, 8]),
)
def test_no_gpu_is_given_twice_and_no_server_is_spread_without_need(
    kinds: list[tuple[int, int]], gpus_per_node: int
) -> None:
    servers = [
        (role, Servers(*kind)) for role, kind in zip(("context", "generation"), kinds, strict=False)
    ]
    if any(size > gpus_per_node and size % gpus_per_node for _, size in kinds):
        with pytest.raises(ValueError, match="does not fill nodes"):
            place_servers(servers, gpus_per_node)  # type: ignore[arg-type]
        return
    places = place_servers(servers, gpus_per_node)  # type: ignore[arg-type]
    taken = [
        (node, gpu) for place in places for node, gpu in itertools.product(place.nodes, place.gpus)
    ]
    assert len(taken) == len(set(taken)) == sum(kind.num_gpus for _, kind in servers)
    assert all(0 <= gpu < gpus_per_node for _, gpu in taken)
    sizes = [kind.gpus_per_server for _, kind in servers for _ in range(kind.num_servers)]
    for place, size in zip(places, sizes, strict=True):
        assert len(place.nodes) == max(1, size // gpus_per_node)
    by_role = [{node for p in places if p.role == role for node in p.nodes} for role, _ in servers]
    assert len(by_role) < 2 or not by_role[0] & by_role[1]
    assert len({place.port for place in places}) == len(places)
    if places:
        assert {node for node, _ in taken} == set(range(num_nodes(places)))


def test_more_servers_than_ports_are_refused() -> None:
    with pytest.raises(ValueError, match="30000 servers"):
        place_servers([("context", Servers(30_000, 1))], 4)


def test_generated_files_pass_the_check(folder: Path) -> None:
    assert check_job(folder) == []


@pytest.mark.parametrize(("size", "groups"), [(3, 1), (5, 3), (6, 2), (4, 5)])
def test_so_do_groups_that_do_not_fill_nodes(size: int, groups: int, tmp_path: Path) -> None:
    config = {"dwdp_size": size, "num_groups": groups}
    context = SETTINGS.context(4, 32768, 0.5, dwdp_config=config)
    write_job(
        replace(job(), context=Servers(size * groups, 1), context_options=context),
        Cluster(container_image="image", container_mounts=("/a:/a",), setup_command="true"),
        tmp_path,
    )
    assert check_job(tmp_path) == []


def test_expert_parallel_context_servers_pass_too(tmp_path: Path) -> None:
    options = SETTINGS.context(4, 32768, 0.5, expert_parallel_size=4)
    assert num_ranks(options) == 4 and options["enable_attention_dp"] is True
    write_job(replace(job(), context=Servers(5, 4), context_options=options), Cluster(), tmp_path)
    assert check_job(tmp_path) == []
    assert "DWDP" not in (tmp_path / "job.slurm").read_text()


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("context.yaml", lambda c: c.update(max_tokens=1), "context.yaml: max_tokens: not an"),
        (
            "context.yaml",
            lambda c: c.update(max_batch_size="4"),
            "max_batch_size: '4' is not int",
        ),
        ("context.yaml", lambda c: c.update(print_iter_log=1), "print_iter_log: 1 is not bool"),
        ("context.yaml", lambda c: c.update(max_num_tokens=True), "max_num_tokens: True is not"),
        (
            "context.yaml",
            lambda c: c["kv_cache_config"].update(block_reuse=False),
            "kv_cache_config.block_reuse: not an option",
        ),
        (
            "context.yaml",
            lambda c: c["moe_config"].update(backend="FAST"),
            "moe_config.backend: 'FAST' is not one of",
        ),
        (
            "context.yaml",
            lambda c: c["dwdp_config"].update(slots=3),
            "dwdp_config.slots: Extra inputs",
        ),
        (
            "context.yaml",
            lambda c: c["dwdp_config"].update(dwdp_size=73),
            "dwdp_config.dwdp_size: Input should be",
        ),
        (
            "context.yaml",
            lambda c: c["dwdp_config"].update(num_groups=3),
            "num_instances: 6, but dwdp_size times num_groups is 9",
        ),
        ("context.yaml", lambda c: c.pop("parallel"), "parallel and dwdp_config: give both"),
        (
            "context.yaml",
            lambda c: c.update(enable_attention_dp=True),
            "enable_attention_dp: true, but a rank",
        ),
        (
            "context.yaml",
            lambda c: c.update(tensor_parallel_size=2),
            "tensor_parallel_size: 2, but a rank",
        ),
        (
            "generation.yaml",
            lambda c: c.update(parallel="dwdp"),
            "generation.yaml: parallel: not an option",
        ),
        (
            "generation.yaml",
            lambda c: c["moe_config"]["load_balancer"].update(slots=1),
            "moe_config.load_balancer.slots: not an option",
        ),
        (
            "generation.yaml",
            lambda c: c.update(pipeline_parallel_size=2),
            "generation server 0: 2 nodes times 4 GPUs for 16 ranks",
        ),
        ("disaggregated.yaml", lambda c: c.update(parallel="dwdp"), "parallel: not a key of the"),
        (
            "disaggregated.yaml",
            lambda c: c["context_servers"].update(num_instances=5),
            "num_instances: 5, and 6 urls",
        ),
        (
            "disaggregated.yaml",
            lambda c: c["context_servers"].update(router={"type": "random"}),
            "router.type: 'random' is not one of",
        ),
        (
            "disaggregated.yaml",
            lambda c: c["context_servers"]["urls"].__setitem__(0, "NODE_0:8000"),
            "urls: NODE_0:8000 occurs 2 times",
        ),
        (
            "disaggregated.yaml",
            lambda c: c["context_servers"]["urls"].__setitem__(0, "localhost:8001"),
            "urls: localhost:8001 is not NODE_i:port",
        ),
        (
            "disaggregated.yaml",
            lambda c: c["context_servers"]["urls"].reverse(),
            "context servers: started at",
        ),
        ("disaggregated.yaml", lambda c: c.pop("generation_servers"), "generation_servers: miss"),
    ],
)
def test_a_wrong_value_is_named(
    name: str, change: Callable[[Any], None], expected: str, folder: Path
) -> None:
    edit(folder / name, change)
    problems = check_job(folder)
    assert any(expected in problem for problem in problems), problems
    assert all("\n" not in problem for problem in problems)


@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        ("job.slurm", "context 1 0 1 ", "context 1 0 0 ", "node 0, GPU 0: given to 2 servers"),
        ("job.slurm", "context 1 0 1 ", "context 1 0 4 ", "context server 1: GPU 4 of 4"),
        ("job.slurm", "generation 0 2,3 ", "generation 0 2,4 ", "generation server 0: node 4 of 4"),
        ("job.slurm", "--nodes=4", "--nodes=5", "nodes: 5 are asked for, and servers are on 4"),
        ("job.slurm", "start_worker context 5", "#", "context servers: started at"),
        ("job.slurm", "#SBATCH --nodes=4", "", "#SBATCH --nodes: missing"),
        ("job.slurm", "disaggregated -c", "disaggregated --configs", "--configs: not an option"),
        ("job.slurm", "/start_worker.sh", "/start_workers.sh", "start_workers.sh: not there"),
        ("job.slurm", "\n  done\n", "\n", "job.slurm: "),
        ("start_worker.sh", "--host ", "--hosts ", "--hosts: not an option of trtllm-serve"),
        ("start_worker.sh", "--dwdp_size", "--dwdp-size", "--dwdp-size: not an option that dwdp"),
        ("start_worker.sh", "if [ ", "if ( ", "start_worker.sh: "),
    ],
)
def test_a_wrong_script_is_named(
    name: str, old: str, new: str, expected: str, folder: Path
) -> None:
    path = folder / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    problems = check_job(folder)
    assert any(expected in problem for problem in problems), problems


def test_a_missing_file_and_broken_yaml_are_named(folder: Path) -> None:
    (folder / "context.yaml").unlink()
    (folder / "generation.yaml").write_text("a: [")
    (folder / "disaggregated.yaml").write_text("[]")
    problems = check_job(folder)
    assert [problem.partition(":")[0] for problem in problems] == [
        "context.yaml",
        "generation.yaml",
        "disaggregated.yaml",
    ]


def test_recorded_options_say_where_they_come_from() -> None:
    for path in (DATA_DIR / "tensorrt_llm").glob("*.json"):
        recorded = json.loads(path.read_text())
        assert recorded["version"] == path.stem and recorded["source"]
        kinds = [*recorded["llm_args"].values()]
        for fields in recorded["sections"].values():
            kinds += fields.values()
        pattern = r"(int|number|bool|str|list|mapping|any|one of: .+?)( or null)?"
        assert all(re.fullmatch(pattern, kind) for kind in kinds)


@pytest.mark.parametrize(
    ("options", "is_good"),
    [
        ({"max_batch_size": None}, True),
        ({"print_iter_log": None}, False),
        ({"cuda_graph_config": None}, True),
        ({"batch_wait_timeout_ms": 3}, True),
        ({"kv_cache_config": []}, False),
        ({"guided_decoding_backend": None}, True),
        ({"model_kwargs": {"a": 1}}, True),
    ],
)
def test_types_and_null(options: dict[str, Any], is_good: bool) -> None:
    assert (not list(check_llm_args(options))) == is_good
