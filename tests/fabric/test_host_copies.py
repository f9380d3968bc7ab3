"""Events and copy engines of the host fabric."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator

import fabric_peers as peers
import pytest
import torch

from dwdp.fabric import Copy, Fabric, FabricError, create_fabric
from dwdp.fabric.base import AddressRange, CopyEngine


@pytest.fixture
def fabric() -> Iterator[Fabric]:
    fabric = create_fabric("host")
    yield fabric
    fabric.close()


def mapped(fabric: Fabric, num_bytes: int, seed: int | None = None) -> AddressRange:
    """A writable range of at least ``num_bytes``, random when there is a ``seed``."""
    rounded = -(-num_bytes // fabric.granularity) * fabric.granularity
    address_range = fabric.reserve(rounded)
    address_range.map(0, fabric.allocate(rounded))
    address_range.enable_access(writable=True)
    if seed is not None:
        address_range.bytes_tensor(0, rounded).copy_(peers.pattern(seed, rounded))
    return address_range


def slow_fetch(fabric: Fabric, engine: CopyEngine) -> tuple[object, list[AddressRange]]:
    """A fetch of about 2 GiB on one lane; the ranges must be kept until it is over."""
    num_bytes = 4 << 20
    source, target = mapped(fabric, num_bytes), mapped(fabric, num_bytes)
    fetch = engine.prepare([[Copy(target.address, source.address, num_bytes)] * 500])
    return fetch, [source, target]


def test_event_is_complete_before_anything_was_issued(fabric: Fabric) -> None:
    event = fabric.event()
    assert event.query()
    event.wait()
    event.record()
    assert event.query()
    event.wait()
    assert event.num_waits == 0
    assert event.waited_s == 0.0


def test_event_counts_the_seconds_waited_and_releases_the_gil(fabric: Fabric) -> None:
    engine = fabric.copy_engine(1, 1)
    fetch, _ranges = slow_fetch(fabric, engine)
    done = fabric.event()
    stop = threading.Event()
    ticks: list[float] = []

    def tick() -> None:
        while not stop.wait(0.002):
            ticks.append(time.monotonic())

    thread = threading.Thread(target=tick)
    thread.start()
    while not ticks:
        time.sleep(0.001)
    engine.submit(fetch, after=None, done=done)
    assert not done.query()
    start = time.monotonic()
    done.wait()
    stop_time = time.monotonic()
    stop.set()
    thread.join()
    assert done.query()
    assert done.num_waits == 1
    assert done.waited_s > 0.05
    assert done.waited_s == pytest.approx(stop_time - start, rel=0.2, abs=0.02)
    assert sum(start < t < stop_time for t in ticks) >= 5
    engine.close()


def test_signal_handlers_end_a_wait(fabric: Fabric) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    engine = fabric.copy_engine(1, 1)
    fetch, _ranges = slow_fetch(fabric, engine)
    done = fabric.event()
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(3):
            engine.submit(fetch, after=None, done=done)
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(Interrupted):
            done.wait()
        assert not done.query()
    finally:
        signal.signal(signal.SIGALRM, previous)
    done.wait()
    assert done.waited_s > 0.0
    engine.close()


def test_submit_returns_at_once_and_close_finishes(fabric: Fabric) -> None:
    engine = fabric.copy_engine(1, 1)
    fetch, _ranges = slow_fetch(fabric, engine)
    done = fabric.event()
    engine.submit(fetch, after=None, done=done)
    assert not done.query()
    engine.close()
    assert done.query()
    engine.close()
    with pytest.raises(FabricError, match="closed copy engine"):
        engine.submit(fetch, after=None, done=done)
    assert done.query()


def test_fetch_waits_for_after_and_chains_across_engines(fabric: Fabric) -> None:
    num_bytes = 3 << 20
    buffers = [mapped(fabric, num_bytes, seed=i) for i in range(4)]
    engines = [fabric.copy_engine(1, 1), fabric.copy_engine(2, 2)]
    events = [fabric.event() for _ in range(3)]
    for i in range(3):
        engine = engines[i % 2]
        fetch = engine.prepare([[Copy(buffers[i + 1].address, buffers[i].address, num_bytes)]])
        engine.submit(fetch, after=events[i - 1] if i else None, done=events[i])
    events[2].wait()
    assert all(event.query() for event in events)
    expected = peers.pattern(0, num_bytes)
    for buffer in buffers:
        assert torch.equal(buffer.bytes_tensor(0, num_bytes), expected)
    for engine in engines:
        engine.close()


def test_empty_fetches_complete(fabric: Fabric) -> None:
    engine = fabric.copy_engine(3, 1)
    slow, _ranges = slow_fetch(fabric, engine)
    first, done = fabric.event(), fabric.event()
    engine.submit(slow, after=None, done=first)
    empty: list[list[list[Copy]]] = [[], [[]], [[], [], []]]
    for lanes in empty:
        engine.submit(engine.prepare(lanes), after=first, done=done)
    done.wait()
    assert first.query()
    engine.close()


def test_bad_fetches_are_refused(fabric: Fabric) -> None:
    engine = fabric.copy_engine(2, 1)
    buffer = mapped(fabric, 4096)
    start = buffer.address
    with pytest.raises(FabricError, match="a fetch of 3 lanes does not fit a copy engine of 2"):
        engine.prepare([[], [], []])
    with pytest.raises(FabricError, match="must not be zero"):
        engine.prepare([[Copy(start, start + 64, 0)]])
    with pytest.raises(FabricError, match=r"lane 1 of a fetch .* which overlap"):
        engine.prepare([[], [Copy(start, start + 8, 9)]])
    for num_lanes, depth in ((0, 1), (1, 0)):
        with pytest.raises(FabricError, match="at least one lane"):
            fabric.copy_engine(num_lanes, depth)
    with pytest.raises(TypeError):
        engine.submit(engine.prepare([]), after=None, done=None)  # type: ignore[arg-type]
    engine.close()


def test_threads_are_named_and_end(fabric: Fabric) -> None:
    assert peers.eventually(lambda: not peers.native_threads())
    engine = fabric.copy_engine(2, 2)
    expected = ["dwdp-lane-0", "dwdp-lane-0", "dwdp-lane-1", "dwdp-lane-1"]
    assert peers.eventually(lambda: peers.native_threads() == expected)
    del engine
    assert peers.eventually(lambda: not peers.native_threads())


def slices_on_lanes(
    rng: random.Random, num_lanes: int, dst: int, src: int, num_bytes: int, largest: int
) -> list[list[Copy]]:
    lanes: list[list[Copy]] = [[] for _ in range(num_lanes)]
    start = 0
    while start < num_bytes:
        length = min(num_bytes - start, rng.randint(1, largest))
        rng.choice(lanes).append(Copy(dst + start, src + start, length))
        start += length
    return lanes


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_demand_copies_the_experts_that_indices_name(fabric: Fabric, dtype: torch.dtype) -> None:
    num_experts, expert_bytes = 12, 1001
    source = mapped(fabric, num_experts * expert_bytes, seed=1)
    target = mapped(fabric, num_experts * expert_bytes)
    experts = [
        [
            Copy(target.address + start, source.address + start, 500),
            Copy(target.address + start + 500, source.address + start + 500, 501),
        ]
        for start in range(0, num_experts * expert_bytes, expert_bytes)
    ]
    experts[7] = []  # resident
    engine = fabric.copy_engine(1, 1)
    demand = engine.prepare_demand(experts, [source, target])
    view = target.bytes_tensor(0, num_experts * expert_bytes).view(num_experts, expert_bytes)
    expected = torch.zeros_like(view)
    # Padding, an id too large, one twice, and a tensor that is not contiguous.
    indices = torch.tensor([[3, -1], [11, num_experts], [3, 7], [0, 11]], dtype=dtype).t()
    engine.fetch_activated(demand, indices)
    for expert in (0, 3, 11):
        start = expert * expert_bytes
        expected[expert] = source.bytes_tensor(start, expert_bytes)
    assert torch.equal(view, expected)
    assert engine.demanded_bytes == 3 * expert_bytes
    engine.fetch_activated(demand, indices[:0])
    assert engine.demanded_bytes == 3 * expert_bytes
    assert engine.demand_waited_s > 0.0
    engine.close()
    with pytest.raises(FabricError, match="closed copy engine"):
        engine.fetch_activated(demand, indices)


def test_demand_refuses_what_is_no_list_of_indices(fabric: Fabric) -> None:
    engine = fabric.copy_engine(1, 1)
    demand = engine.prepare_demand([])
    with pytest.raises(
        ValueError, match=r"the router's choice is torch.int16 on cpu: it has to be"
    ):
        engine.fetch_activated(demand, torch.zeros(3, dtype=torch.int16))
    buffer = mapped(fabric, 4096)
    with pytest.raises(FabricError, match="expert 1 of a fetch has a slice of 0 bytes"):
        engine.prepare_demand([[], [Copy(buffer.address, buffer.address + 64, 0)]])
    engine.close()


def test_demand_keeps_its_memory_mapped(fabric: Fabric) -> None:
    mappings = peers.num_region_mappings()
    engine = fabric.copy_engine(1, 1)
    source, target = mapped(fabric, 4096, seed=1), mapped(fabric, 4096)
    demand = engine.prepare_demand([[Copy(target.address, source.address, 4096)]], [source, target])
    source.close()
    target.close()
    engine.fetch_activated(demand, torch.zeros(1, dtype=torch.int64))
    assert peers.num_region_mappings() == mappings + 2
    del demand
    assert peers.num_region_mappings() == mappings
    engine.close()


@pytest.mark.parametrize("num_slots", [2, 3])
@pytest.mark.parametrize(("num_lanes", "lane_depth"), [(1, 1), (1, 3), (3, 1), (4, 2)])
def test_ring_of_slots_has_no_hazard(
    fabric: Fabric, num_slots: int, num_lanes: int, lane_depth: int
) -> None:
    """The ring as the pipeline drives it: every step reads exactly its layer's bytes."""
    rng = random.Random(num_slots * 100 + num_lanes * 10 + lane_depth)
    num_layers, num_bytes = 5, 300_000
    layers = [mapped(fabric, num_bytes, seed=i) for i in range(num_layers)]
    expected = [layer.bytes_tensor(0, num_bytes) for layer in layers]
    slots = [mapped(fabric, num_bytes) for _ in range(num_slots)]
    views = [slot.bytes_tensor(0, num_bytes) for slot in slots]
    ready = [fabric.event() for _ in range(num_slots)]
    free = [fabric.event() for _ in range(num_slots)]
    engine = fabric.copy_engine(num_lanes, lane_depth)

    def fetch(step: int) -> None:
        slot, layer = step % num_slots, step % num_layers
        lanes = slices_on_lanes(
            rng, num_lanes, slots[slot].address, layers[layer].address, num_bytes, 50_000
        )
        engine.submit(engine.prepare(lanes), after=free[slot], done=ready[slot])

    for step in range(num_slots):
        fetch(step)
    for step in range(60):
        slot = step % num_slots
        ready[slot].wait()
        assert torch.equal(views[slot], expected[step % num_layers]), f"step {step}"
        free[slot].record()
        fetch(step + num_slots)
    engine.close()
    assert sum(span.num_bytes for span in engine.drain_spans()) == (60 + num_slots) * num_bytes


