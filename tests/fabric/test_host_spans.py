"""When the host fabric's lanes copied."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from dwdp.fabric import Copy, Fabric, create_fabric
from dwdp.fabric.base import AddressRange
from dwdp.observability.spans import DEMAND_LANE, Span, fetch_lane


@pytest.fixture
def fabric() -> Iterator[Fabric]:
    fabric = create_fabric("host")
    yield fabric
    fabric.close()


def mapped(fabric: Fabric, num_bytes: int) -> AddressRange:
    address_range = fabric.reserve(num_bytes)
    address_range.map(0, fabric.allocate(num_bytes))
    address_range.enable_access(writable=True)
    return address_range


def test_a_fetch_leaves_a_span_on_each_of_its_lanes(fabric: Fabric) -> None:
    source, target = mapped(fabric, 1 << 16), mapped(fabric, 1 << 16)
    engine = fabric.copy_engine(3, 1)
    done = fabric.event()
    to, origin = target.address, source.address
    halves = [
        [Copy(to, origin, 10_000), Copy(to + 10_000, origin, 5000)],
        [],
        [Copy(to, origin, 7)],
    ]
    before_s = time.monotonic()
    for layer in (4, 9):
        engine.submit(engine.prepare(halves, [source, target], layer), after=done, done=done)
        done.wait()
    engine.submit(engine.prepare([]), after=None, done=done)
    done.wait()
    spans = engine.drain_spans()
    after_s = time.monotonic()
    assert [(span.lane, span.layer, span.num_bytes) for span in spans] == [
        (fetch_lane(0), 4, 15_000),
        (fetch_lane(0), 9, 15_000),
        (fetch_lane(2), 4, 7),
        (fetch_lane(2), 9, 7),
    ]
    assert all(before_s <= span.start_s <= span.end_s <= after_s for span in spans)
    # The second fetch was submitted when the first was over, on whatever lane.
    assert max(s.end_s for s in spans if s.layer == 4) <= min(
        s.start_s for s in spans if s.layer == 9
    )
    assert engine.drain_spans() == []
    engine.close()


def test_a_fetch_on_demand_leaves_a_span_if_it_copied(fabric: Fabric) -> None:
    source, target = mapped(fabric, 4096), mapped(fabric, 4096)
    engine = fabric.copy_engine(2, 1)
    demand = engine.prepare_demand(
        [[Copy(target.address, source.address, 100)], []], [source, target], 3
    )
    assert engine.fetch_activated(demand, torch.tensor([0, 1])) > 0.0
    engine.fetch_activated(demand, torch.tensor([1]))
    [span] = engine.drain_spans()
    assert (span.lane, span.layer, span.num_bytes) == (DEMAND_LANE, 3, 100)
    assert span.start_s <= span.end_s <= time.monotonic()
    engine.close()


@pytest.mark.parametrize("lane_depth", [1, 3])
def test_another_thread_collects_while_lanes_copy(fabric: Fabric, lane_depth: int) -> None:
    """Nothing is lost, told twice or torn, and what a lane did never overlaps."""
    num_fetches, num_bytes = 400, 1 << 16
    source, target = mapped(fabric, num_bytes), mapped(fabric, num_bytes)
    engine = fabric.copy_engine(2, lane_depth)
    lanes = [
        [Copy(target.address + at, source.address + at, 4096) for at in range(start, stop, 4096)]
        for start, stop in ((0, num_bytes // 4), (num_bytes // 4, num_bytes))
    ]
    expected_bytes = {fetch_lane(0): num_bytes // 4, fetch_lane(1): num_bytes - num_bytes // 4}
    fetches = [engine.prepare(lanes, [source, target], layer) for layer in range(num_fetches)]
    ended = threading.Event()
    collected: list[Span] = []

    def collect() -> None:
        while not ended.is_set():
            collected.extend(engine.drain_spans())

    reader = threading.Thread(target=collect)
    reader.start()
    done = fabric.event()
    for fetch in fetches:
        engine.submit(fetch, after=None, done=done)
    done.wait()
    ended.set()
    reader.join()
    collected.extend(engine.drain_spans())
    engine.close()
    for lane, lane_bytes in expected_bytes.items():
        spans = [span for span in collected if span.lane == lane]
        assert sorted(span.layer for span in spans) == list(range(num_fetches))
        assert {span.num_bytes for span in spans} == {lane_bytes}
        for earlier, later in pairwise(spans):
            assert earlier.start_s <= earlier.end_s <= later.start_s


def test_a_fetch_that_nobody_reads_of_makes_room(fabric: Fabric) -> None:
    source, target = mapped(fabric, 4096), mapped(fabric, 4096)
    engine = fabric.copy_engine(1, 1)
    done = fabric.event()
    slices = [[Copy(target.address, source.address, 8)]]
    for layer in range(3000):
        engine.submit(engine.prepare(slices, (), layer), after=None, done=done)
    done.wait()
    layers = [span.layer for span in engine.drain_spans()]
    assert 1000 <= len(layers) < 3000
    assert layers == list(range(3000 - len(layers), 3000))
    engine.close()
