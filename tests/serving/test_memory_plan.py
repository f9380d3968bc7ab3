"""Memory: the plan's arithmetic, and that it equals what the runtime takes."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from ranks import run_ranks

from dwdp.cli.main import describe_error
from dwdp.config import DwdpConfig
from dwdp.fabric import create_fabric
from dwdp.fabric.cuda_devices import CudaDeviceInfo
from dwdp.group import Group
from dwdp.memory_plan import (
    ExpertTensorSize,
    MemoryPlan,
    NotEnoughMemoryError,
    check_group_memory,
    describe_rejoin_shortage,
    group_memory_pools,
    plan_memory,
)
from dwdp.runtime import DwdpRuntime
from dwdp.serving.plan import check_memory
from dwdp.system_memory import MemoryPool
from dwdp.weights import ExpertTensorSpec, LayerSpec

PAGE = 4096
# Layers that differ, and a layer with two tensors of one size: they share no buffer.
LAYERS = [
    [ExpertTensorSize(6, 3 * PAGE), ExpertTensorSize(6, 3 * PAGE), ExpertTensorSize(6, 8)],
    [ExpertTensorSize(6, 5000)],
    [ExpertTensorSize(6, 3 * PAGE)],
    [ExpertTensorSize(6, 3 * PAGE), ExpertTensorSize(6, 5000)],
    [ExpertTensorSize(6, 2 * PAGE)],
]


def test_two_ranks_by_hand() -> None:
    plan = plan_memory(
        [[ExpertTensorSize(4, PAGE)]] * 4,
        DwdpConfig(dwdp_size=2),
        dense_bytes=100,
        staged=True,
        granularity=PAGE,
    )
    assert plan == MemoryPlan((100, 100), (8 * PAGE, 8 * PAGE), (4 * PAGE, 4 * PAGE))
    assert sum(plan.parts([0, 1]).values()) == 200 + 24 * PAGE
    assert plan.parts([1])["dense weights"] == 100


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("mode", ["staged", "demand", "direct"])
@pytest.mark.parametrize("num_slots", [2, 3])
@pytest.mark.parametrize("share", [None, 4])
def test_the_plan_is_what_the_runtime_takes(
    size: int, mode: str, num_slots: int, share: int | None
) -> None:
    if share is not None and size == 1:
        share = 6
    config = DwdpConfig.model_validate(
        {
            "dwdp_size": size,
            "fetch_mode": mode,
            "num_slots": num_slots,
            "num_experts_per_worker": share,
        }
    )
    granularity = create_fabric("host").granularity
    plan = plan_memory(
        LAYERS, config, dense_bytes=7, staged=mode != "direct", granularity=granularity
    )

    def taken(group: Group) -> tuple[int, int]:
        specs = [
            LayerSpec(
                f"layer {index}",
                tuple(
                    ExpertTensorSpec(
                        f"w{number}", size.num_experts, (size.expert_bytes,), torch.uint8
                    )
                    for number, size in enumerate(layer)
                ),
            )
            for index, layer in enumerate(LAYERS)
        ]
        with DwdpRuntime(group, config) as runtime:
            runtime.allocate(specs)
            runtime.attach()
            stats = runtime.stats()
            group.barrier("measured")
        return stats.resident_expert_bytes, stats.staging_bytes

    assert run_ranks(size, taken) == list(
        zip(plan.resident_expert_bytes, plan.staging_bytes, strict=True)
    )


GIB = 1 << 30
PLAN = MemoryPlan(
    (GIB, GIB),
    (3 * GIB, 2 * GIB),
    (GIB, GIB),
    kv_cache_bytes=GIB // 2,
    reducible=("num_experts_per_worker", "num_slots", "kv_cache_tokens"),
)


def shared_pool(available_bytes: int) -> dict[int, list[MemoryPool]]:
    """Both ranks of ``PLAN`` draw on one pool."""
    return {rank: [MemoryPool("one", "here", available_bytes)] for rank in range(2)}


def test_too_much_is_refused_with_the_sum() -> None:
    check_group_memory(shared_pool(10 * GIB), PLAN)
    with pytest.raises(NotEnoughMemoryError) as refusal:
        check_group_memory(shared_pool(10 * GIB - 1), PLAN)
    assert str(refusal.value) == (
        "2 rank(s) need 10.00 GiB: 2.00 GiB of dense weights, 5.00 GiB of resident experts, 2.00 GiB of "
        "staging slots and 1.00 GiB of key-value cache; 10.00 GiB are available here. Lower "
        'num_experts_per_worker, num_slots or kv_cache_tokens, set fetch_mode to "direct", use fewer '
        "ranks, load in a smaller dtype, or free memory"
    )


def advice(plan: MemoryPlan, pools: dict[int, list[MemoryPool]]) -> str:
    """What the refusal of ``plan`` offers to do, behind the sums."""
    with pytest.raises(NotEnoughMemoryError) as refusal:
        check_group_memory(pools, plan)
    return re.sub(r".* are available here\. ", "", str(refusal.value))


def test_the_advice_is_about_what_is_needed() -> None:
    direct = "se fewer ranks, load in a smaller dtype, or free memory"
    plan = MemoryPlan((0, 0), (GIB, GIB), (0, 0))
    assert advice(plan, shared_pool(GIB)) == f"U{direct}"
    plan = replace(plan, reducible=("num_experts_per_worker",))
    assert advice(plan, shared_pool(GIB)) == f"Lower num_experts_per_worker, u{direct}"
    # Who is alone with a pool would gain nothing from fewer ranks.
    alone = {1: [MemoryPool("one", "here", 0)]}
    assert advice(MemoryPlan((0, 0), (GIB, GIB), (GIB, GIB)), alone) == (
        'Set fetch_mode to "direct", load in a smaller dtype, or free memory'
    )


@pytest.mark.parametrize(
    ("options", "num_layers", "reducible"),
    [
        ({}, 4, ()),
        ({"num_slots": 3}, 4, ("num_slots",)),
        ({"num_slots": 3}, 5, ()),  # an odd number of layers takes a third slot in any case
        ({"num_slots": 9}, 2, ()),  # there are no more slots than layers
        ({"num_slots": 3, "fetch_mode": "demand"}, 4, ()),
        ({"num_slots": 3, "fetch_mode": "direct"}, 4, ()),
        ({"num_experts_per_worker": 4}, 4, ("num_experts_per_worker",)),
        ({"num_experts_per_worker": 3}, 4, ()),
        ({"num_experts_per_worker": 3, "num_prefetch_experts": 2}, 4, ("num_experts_per_worker",)),
        ({"num_experts_per_worker": 2, "num_prefetch_experts": 2}, 4, ()),
    ],
)
def test_only_what_can_be_lowered_is_offered(
    options: dict[str, object], num_layers: int, reducible: tuple[str, ...]
) -> None:
    config = DwdpConfig.model_validate({"dwdp_size": 3, "fetch_mode": "staged", **options})
    num_experts = 6 if config.num_prefetch_experts else 7
    plan = plan_memory(
        [[ExpertTensorSize(num_experts, PAGE)]] * num_layers,
        config,
        dense_bytes=0,
        staged=config.fetch_mode != "direct",
        granularity=PAGE,
    )
    assert plan.reducible == reducible


def test_a_rank_that_is_started_again_needs_its_share_once_more() -> None:
    """Survivors keep the dead one's experts mapped; the largest share has to fit in besides."""
    assert describe_rejoin_shortage(shared_pool(13 * GIB), PLAN) is None
    shortage = describe_rejoin_shortage(shared_pool(13 * GIB - 1), PLAN)
    assert shortage is not None
    assert "started again needs 3.00 GiB" in shortage and "3.00 GiB will be left here" in shortage
    # Nobody maps anything of a rank that is alone.
    alone = MemoryPlan((GIB,), (GIB,), (0,))
    assert describe_rejoin_shortage({0: [MemoryPool("one", "here", 2 * GIB)]}, alone) is None


