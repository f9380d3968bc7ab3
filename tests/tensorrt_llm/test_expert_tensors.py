"""Experts are moved as blocks of storage, whatever their layout: without TensorRT-LLM, on tensors alone."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dwdp import _C, DwdpConfig, Group
from dwdp.engines.tensorrt_llm import sharding
from dwdp.engines.tensorrt_llm.expert_tensors import FusedTensor
from dwdp.engines.tensorrt_llm.sharing import share_experts
from dwdp.fabric import create_fabric
from dwdp.fabric.host import HostFabric

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

from ranks import run_ranks

NUM_EXPERTS, ROWS, COLUMNS = 7, 40, 60


class CutlassFusedMoE(nn.Module):
    """Has the name and the attributes of TensorRT-LLM's backend, and parameters of any layout."""

    def __init__(self, resident: Sequence[int], **parameters: Tensor) -> None:
        super().__init__()
        self.num_experts, self.hidden_size = NUM_EXPERTS, COLUMNS
        self.ep_size = self.tp_size = self.cluster_size = self.parallel_size = 1
        self.routing_method = SimpleNamespace(experts_per_token=2)
        self.quant_method = type("NVFP4CutlassFusedMoEMethod", (), {})()
        self.dwdp_resident_experts = tuple(resident)
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))


def contiguous(experts: Tensor) -> Tensor:
    return experts.clone()


def transposed(experts: Tensor) -> Tensor:
    return experts.transpose(1, 2).contiguous().transpose(1, 2)


def padded_columns(experts: Tensor) -> Tensor:
    """Column-major with 44 rows' room in each column, of which 40 are there; storage ends with the last."""
    layout = (44 * COLUMNS, 1, 44)
    made = torch.empty_strided(experts.shape, layout, dtype=experts.dtype)
    return made.copy_(experts)


def part_of_another(experts: Tensor) -> Tensor:
    """Behind other bytes of one storage, as small tensors may be."""
    storage = torch.cat([torch.zeros(17, dtype=experts.dtype), experts.flatten()])
    return storage[17:].view(experts.shape)


def make_full() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_EXPERTS, ROWS, COLUMNS)
    values = torch.randint(0, 1 << 30, shape, dtype=torch.int32, generator=generator)
    return {
        "w3_w1_weight": values,
        "w2_weight": values.flip(0),
        "w3_w1_weight_scale": values + 1,
        "w2_weight_scale": values[:, :, 0].float(),
        "fc31_alpha": values[:, 0, 0].float(),
    }


LAYOUTS = {
    "w3_w1_weight": transposed,
    "w2_weight": contiguous,
    "w3_w1_weight_scale": padded_columns,
    "w2_weight_scale": part_of_another,
    "fc31_alpha": part_of_another,
}


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_layouts_are_kept(num_ranks: int) -> None:
    full = make_full()
    act_scale = torch.rand(1, COLUMNS)
    config = DwdpConfig(dwdp_size=num_ranks)

    def load(resident: Sequence[int]) -> CutlassFusedMoE:
        shares = {name: LAYOUTS[name](full[name][list(resident)]) for name in full}
        return CutlassFusedMoE(resident, **shares, fc31_act_scale=act_scale.clone())

    def body(group: Group) -> None:
        resident = sharding.placed_experts(config, group.rank)(NUM_EXPERTS)
        model = nn.ModuleList([load(resident), load(resident)])
        shared = share_experts(model, group, config, create_fabric("host"))
        expected = load(range(NUM_EXPERTS))
        for layer in shared.layers:
            assert layer.backend is layer.moe
            assert layer.backend.expert_size_per_partition == NUM_EXPERTS
            for name, parameter in layer.backend.named_parameters():
                wanted = expected.get_parameter(name)
                assert parameter.stride() == wanted.stride()
                assert torch.equal(parameter, wanted), name
        shared.close()

    run_ranks(num_ranks, body)


