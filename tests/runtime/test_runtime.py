"""DwdpRuntime over the host fabric: every rank sees every expert, exactly, in every mode."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import assert_same_bytes, layers_of, load, reference, run_ranks

from dwdp.config import DwdpConfig
from dwdp.fabric.host import HostFabric
from dwdp.group import Group
from dwdp.rendezvous import GroupError, PeerFailure
from dwdp.runtime import DwdpRuntime, RuntimeStats
from dwdp.weights import ExpertTensorSpec, LayerSpec

DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn)


def run_forwards(
    group: Group, config: DwdpConfig, layers: list[LayerSpec], num_forwards: int = 3
) -> RuntimeStats:
    full = reference(layers)
    with DwdpRuntime(group, config) as runtime:
        load(runtime.allocate(layers), group.rank, full)
        runtime.attach()
        for _ in range(num_forwards):
            for index in range(len(layers)):
                runtime.begin(index)
                for name, tensor in runtime.tensors(index).items():
                    assert_same_bytes(tensor, full[index][name])
                runtime.end(index)
        return runtime.stats()


@settings(max_examples=40)
@given(st.data())
def test_every_rank_sees_every_expert(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 5), label="ranks")
    num_experts = data.draw(st.integers(size, 17), label="experts")
    tensors = tuple(
        ExpertTensorSpec(
            f"t{k}",
            num_experts,
            data.draw(st.sampled_from([(1,), (3,), (40, 20), (64, 64), (33, 77)])),
            data.draw(st.sampled_from(DTYPES)),
        )
        for k in range(data.draw(st.integers(1, 4), label="tensors"))
    )
    num_layers = data.draw(st.integers(1, 5), label="layers")
    layers = [LayerSpec(f"layers.{index}", tensors) for index in range(num_layers)]
    even_share = -(-num_experts // size)
    config = DwdpConfig(
        dwdp_size=size,
        fetch_mode=data.draw(st.sampled_from(["staged", "direct"]), label="mode"),
        num_slots=data.draw(st.integers(2, 4), label="slots"),
        slice_bytes=data.draw(st.sampled_from([4096, 5000, 1 << 20]), label="slice"),
        num_lanes=data.draw(st.none() | st.integers(1, 3), label="lanes"),
        lane_depth=data.draw(st.integers(1, 2), label="depth"),
        contention_opt=data.draw(st.booleans(), label="contention_opt"),
        num_experts_per_worker=data.draw(
            st.none() | st.integers(even_share, num_experts), label="share"
        ),
    )
    run_ranks(size, lambda group: run_forwards(group, config, layers))


def test_layers_may_differ_in_shape_and_count() -> None:
    layers = [
        *layers_of((64, 32), (32, 64), num_layers=2, num_experts=6),
        *layers_of((100, 32), (32, 50), num_layers=1, num_experts=9),
        *layers_of((64, 32), num_layers=2, num_experts=6),
    ]
    for mode in ("staged", "direct"):
        config = DwdpConfig(dwdp_size=3, fetch_mode=mode)
        run_ranks(3, lambda group, config=config: run_forwards(group, config, layers))


def test_memory_is_the_share_and_the_slots() -> None:
    layers = layers_of((64, 64), num_layers=6, num_experts=8)
    expert_bytes = 64 * 64 * 4
    for mode, slots in (("direct", 0), ("staged", 2)):
        config = DwdpConfig(dwdp_size=4, fetch_mode=mode)
        for stats in run_ranks(4, lambda group, c=config: run_forwards(group, c, layers)):
            assert stats.resident_expert_bytes == 6 * 2 * expert_bytes
            assert stats.staging_bytes == slots * 6 * expert_bytes
            assert stats.num_slots == slots
            assert stats.fetch_mode == mode


def test_a_fetch_moves_the_remote_experts_and_no_more() -> None:
    layers = layers_of((64, 64), num_layers=4, num_experts=8)
    config = DwdpConfig(dwdp_size=4, fetch_mode="staged")
    for stats in run_ranks(4, lambda group: run_forwards(group, config, layers, num_forwards=5)):
        assert stats.num_fetches == 2 + 5 * 4
        assert stats.fetched_bytes == stats.num_fetches * 6 * 64 * 64 * 4


class DeviceLikeFabric(HostFabric):
    """Host memory under another name, so that mode auto stages and fetches on demand, as on a GPU."""

    name = "device-like"


@settings(max_examples=30)
@given(st.data())
def test_steps_on_demand_see_the_activated_experts(data: st.DataObject) -> None:
    """Steps of many and few tokens in any order, alone and mixed with staged ones."""
    size = data.draw(st.integers(2, 4), label="ranks")
    num_experts = data.draw(st.integers(size, 13), label="experts")
    top_k = data.draw(st.integers(1, min(3, num_experts)), label="top_k")
    shapes = data.draw(st.sampled_from([[(64, 64)], [(33, 77), (5,)], [(40, 20), (40, 20)]]))
    layers = layers_of(
        *shapes, num_layers=data.draw(st.integers(1, 5), label="layers"), num_experts=num_experts
    )
    config = DwdpConfig(
        dwdp_size=size,
        fetch_mode=data.draw(st.sampled_from(["demand", "auto"]), label="mode"),
        demand_max_tokens=data.draw(st.integers(0, 6), label="threshold"),
        num_slots=data.draw(st.integers(2, 3), label="slots"),
    )
    steps = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=6), label="tokens")
    index_dtype = data.draw(st.sampled_from([torch.int32, torch.int64]), label="index dtype")
    full = reference(layers)

    def body(group: Group) -> None:
        choices = torch.Generator().manual_seed(group.rank)
        with DwdpRuntime(group, config, DeviceLikeFabric()) as runtime:
            load(runtime.allocate(layers), group.rank, full)
            runtime.attach()
            for num_tokens in steps:
                for index in range(len(layers)):
                    scores = torch.rand(num_tokens, num_experts, generator=choices)
                    chosen = scores.topk(top_k).indices.to(index_dtype)
                    runtime.begin(index, chosen)
                    for name, tensor in runtime.tensors(index).items():
                        activated = chosen.unique().long()
                        assert_same_bytes(tensor[activated], full[index][name][activated])
                    runtime.end(index)
            stats = runtime.stats()
            on_demand = sum(
                config.fetch_mode == "demand" or tokens <= config.demand_max_tokens
                for tokens in steps
            )
            assert stats.num_demands <= on_demand * len(layers)
            assert (stats.num_demands > 0) <= (on_demand > 0)

    run_ranks(size, body)


def test_demand_moves_the_activated_remote_experts_and_no_more() -> None:
    layers = layers_of((64, 64), num_layers=3, num_experts=8)
    expert_bytes = 64 * 64 * 4
    full = reference(layers)
    # Rank 0 of 2 holds experts 0 to 3. Ids that are no expert's are what engines pad with.
    chosen = torch.tensor([[0, 5], [5, 7], [8, -1]])

    def body(group: Group) -> RuntimeStats:
        with DwdpRuntime(group, DwdpConfig(dwdp_size=2, fetch_mode="demand")) as runtime:
            load(runtime.allocate(layers), group.rank, full)
            runtime.attach()
            for index in range(3):
                runtime.begin(index, chosen)
                runtime.end(index)
            return runtime.stats()

    first, second = run_ranks(2, body)
    assert (first.num_demands, first.num_fetches) == (3, 0)
    assert first.fetched_bytes == 3 * 2 * expert_bytes
    assert second.fetched_bytes == 3 * 1 * expert_bytes
    # One slot is enough: nothing is fetched ahead.
    assert first.staging_bytes == 4 * expert_bytes


def test_auto_reads_peers_directly_on_one_host() -> None:
    layers = layers_of((64, 64), num_layers=2, num_experts=4)
    stats = run_ranks(2, lambda group: run_forwards(group, DwdpConfig(dwdp_size=2), layers))
    assert [s.fetch_mode for s in stats] == ["direct", "direct"]


def test_different_models_are_refused() -> None:
    def body(group: Group) -> None:
        layers = layers_of((64, 64 + group.rank), num_layers=1, num_experts=4)
        run_forwards(group, DwdpConfig(dwdp_size=2), layers)

    with pytest.raises((GroupError, PeerFailure), match="different expert tensors"):
        run_ranks(2, body)


def test_the_group_must_have_the_configured_size() -> None:
    with pytest.raises(ValueError, match="1 ranks were started but dwdp_size is 2"):
        DwdpRuntime(Group.single(), DwdpConfig(dwdp_size=2))


def test_more_ranks_than_experts_are_refused() -> None:
    layers = layers_of((8, 8), num_layers=1, num_experts=2)
    with pytest.raises((ValueError, PeerFailure), match="3 ranks"):
        run_ranks(3, lambda group: run_forwards(group, DwdpConfig(dwdp_size=3), layers))


def test_destination_is_for_resident_experts_only() -> None:
    def body(group: Group) -> None:
        with DwdpRuntime(group, DwdpConfig(dwdp_size=2)) as runtime:
            weights = runtime.allocate(layers_of((8, 8), num_layers=1, num_experts=4))
            with pytest.raises(KeyError, match="not stored on this rank"):
                weights.destination(0, "t0", 3 - 3 * group.rank)
            with pytest.raises(KeyError, match="not stored on this rank"):
                weights.destination(0, "nothing", 0)

    run_ranks(2, body)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def num_mappings() -> int:
    return len([row for row in Path("/proc/self/maps").read_text().splitlines() if "memfd:" in row])


def open_regions() -> int:
    """Regions of this process that are open, each as often as it has a descriptor."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # listdir's own
            count += "memfd:dwdp-region" in os.readlink(f"/proc/self/fd/{name}")
    return count