def test_ranks_that_share_a_gpu_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = tuple(
        CudaDeviceInfo(
            ordinal, "a GPU", f"uuid-{ordinal}", 8 * GIB, (9, 0), 1, 1, True, True, False
        )
        for ordinal in range(2)
    )
    monkeypatch.setattr("dwdp.serving.plan.list_devices", lambda: gpus)
    plan = MemoryPlan((GIB,) * 3, (3 * GIB,) * 3, (0,) * 3)
    check_memory(plan, "cuda")
    with pytest.raises(
        NotEnoughMemoryError, match=r"2 rank\(s\) need 9.00 GiB: .* available on GPU 0 \(a GPU\)"
    ):
        check_memory(replace(plan, kv_cache_bytes=GIB // 2), "cuda")
    monkeypatch.setattr("dwdp.serving.plan.list_devices", tuple)
    with pytest.raises(ValueError, match="--device cuda: there is no GPU"):
        check_memory(plan, "cuda")


SPECS = [
    LayerSpec(f"layer {index}", (ExpertTensorSpec("w", 4, (PAGE,), torch.uint8),))
    for index in range(4)
]


def pools_by_rank(
    monkeypatch: pytest.MonkeyPatch, pools: Callable[[int], list[MemoryPool]]
) -> None:
    """Ranks are threads here: each is given its own view of the machine by the name of its thread."""
    monkeypatch.setattr(
        "dwdp.memory_plan.memory_pools", lambda: pools(int(threading.current_thread().name))
    )


def num_open_regions() -> int:
    """Memory regions that this process holds a descriptor of."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        # Another rank's thread may close one of its own in between.
        with contextlib.suppress(FileNotFoundError):
            count += "memfd:dwdp-region" in os.readlink(f"/proc/self/fd/{name}")
    return count


def allocate(mode: str) -> Callable[[Group], str]:
    """What the runtime's refusal says, or "" if there is none. Checks that a refusal takes no memory."""

    def body(group: Group) -> str:
        threading.current_thread().name = str(group.rank)
        before = num_open_regions()
        group.barrier("counted")
        config = DwdpConfig.model_validate({"dwdp_size": group.size, "fetch_mode": mode})
        with DwdpRuntime(group, config) as runtime:
            try:
                runtime.allocate(SPECS)
            except NotEnoughMemoryError as error:
                group.barrier("refused")
                assert runtime.stats().resident_expert_bytes == 0
                assert num_open_regions() == before
                return str(error)
            assert num_open_regions() > before
            group.barrier("allocated")
        return ""

    return body


@pytest.mark.parametrize(
    ("mode", "needed"), [("direct", 2 * 8 * PAGE), ("staged", 2 * 8 * PAGE + 2 * 4 * PAGE)]
)
def test_the_runtime_compares_what_the_whole_group_needs(
    monkeypatch: pytest.MonkeyPatch, mode: str, needed: int
) -> None:
    pools_by_rank(monkeypatch, lambda rank: [MemoryPool("machine", "on this machine", needed)])
    assert run_ranks(2, allocate(mode)) == ["", ""]
    # One rank sees less than the others, and all of them refuse.
    pools_by_rank(
        monkeypatch, lambda rank: [MemoryPool("machine", "on this machine", needed - rank)]
    )
    messages = run_ranks(2, allocate(mode))
    assert len(set(messages)) == 1
    assert messages[0].startswith("2 rank(s) need 0.00 GiB: 0.00 GiB of resident experts")
    assert "0.00 GiB are available on this machine. " in messages[0]


def test_ranks_in_groups_of_their_own_are_compared_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = MemoryPool("machine", "on this machine", 1 << 30)
    pools_by_rank(
        monkeypatch, lambda rank: [machine, MemoryPool(f"8:{rank}", "in its group", 8 * PAGE)]
    )
    assert run_ranks(2, allocate("direct")) == ["", ""]
    pools_by_rank(
        monkeypatch,
        lambda rank: [machine, MemoryPool(f"8:{rank}", f"in group {rank}", 8 * PAGE - rank)],
    )
    messages = run_ranks(2, allocate("direct"))
    assert messages[0] == messages[1] and messages[0].startswith("1 rank(s) need")
    assert "are available in group 1" in messages[0]


def test_a_rank_that_rejoins_is_compared_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = MemoryPlan((0, 0), (8 * PAGE, 4 * PAGE), (0, 0))

    def rejoin(available_bytes: int) -> None:
        monkeypatch.setattr(
            "dwdp.memory_plan.memory_pools",
            lambda: [MemoryPool("machine", "on this machine", available_bytes)],
        )
        group = Group.single()
        group.rank, group.incarnation = 1, 1
        check_group_memory(group_memory_pools(group), plan)

    rejoin(4 * PAGE)
    with pytest.raises(NotEnoughMemoryError, match=r"1 rank\(s\) need"):
        rejoin(4 * PAGE - 1)


def test_more_than_the_machine_has_is_bad_input_and_a_lack_of_memory() -> None:
    huge = LayerSpec("huge", (ExpertTensorSpec("w", 4, (1 << 50,), torch.uint8),))
    with DwdpRuntime(Group.single(), DwdpConfig()) as runtime:
        with pytest.raises(NotEnoughMemoryError) as refusal:
            runtime.allocate([huge])
    assert isinstance(refusal.value, ValueError) and isinstance(refusal.value, MemoryError)
    assert describe_error(refusal.value) == (str(refusal.value), 2)
