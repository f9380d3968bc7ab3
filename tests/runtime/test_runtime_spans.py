"""What DwdpRuntime tells of its lanes and waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from ranks import layers_of, load, reference, run_ranks

from dwdp.config import DwdpConfig
from dwdp.fabric.host import HostFabric
from dwdp.group import Group
from dwdp.observability.spans import DEMAND_LANE, EXPOSED_WAIT, Span, WaitLog
from dwdp.runtime import DwdpRuntime, RuntimeStats

NUM_LAYERS = 5
LAYERS = layers_of((64, 64), (33,), num_layers=NUM_LAYERS, num_experts=8)
FULL = reference(LAYERS)
EVERY_EXPERT = torch.arange(8).view(2, 4)


class DeviceLikeFabric(HostFabric):
    """Host memory under another name, so that mode auto stages and fetches on demand, as on a GPU."""

    name = "device-like"


def run(
    config: DwdpConfig, steps: Sequence[torch.Tensor | None]
) -> list[tuple[tuple[str, ...], list[Span], RuntimeStats]]:
    """Per rank its lanes, its spans, and its counters after a forward for each of ``steps``."""

    def body(group: Group) -> tuple[tuple[str, ...], list[Span], RuntimeStats]:
        with DwdpRuntime(group, config, DeviceLikeFabric()) as runtime:
            load(runtime.allocate(LAYERS), group.rank, FULL)
            runtime.attach()
            spans = []
            for indices in steps:
                for layer in range(NUM_LAYERS):
                    runtime.begin(layer, indices)
                    runtime.end(layer)
                spans += runtime.drain_spans()
            # What was fetched ahead is still on its way.
            deadline = time.monotonic() + 60
            while fetched_bytes(spans) < runtime.stats().fetched_bytes:
                assert time.monotonic() < deadline
                spans += runtime.drain_spans()
            result = runtime.lanes, spans, runtime.stats()
        assert runtime.drain_spans() == []
        return result

    return run_ranks(config.dwdp_size, body)


def fetched_bytes(spans: list[Span]) -> int:
    return sum(span.num_bytes for span in spans)


def assert_in_order(spans: list[Span]) -> None:
    for earlier, later in pairwise(spans):
        assert earlier.start_s <= earlier.end_s <= later.start_s


@pytest.mark.parametrize(("size", "num_lanes", "lane_depth"), [(4, None, 1), (4, 2, 2), (2, 5, 1)])
def test_every_fetched_byte_is_in_a_span(size: int, num_lanes: int | None, lane_depth: int) -> None:
    config = DwdpConfig(
        dwdp_size=size,
        fetch_mode="staged",
        num_lanes=num_lanes,
        lane_depth=lane_depth,
        slice_bytes=4096,
    )
    for lanes, spans, stats in run(config, [None] * 6):
        assert lanes == tuple(f"fetch {lane}" for lane in range(min(num_lanes or size, size - 1)))
        assert {span.lane for span in spans} - {EXPOSED_WAIT} == set(lanes)
        assert fetched_bytes(spans) == stats.fetched_bytes
        by_layer = [fetched_bytes([s for s in spans if s.layer == i]) for i in range(NUM_LAYERS)]
        layer_bytes = stats.fetched_bytes // stats.num_fetches
        assert sum(by_layer) == stats.fetched_bytes
        assert all(num_bytes % layer_bytes == 0 and num_bytes > 0 for num_bytes in by_layer)
        for lane in lanes:
            assert_in_order([span for span in spans if span.lane == lane])


def test_waits_are_told_as_they_are_counted() -> None:
    config = DwdpConfig(dwdp_size=3, fetch_mode="staged")
    for _, spans, stats in run(config, [None] * 20):
        waits = [span for span in spans if span.lane == EXPOSED_WAIT]
        assert len(waits) == stats.num_waits
        assert sum(span.end_s - span.start_s for span in waits) == pytest.approx(
            stats.exposed_wait_s, abs=1e-6
        )
        assert {span.layer for span in waits} <= set(range(NUM_LAYERS))
        assert_in_order(waits)


def test_a_fetch_on_demand_is_a_span_and_a_wait() -> None:
    config = DwdpConfig(dwdp_size=2, fetch_mode="demand")
    for lanes, spans, stats in run(config, [EVERY_EXPERT, EVERY_EXPERT[:1]]):
        assert lanes == (DEMAND_LANE,)
        demands = [span for span in spans if span.lane == DEMAND_LANE]
        waits = [span for span in spans if span.lane == EXPOSED_WAIT]
        assert fetched_bytes(demands) == stats.fetched_bytes > 0
        assert [wait.layer for wait in waits] == 2 * list(range(NUM_LAYERS))
        assert {span.layer for span in demands} == set(range(NUM_LAYERS))


def test_mode_auto_tells_of_both_kinds_of_fetch() -> None:
    config = DwdpConfig(dwdp_size=3, fetch_mode="auto", demand_max_tokens=1)
    [(lanes, spans, stats), *_] = run(config, [EVERY_EXPERT, EVERY_EXPERT[:1], None])
    assert lanes == ("fetch 0", "fetch 1", DEMAND_LANE)
    assert {span.lane for span in spans} - {EXPOSED_WAIT} <= set(lanes)
    assert fetched_bytes(spans) == stats.fetched_bytes


def test_in_direct_mode_there_is_nothing_to_tell() -> None:
    for lanes, spans, _ in run(DwdpConfig(dwdp_size=2, fetch_mode="direct"), [None]):
        assert lanes == ()
        assert spans == []


def test_a_wait_log_gives_each_wait_once_and_keeps_the_last() -> None:
    log = WaitLog(capacity=4)
    assert log.drain() == []
    for layer in range(3):
        log.record(layer, layer + 0.25, layer + 0.5)
    assert log.drain() == [
        Span(EXPOSED_WAIT, layer + 0.25, layer + 0.5, layer, 0) for layer in range(3)
    ]
    assert log.drain() == []
    for layer in range(10, 20):
        log.record(layer, layer, layer)
    assert [span.layer for span in log.drain()] == [17, 18, 19]
    log.record(20, 20, 20)
    assert [span.layer for span in log.drain()] == [20]


def test_a_wait_log_is_read_while_it_is_written() -> None:
    log = WaitLog(capacity=8)
    num_waits = 50_000

    def write() -> None:
        for layer in range(num_waits):
            log.record(layer, layer, layer + 0.5)

    writer = threading.Thread(target=write)
    writer.start()
    last = -1
    while last < num_waits - 1:
        for span in log.drain():
            assert span == Span(EXPOSED_WAIT, span.layer, span.layer + 0.5, span.layer, 0)
            assert span.layer > last
            last = span.layer
    writer.join()