@pytest.mark.parametrize("seed", range(8))
def test_random_programs_match_a_plain_reference(fabric: Fabric, seed: int) -> None:
    """Copies between random buffers, each after whatever touched its buffers last."""
    rng = random.Random(seed)
    num_buffers, num_bytes = 5, 100_000
    buffers = [mapped(fabric, num_bytes, seed=i) for i in range(num_buffers)]
    reference = [peers.pattern(i, buffers[i].num_bytes)[:num_bytes] for i in range(num_buffers)]
    engines = [(n, fabric.copy_engine(n, rng.randint(1, 3))) for n in (1, rng.randint(2, 4))]
    events = [fabric.event() for _ in range(num_buffers)]
    last = [events[0]] * num_buffers
    for _ in range(100):
        src, dst = rng.sample(range(num_buffers), 2)
        start = rng.randrange(num_bytes)
        length = rng.randint(1, num_bytes - start)
        reference[dst][start : start + length] = reference[src][start : start + length]
        # An engine waits for one event; the host waits for the other.
        last[src].wait()
        num_lanes, engine = rng.choice(engines)
        lanes = slices_on_lanes(
            rng,
            num_lanes,
            buffers[dst].address + start,
            buffers[src].address + start,
            length,
            rng.choice([500, 20_000]),
        )
        done = rng.choice(events)
        engine.submit(engine.prepare(lanes), after=last[dst], done=done)
        last[src] = last[dst] = done
    for _, engine in engines:
        engine.close()
    for buffer, expected in zip(buffers, reference, strict=True):
        assert torch.equal(buffer.bytes_tensor(0, num_bytes), expected)
