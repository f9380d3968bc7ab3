"""Invariant 3: a forward asks nothing of the group and grows nothing."""

from __future__ import annotations

import threading
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
    attached, measured = threading.Barrier(2), threading.Barrier(2)

    def body(group: Group) -> tuple[int, int]:
        runtime = DwdpRuntime(group, config)
        load(runtime.allocate(layers), group.rank, full)
        runtime.attach()
        store, group._store = group._store, None  # Any use of it from here on raises.
        forward(runtime, 50)
        attached.wait()
        grown = (0, 0)
        if group.rank == 0:  # The other rank does nothing at all meanwhile.
            num_mappings = len(Path("/proc/self/maps").read_text().splitlines())
            tracemalloc.start()
            before, _ = tracemalloc.get_traced_memory()
            forward(runtime, 500)
            after, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            mappings = len(Path("/proc/self/maps").read_text().splitlines()) - num_mappings
            grown = (after - before, mappings)
        measured.wait()
        group._store = store
        runtime.detach()
        return grown

    grown_bytes, grown_mappings = run_ranks(2, body)[0]
    assert grown_bytes < 4096, "2000 layers leave memory behind"
    assert grown_mappings <= 2, "2000 layers map memory"
