"""Ranks as threads of one process, with the real fabric; and experts whose every byte is known."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.distributed import HashStore

from dwdp.group import Group
from dwdp.weights import ExpertTensorSpec, ExpertWeights, LayerSpec

T = TypeVar("T")


def run_ranks(size: int, body: Callable[[Group], T], *, timeout_s: float = 60.0) -> list[T]:
    """Run ``body(group)`` once per rank, at the same time; results in rank order.

    The first failure of any rank is raised here, once every rank has ended.
    """
    store = HashStore()
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            group = Group(rank, size, store, timeout_s=timeout_s)
            with group.setting_up():
                results[rank] = body(group)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s + 10)
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    if errors:
        raise errors[0]
    return results


def layers_of(*tensors: tuple[int, ...], num_layers: int, num_experts: int) -> list[LayerSpec]:
    return [
        LayerSpec(
            f"layers.{index}",
            tuple(
                ExpertTensorSpec(f"t{k}", num_experts, shape, torch.float32)
                for k, shape in enumerate(tensors)
            ),
        )
        for index in range(num_layers)
    ]


def reference(layers: list[LayerSpec]) -> list[dict[str, torch.Tensor]]:
    """Full tensors whose bytes differ everywhere."""
    generator = torch.Generator().manual_seed(1)
    return [
        {
            t.name: torch.randint(
                0, 256, (t.num_experts, t.expert_bytes), dtype=torch.uint8, generator=generator
            )
            .view(t.dtype)
            .view(t.num_experts, *t.expert_shape)
            for t in layer.tensors
        }
        for layer in layers
    ]


def load(weights: ExpertWeights, rank: int, full: list[dict[str, torch.Tensor]]) -> None:
    for index, tensors in enumerate(full):
        for name, tensor in tensors.items():
            for expert in weights.placement(index).resident_experts(rank):
                weights.destination(index, name, expert).copy_(tensor[expert])


def assert_same_bytes(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))
