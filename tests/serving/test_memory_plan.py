"""Memory: the plan's arithmetic, and that it equals what the runtime takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from dwdp import memory_plan
from dwdp.config import DwdpConfig
from dwdp.fabric import create_fabric
from dwdp.group import Group
from dwdp.memory_plan import ExpertTensorSize, MemoryPlan, available_memory_bytes, plan_memory
from dwdp.runtime import DwdpRuntime
from dwdp.serving.plan import check_memory
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
    assert plan.total_bytes == 200 + 24 * PAGE


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("mode", ["staged", "direct"])
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
        LAYERS, config, dense_bytes=7, staged=mode == "staged", granularity=granularity
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


def test_too_much_is_refused_with_the_sum() -> None:
    gib = 1 << 30
    plan = MemoryPlan((gib, gib), (3 * gib, 2 * gib), (gib, gib))
    check_memory(plan, 9 * gib)
    with pytest.raises(
        ValueError,
        match=r"2 rank\(s\) need 9.00 GiB: 2 x 1.00 GiB of dense weights, 5.00 GiB of resident "
        r"experts and 2.00 GiB of staging slots; 8.50 GiB are available",
    ):
        check_memory(plan, 8 * gib + gib // 2)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 1000),
        ({"memory.max": "max", "memory.current": "10", "memory.stat": ""}, 1000),
        (
            {
                "memory.max": "500",
                "memory.current": "450",
                "memory.stat": "anon 1\nactive_file 20\ninactive_file 30\nshmem 7\n",
            },
            100,
        ),
        (
            {
                "memory/memory.limit_in_bytes": "300",
                "memory/memory.usage_in_bytes": "400",
                "memory/memory.stat": "active_file 1\ntotal_active_file 20\n",
            },
            0,
        ),
    ],
    ids=["no groups", "no limit", "version 2", "version 1"],
)
def test_the_control_group_limits_what_is_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory_plan, "_CGROUP", tmp_path)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    assert available_memory_bytes() == expected
