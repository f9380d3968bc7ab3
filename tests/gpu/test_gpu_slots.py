"""The slot protocol under random delays: right with both of its events, wrong without either."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from gpu_support import cuda_fabric, needs_gpu, odd_layers
from ranks import load, reference, run_ranks

from dwdp.config import DwdpConfig
from dwdp.fabric.base import Event
from dwdp.group import Group
from dwdp.runtime import DwdpRuntime

pytestmark = needs_gpu
NUM_RANKS, NUM_FORWARDS = 2, 12
LONG, SHORT = 20_000_000, 200_000
"""Cycles: about 10 ms, many times what a fetch takes, and 0.1 ms, less than that."""


class LateFetches:
    """The real copy engine, but every fetch starts late, by up to ``longest_delay`` cycles."""

    def __init__(self, engine: Any, delays: random.Random, longest_delay: int) -> None:
        self._engine = engine
        self._delays = delays
        self._longest_delay = longest_delay
        self._late = cuda_fabric().event()
        self._stream = torch.cuda.Stream()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, fetch: Any, *, after: Event | None, done: Event) -> None:
        with torch.cuda.stream(self._stream):
            if after is not None:
                after.wait()
            torch.cuda._sleep(self._delays.randint(self._longest_delay // 2, self._longest_delay))
            self._late.record()
        self._engine.submit(fetch, after=self._late, done=done)


class WithoutFree(LateFetches):
    """Fetches do not wait until the slot has been read."""

    def submit(self, fetch: Any, *, after: Event | None, done: Event) -> None:
        self._engine.submit(fetch, after=None, done=done)


class WithoutReady(LateFetches):
    """Reads do not wait until the slot has been filled: its end is told to another event."""

    def __init__(self, engine: Any, delays: random.Random, longest_delay: int) -> None:
        super().__init__(engine, delays, longest_delay)
        self._unseen = cuda_fabric().event()

    def submit(self, fetch: Any, *, after: Event | None, done: Event) -> None:
        super().submit(fetch, after=after, done=self._unseen)


def count_wrong_reads(
    group: Group,
    engine: type[LateFetches],
    late_reads: int = 0,
    late_fetches: int = 0,
    seed: int = 0,
) -> int:
    """Forwards in which reads and fetches are late by random cycles while the host runs ahead."""
    layers = odd_layers(num_layers=6)
    delays = random.Random(seed + group.rank)
    full = reference(layers)
    config = DwdpConfig(dwdp_size=group.size, fetch_mode="staged", slice_bytes=1 << 20)
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        expected = [{name: tensor.cuda() for name, tensor in layer.items()} for layer in full]
        with DwdpRuntime(group, config, cuda_fabric()) as runtime:
            load(runtime.allocate(layers), group.rank, full)
            runtime.attach()
            pipeline = runtime._pipeline
            assert pipeline is not None
            pipeline._engine = engine(pipeline._engine, delays, late_fetches)
            wrong = torch.zeros((), dtype=torch.int64, device="cuda")
            for _ in range(NUM_FORWARDS):
                for index in range(len(layers)):
                    runtime.begin(index)
                    torch.cuda._sleep(delays.randint(0, late_reads))
                    for name, tensor in runtime.tensors(index).items():
                        right = expected[index][name].view(torch.int32)
                        wrong += (tensor.view(torch.int32) != right).any()
                    runtime.end(index)
            torch.cuda.synchronize()
            return int(wrong.item())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("late_reads", "late_fetches"), [(0, 0), (LONG, 0), (0, LONG), (SHORT, SHORT), (LONG, LONG)]
)
def test_no_read_is_wrong_however_late_things_are(
    late_reads: int, late_fetches: int, seed: int
) -> None:
    def body(group: Group) -> int:
        return count_wrong_reads(group, LateFetches, late_reads, late_fetches, seed)

    assert run_ranks(NUM_RANKS, body) == [0] * NUM_RANKS


def test_without_the_wait_for_a_free_slot_reads_are_wrong() -> None:
    wrong = run_ranks(
        NUM_RANKS, lambda group: count_wrong_reads(group, WithoutFree, late_reads=LONG)
    )
    assert all(wrong)


def test_without_the_wait_for_a_fetch_reads_are_wrong() -> None:
    wrong = run_ranks(
        NUM_RANKS, lambda group: count_wrong_reads(group, WithoutReady, late_fetches=LONG)
    )
    assert all(wrong)