@pytest.mark.parametrize("mode", ["direct", "staged"])
def test_nothing_is_mapped_after_closing(mode: str) -> None:
    config = DwdpConfig(dwdp_size=2, fetch_mode=mode)
    models = []

    def body(group: Group) -> None:
        resident = sharding.placed_experts(config, group.rank)(NUM_EXPERTS)
        model = CutlassFusedMoE(resident, w2_weight=torch.ones(len(resident), ROWS, COLUMNS))
        models.append(model)
        share_experts(model, group, config, create_fabric("host")).close()

    before = num_shared()
    run_ranks(2, body)
    after = num_shared()
    assert all(now <= then for now, then in zip(after, before, strict=True)), (before, after)
    assert [model.w2_weight.numel() for model in models] == [0, 0]


def num_shared() -> tuple[int, int]:
    """Mappings and descriptors of shared memory in this process, without what waits to be collected."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().splitlines()
    links = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sum("memfd:" in row for row in maps), sum("memfd:" in str(link) for link in links)


def test_layers_are_moved_one_by_one() -> None:
    """When memory for a layer is taken, those before it are gone: never is there a second share."""
    config = DwdpConfig(dwdp_size=1)
    layers = [
        CutlassFusedMoE(range(NUM_EXPERTS), w2_weight=torch.ones(NUM_EXPERTS, ROWS, COLUMNS))
        for _ in range(4)
    ]
    layer_bytes = NUM_EXPERTS * ROWS * COLUMNS * 4
    held = []

    class WatchingFabric(HostFabric):
        def allocate(self, num_bytes: int) -> _C.HostRegion:
            held.append(sum(layer.w2_weight.nbytes for layer in layers))
            return super().allocate(num_bytes)

    def body(group: Group) -> None:
        share_experts(nn.ModuleList(layers), group, config, WatchingFabric()).close()

    run_ranks(1, body)
    assert held == [4 * layer_bytes, 3 * layer_bytes, 2 * layer_bytes, layer_bytes]


def test_an_unknown_backend_is_refused_and_not_left_out() -> None:
    class NewFusedMoE(CutlassFusedMoE):
        """Of a later TensorRT-LLM, say."""

    known = CutlassFusedMoE(range(NUM_EXPERTS), w2_weight=torch.ones(NUM_EXPERTS, ROWS))
    model = nn.ModuleList([known, NewFusedMoE(range(NUM_EXPERTS))])

    def body(group: Group) -> None:
        share_experts(model, group, DwdpConfig(dwdp_size=1), create_fabric("host"))

    with pytest.raises(ValueError, match="does not know the MoE backend NewFusedMoE"):
        run_ranks(1, body)


def test_experts_between_each_other_are_refused() -> None:
    experts = torch.zeros(COLUMNS, 3, ROWS).transpose(0, 1)
    with pytest.raises(ValueError, match="do not lie one after the other"):
        FusedTensor([CutlassFusedMoE((0, 1, 2), w2_weight=experts)], "w2_weight", 3)


def test_a_stride_that_means_nothing_is_not_looked_at() -> None:
    """The experts of a share of one: their stride is arbitrary, and other ranks have another."""
    one = torch.zeros(ROWS * COLUMNS).as_strided((1, ROWS, COLUMNS), (1, COLUMNS, 1))
    spec = FusedTensor([CutlassFusedMoE((6,), w2_weight=one)], "w2_weight", 1).spec
    assert spec.expert_shape == (ROWS * COLUMNS,)
    assert spec.num_experts == NUM_EXPERTS


def test_ranks_that_loaded_other_experts_than_they_store_are_refused() -> None:
    def body(group: Group) -> None:
        backend: Any = CutlassFusedMoE((0, 1), w2_weight=torch.zeros(2, ROWS, COLUMNS))
        share_experts(backend, group, DwdpConfig(dwdp_size=1), create_fabric("host"))

    with pytest.raises(ValueError, match=r"\[0, 1\] were loaded, but this rank stores \[0, 1, 2"):
        run_ranks(1, body)
