"""Memory taken one layer at a time, for engines that load experts elsewhere first."""

from __future__ import annotations

import pytest
from ranks import assert_same_bytes, layers_of, reference, run_ranks

from dwdp import _C
from dwdp.config import DwdpConfig
from dwdp.fabric.host import HostFabric
from dwdp.group import Group
from dwdp.runtime import DwdpRuntime
from dwdp.weights import ExpertWeights

# The first two tensors have pages of their own, the third is packed with those of the other layers.
LAYERS = layers_of((64, 64), (33, 77), (3,), num_layers=4, num_experts=7)
FULL = reference(LAYERS)


class CountingFabric(HostFabric):
    """Keeps count of the memory that is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def allocate(self, num_bytes: int) -> _C.HostRegion:
        self.num_bytes += num_bytes
        return super().allocate(num_bytes)


def load_layer(weights: ExpertWeights, rank: int, index: int) -> None:
    for name, tensor in FULL[index].items():
        for expert in weights.placement(index).resident_experts(rank):
            weights.destination(index, name, expert).copy_(tensor[expert])


@pytest.mark.parametrize("mode", ["staged", "direct"])
def test_layers_are_allocated_one_by_one(mode: str) -> None:
    def body(group: Group) -> None:
        fabric = CountingFabric()
        with DwdpRuntime(group, DwdpConfig(dwdp_size=3, fetch_mode=mode), fabric) as runtime:
            weights = runtime.allocate(LAYERS, layer_by_layer=True)
            assert fabric.num_bytes == 0
            taken = []
            for index in range(len(LAYERS)):
                before = fabric.num_bytes
                weights.allocate_layer(index)
                taken.append(fabric.num_bytes - before)
                load_layer(weights, group.rank, index)
            # The first takes the small tensors of all layers along.
            assert taken[0] > taken[1] > 0
            assert len(set(taken[1:])) == 1
            assert sum(taken) == weights.resident_bytes
            runtime.attach()
            for index, full in enumerate(FULL):
                runtime.begin(index)
                for name, tensor in runtime.tensors(index).items():
                    assert_same_bytes(tensor, full[name])
                runtime.end(index)

    run_ranks(3, body)


def test_the_order_of_layers_is_free() -> None:
    def body(group: Group) -> None:
        with DwdpRuntime(group, DwdpConfig(dwdp_size=2)) as runtime:
            weights = runtime.allocate(LAYERS, layer_by_layer=True)
            for index in reversed(range(len(LAYERS))):
                weights.allocate_layer(index)
                load_layer(weights, group.rank, index)
            runtime.attach()
            for index, full in enumerate(FULL):
                for name, tensor in runtime.tensors(index).items():
                    assert_same_bytes(tensor, full[name])

    run_ranks(2, body)


def test_all_at_once_takes_the_same_memory() -> None:
    def body(group: Group) -> None:
        fabric = CountingFabric()
        with DwdpRuntime(group, DwdpConfig(dwdp_size=2), fabric) as runtime:
            assert runtime.allocate(LAYERS).resident_bytes == fabric.num_bytes

    run_ranks(2, body)


def test_a_layer_that_was_forgotten_is_named() -> None:
    def body(group: Group) -> None:
        with DwdpRuntime(group, DwdpConfig(dwdp_size=2)) as runtime:
            weights = runtime.allocate(LAYERS, layer_by_layer=True)
            for index in (0, 1, 3):
                weights.allocate_layer(index)
            with pytest.raises(RuntimeError, match=r"layers\.2"):
                runtime.attach()

    run_ranks(2, body)