@pytest.mark.parametrize("mode", ["staged", "demand", "direct"])
def test_attached_ranks_hold_descriptors_of_what_they_serve_alone(mode: str) -> None:
    layers = layers_of((64, 30), (7,), num_layers=3, num_experts=7)
    config = DwdpConfig.model_validate({"dwdp_size": 3, "fetch_mode": mode})

    def body(group: Group) -> int:
        with DwdpRuntime(group, config) as runtime:
            weights = runtime.allocate(layers)
            load(weights, group.rank, reference(layers))
            runtime.attach()
            assert num_mappings() > 0
            group.barrier("attached everywhere")
            assert open_regions() == sum(group_sizes(group, weights.num_regions))
            group.barrier("counted")
        return weights.num_regions

    assert min(run_ranks(3, body)) > 1


def group_sizes(group: Group, number: int) -> list[int]:
    """``number`` of every rank."""
    return [int(raw) for raw in group.exchange("numbers", str(number).encode())]


class CountingFabric(HostFabric):
    """Counts the descriptors of regions that it has opened."""

    num_opened = 0

    def allocate(self, num_bytes: int) -> Any:
        self.num_opened += 1
        return super().allocate(num_bytes)

    def publish(self, name: str, regions: Sequence[Any]) -> None:
        self.num_opened += len(regions)
        super().publish(name, regions)

    def fetch_regions(self, *args: Any) -> Any:
        regions = super().fetch_regions(*args)
        self.num_opened += len(regions)
        return regions


