"""Invariant 3: a forward asks nothing of the group and grows nothing."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from ranks import layers_of, load, reference, run_ranks

from dwdp.config import DwdpConfig
from dwdp.group import Group
from dwdp.runtime import DwdpRuntime

NUM_LAYERS = 4


def forward(runtime: DwdpRuntime, num_forwards: int) -> None:
    for _ in range(num_forwards):
        for layer in range(NUM_LAYERS):
            runtime.begin(layer)
            runtime.end(layer)


@pytest.mark.parametrize("mode", ["staged", "direct"])
def test_a_forward_grows_nothing_and_asks_no_one(mode: str) -> None:
    layers = layers_of((64, 64), num_layers=NUM_LAYERS, num_experts=6)
    full = reference(layers)
    config = DwdpConfig(dwdp_size=2, fetch_mode=mode)

    def attached(group: Group) -> tuple[Group, DwdpRuntime]:
        runtime = DwdpRuntime(group, config)
        load(runtime.allocate(layers), group.rank, full)
        runtime.attach()
        return group, runtime

    # Set-up is over, and with it the threads that watch the peers. Rank 1 does nothing at all.
    ranks = run_ranks(2, attached)
    stores = [group._store for group, _ in ranks]
    for group, _ in ranks:
        group._store = None  # Any use of it from here on raises.
    runtime = ranks[0][1]
    forward(runtime, 50)
    num_mappings = len(Path("/proc/self/maps").read_text().splitlines())
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    forward(runtime, 500)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    grown_mappings = len(Path("/proc/self/maps").read_text().splitlines()) - num_mappings
    for (group, attached_runtime), store in zip(ranks, stores, strict=True):
        group._store = store
        attached_runtime.detach()
    assert after - before < 4096, "2000 layers leave memory behind"
    assert grown_mappings <= 2, "2000 layers map memory"