@pytest.mark.parametrize(("mode", "num_slots"), [("staged", 3), ("demand", 2), ("direct", 2)])
def test_too_few_descriptors_are_noticed_before_memory_is_taken(mode: str, num_slots: int) -> None:
    layers = layers_of((64, 30), (64, 30), (7,), num_layers=4, num_experts=7)
    config = DwdpConfig.model_validate({"dwdp_size": 3, "fetch_mode": mode, "num_slots": num_slots})
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def body(group: Group) -> None:
        fabric = CountingFabric()
        with DwdpRuntime(group, config, fabric) as runtime:
            group.barrier("made")
            if group.rank == 0:
                resource.setrlimit(resource.RLIMIT_NOFILE, (open_descriptors() + 20, limits[1]))
            group.barrier("limited")
            with pytest.raises(ValueError, match=r"open files .* `ulimit -n") as refusal:
                runtime.allocate(layers)
            assert fabric.num_opened == 0
            group.barrier("refused")
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            group.barrier("unlimited")
            load(runtime.allocate(layers), group.rank, reference(layers))
            runtime.attach()
        counts = re.findall(r"(\d+) for (?!connections)", str(refusal.value))
        assert sum(map(int, counts)) == fabric.num_opened

    try:
        run_ranks(3, body)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("mode", ["staged", "direct"])
def test_nothing_is_left_after_detach(mode: str) -> None:
    layers = layers_of((64, 30), (7,), num_layers=3, num_experts=7)
    config = DwdpConfig(dwdp_size=3, fetch_mode=mode)
    run_ranks(3, lambda group: run_forwards(group, config, layers))
    gc.collect()
    descriptors, threads = open_descriptors(), len(os.listdir("/proc/self/task"))
    for _ in range(3):
        run_ranks(3, lambda group: run_forwards(group, config, layers))
    gc.collect()
    assert open_descriptors() == descriptors
    assert len(os.listdir("/proc/self/task")) == threads
    assert num_mappings() == 0


def test_detach_is_idempotent_and_keeps_the_counters() -> None:
    def body(group: Group) -> None:
        layers = layers_of((64, 64), num_layers=2, num_experts=4)
        runtime = DwdpRuntime(group, DwdpConfig(dwdp_size=2, fetch_mode="staged"))
        load(runtime.allocate(layers), group.rank, reference(layers))
        runtime.attach()
        runtime.begin(0)
        runtime.end(0)
        runtime.detach()
        stats = runtime.stats()
        runtime.detach()
        assert runtime.stats() == stats
        assert stats.num_fetches >= 2

    run_ranks(2, body)


def test_a_tensor_outlives_detach() -> None:
    layers = layers_of((64, 64), num_layers=1, num_experts=4)
    full = reference(layers)

    def body(group: Group) -> torch.Tensor:
        runtime = DwdpRuntime(group, DwdpConfig(dwdp_size=2, fetch_mode="direct"))
        load(runtime.allocate(layers), group.rank, full)
        runtime.attach()
        tensor = runtime.tensors(0)["t0"]
        runtime.detach()
        return tensor

    for tensor in run_ranks(2, body):
        assert_same_bytes(tensor, full[0]["t0"])
