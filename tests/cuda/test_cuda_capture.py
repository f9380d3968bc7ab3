"""Fetches and events in CUDA graphs: captured once, right at every replay."""

from __future__ import annotations

import gc
import random
import threading

import driver as cu
import pytest
from cuda_support import mapped, pattern, random_lanes
from driver import Driver, Stream
from standin import Standin

from dwdp import _C

NUM_BYTES = 80_000


@pytest.fixture
def late(loaded_standin: Standin | None) -> object:
    """Everything starts late by random times, on the stand-in."""
    if loaded_standin is not None:
        loaded_standin.set("JITTER_US", 1500)
    yield
    if loaded_standin is not None:
        loaded_standin.set("JITTER_US", 0)


def test_a_captured_fetch_copies_what_its_sources_hold_when_it_is_launched(
    driver: Driver, device: _C.CudaDevice
) -> None:
    compute = driver.stream()
    engine = _C.CudaCopyEngine(device, 2, 2)
    source, slot, result = (mapped(driver, device, NUM_BYTES) for _ in range(3))
    lanes = random_lanes(random.Random(0), 2, slot.address, source.address, NUM_BYTES, 9000)
    fetch = engine.prepare(lanes, [source, slot])
    free, ready = _C.CudaEvent(device), _C.CudaEvent(device)
    with compute.capture() as graph:
        free.record(compute.address)
        engine.submit(fetch, after=free, done=ready)
        ready.wait(compute.address)
        driver.copy(result.address, slot.address, NUM_BYTES, compute)
    assert ready.query()  # what is captured has not happened
    graph.instantiate()
    for seed in range(3):
        driver.write(source.address, pattern(seed, NUM_BYTES))
        graph.launch(compute)
        compute.synchronize()
        assert driver.read(result.address, NUM_BYTES) == pattern(seed, NUM_BYTES)
    graph.destroy()
    engine.close()
    compute.destroy()


class CapturedRing:
    """Layers through a ring of slots, compute being a copy out of each slot; eager or in graphs.

    ``forward`` ends with the first layers of the next one under way, which nothing in it waits for.
    """

    NUM_LAYERS = 4

    def __init__(
        self, driver: Driver, device: _C.CudaDevice, num_slots: int, num_lanes: int
    ) -> None:
        self.driver = driver
        self.device = device
        self.rng = random.Random(num_slots * 10 + num_lanes)
        self.compute = driver.stream()
        self.engine = _C.CudaCopyEngine(device, num_lanes, 2)
        self.layers = [mapped(driver, device, NUM_BYTES) for _ in range(self.NUM_LAYERS)]
        self.slots = [mapped(driver, device, NUM_BYTES) for _ in range(num_slots)]
        self.results = [mapped(driver, device, NUM_BYTES) for _ in range(self.NUM_LAYERS)]
        self.ready = [_C.CudaEvent(device) for _ in range(num_slots)]
        self.free = [_C.CudaEvent(device) for _ in range(num_slots)]
        self.fetches = [self._prepare(layer) for layer in range(self.NUM_LAYERS)]

    def _prepare(self, layer: int) -> _C.CudaFetch:
        slot = self.slots[layer % len(self.slots)]
        source = self.layers[layer]
        lanes = random_lanes(
            self.rng, self.engine.num_lanes, slot.address, source.address, NUM_BYTES, 20_000
        )
        return self.engine.prepare(lanes, [slot, source])

    def load(self, seed: int) -> None:
        """Other weights; nothing may be under way."""
        for i, layer in enumerate(self.layers):
            self.driver.write(layer.address, pattern(seed + i, NUM_BYTES))

    def fetch(self, layer: int) -> None:
        slot = layer % len(self.slots)
        self.engine.submit(self.fetches[layer], after=self.free[slot], done=self.ready[slot])

    def start(self) -> None:
        for layer in range(len(self.slots)):
            self.free[layer].record(self.compute.address)
            self.fetch(layer)

    def forward(self) -> None:
        for layer, result in enumerate(self.results):
            slot = layer % len(self.slots)
            self.ready[slot].wait(self.compute.address)
            self.device.spin(self.compute.address, self.rng.randrange(500_000))
            self.driver.copy(result.address, self.slots[slot].address, NUM_BYTES, self.compute)
            self.free[slot].record(self.compute.address)
            self.fetch((layer + len(self.slots)) % self.NUM_LAYERS)

    def wrong_layers(self, seed: int) -> list[int]:
        self.compute.synchronize()
        return [
            layer
            for layer, result in enumerate(self.results)
            if self.driver.read(result.address, NUM_BYTES) != pattern(seed + layer, NUM_BYTES)
        ]

    def close(self) -> None:
        self.engine.close()
        self.compute.destroy()


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize(("num_slots", "num_lanes"), [(2, 1), (2, 3), (4, 2)])
def test_a_captured_ring_replays_with_what_it_fetched_for_itself(
    driver: Driver, device: _C.CudaDevice, num_slots: int, num_lanes: int
) -> None:
    """The wrap-around included: what the end of one replay fetches, the start of the next reads."""
    ring = CapturedRing(driver, device, num_slots, num_lanes)
    ring.load(seed=0)
    ring.start()
    ring.forward()
    assert ring.wrong_layers(seed=0) == []
    with ring.compute.capture() as graph:
        ring.forward()
    graph.instantiate()
    for _ in range(4):
        graph.launch(ring.compute)
    assert ring.wrong_layers(seed=0) == []
    ring.forward()
    assert ring.wrong_layers(seed=0) == []
    ring.engine.close()  # to be sure that no fetch is under way
    ring.load(seed=100)
    graph.launch(ring.compute)  # fetches the new weights; its first layers were fetched before
    graph.launch(ring.compute)
    assert ring.wrong_layers(seed=100) == []
    graph.destroy()
    ring.close()


@pytest.mark.usefixtures("late")
def test_a_graph_waits_for_fetches_outside_it_at_every_replay(
    driver: Driver, device: _C.CudaDevice
) -> None:
    compute = driver.stream()
    engine = _C.CudaCopyEngine(device, 2, 1)
    sources = [mapped(driver, device, NUM_BYTES, seed=i) for i in range(4)]
    slot, result = (mapped(driver, device, NUM_BYTES) for _ in range(2))
    free, ready = _C.CudaEvent(device), _C.CudaEvent(device)

    def fetch(source: _C.CudaAddressRange) -> None:
        lanes = random_lanes(random.Random(0), 2, slot.address, source.address, NUM_BYTES, 9000)
        engine.submit(engine.prepare(lanes), after=free, done=ready)

    fetch(sources[0])
    with compute.capture() as graph:
        ready.wait(compute.address)
        driver.copy(result.address, slot.address, NUM_BYTES, compute)
    graph.instantiate()
    for seed, source in enumerate(sources):
        if seed > 0:
            free.record(compute.address)
            fetch(source)
        graph.launch(compute)
        compute.synchronize()
        assert driver.read(result.address, NUM_BYTES) == pattern(seed, NUM_BYTES)
    graph.destroy()
    engine.close()
    compute.destroy()


def test_captured_fetches_keep_their_memory_until_the_engine_is_closed(
    driver: Driver, device: _C.CudaDevice, standin: Standin
) -> None:
    compute = driver.stream()
    engine = _C.CudaCopyEngine(device, 1, 1)
    before = standin.live()["mappings"]
    source, slot = (mapped(driver, device, NUM_BYTES, seed=i) for i in range(2))
    slot_address = slot.address
    free, ready = _C.CudaEvent(device), _C.CudaEvent(device)
    with compute.capture() as graph:
        free.record(compute.address)
        copies = [[(slot.address, source.address, NUM_BYTES)]]
        engine.submit(engine.prepare(copies, [source, slot]), after=free, done=ready)
    graph.instantiate()
    del source, slot, copies
    gc.collect()
    graph.launch(compute)
    compute.synchronize()
    assert driver.read(slot_address, NUM_BYTES) == pattern(0, NUM_BYTES)
    graph.destroy()
    assert standin.live()["mappings"] == before + 2
    engine.close()
    assert standin.live()["mappings"] == before
    compute.destroy()


def test_lanes_of_a_captured_fetch_do_not_wait_for_each_other(
    driver: Driver, device: _C.CudaDevice
) -> None:
    """One chain of copy nodes per lane; neighbouring slices of a lane are one node."""
    compute = driver.stream()
    engine = _C.CudaCopyEngine(device, 3, 2)
    source, slot = (mapped(driver, device, 9000, seed=i) for i in range(2))
    neighbours = [(slot.address + i, source.address + i, 100) for i in range(0, 600, 100)]
    apart = [(slot.address + i, source.address + i, 100) for i in (1000, 1500)]
    fetch = engine.prepare([neighbours, apart], [source, slot])
    free, ready = _C.CudaEvent(device), _C.CudaEvent(device)
    with compute.capture() as graph:
        free.record(compute.address)
        engine.submit(fetch, after=free, done=ready)
        engine.submit(engine.prepare([]), after=free, done=ready)
    assert graph.num_nodes() == 3
    graph.instantiate().launch(compute)
    compute.synchronize()
    assert driver.read(slot.address, 600) == pattern(0, 9000)[:600]
    for start in (1000, 1500):
        assert driver.read(slot.address + start, 100) == pattern(0, 9000)[start : start + 100]
    graph.destroy()
    engine.close()
    compute.destroy()


@pytest.mark.usefixtures("late")
def test_captured_fetches_of_a_lane_run_in_the_order_of_submission(
    driver: Driver, device: _C.CudaDevice
) -> None:
    compute = driver.stream()
    engine = _C.CudaCopyEngine(device, 2, 1)
    sources = [mapped(driver, device, NUM_BYTES, seed=i) for i in range(4)]
    slot = mapped(driver, device, NUM_BYTES)
    half = NUM_BYTES // 2
    free, ready = _C.CudaEvent(device), _C.CudaEvent(device)
    with compute.capture() as graph:
        free.record(compute.address)
        for source in sources:
            lanes = [
                [(slot.address, source.address, half)],
                [(slot.address + half, source.address + half, half)],
            ]
            engine.submit(engine.prepare(lanes, [source, slot]), after=free, done=ready)
    graph.instantiate()
    for _ in range(6):
        driver.write(slot.address, bytes(NUM_BYTES))
        graph.launch(compute)
        compute.synchronize()
        assert driver.read(slot.address, NUM_BYTES) == pattern(3, NUM_BYTES)
    graph.destroy()
    engine.close()
    compute.destroy()


def test_other_threads_may_fetch_during_a_global_capture(
    driver: Driver, device: _C.CudaDevice
) -> None:
    """In that mode any thread's queries would end the capture, were they not exempted."""
    compute = driver.stream()
    engine = _C.CudaCopyEngine(device, 1, 1)
    source, slot = (mapped(driver, device, NUM_BYTES, seed=i) for i in range(2))
    fetch = engine.prepare([[(slot.address, source.address, NUM_BYTES)]], [source, slot])
    demand = engine.prepare_demand([[(slot.address, source.address, 16)]], [source, slot])
    outcome: list[object] = []

    def use_fabric() -> None:
        try:
            done = _C.CudaEvent(device)
            engine.submit(fetch, after=None, done=done)
            done.query()
            done.synchronize()
            outcome.append((done.num_waits, engine.demanded_bytes, engine.demand_waited_s))
        except BaseException as error:
            outcome.append(error)

    with compute.capture(cu.CAPTURE_GLOBAL) as graph:
        driver.copy(slot.address, source.address, 100, compute)
        thread = threading.Thread(target=use_fabric)
        thread.start()
        thread.join()
    assert outcome == [(0, 0, 0.0)]
    assert graph.num_nodes() == 1
    graph.destroy()
    engine.close()
    compute.destroy()
    assert demand.num_bytes == 16


def test_an_event_recorded_in_a_capture_means_nothing_outside(
    driver: Driver, device: _C.CudaDevice
) -> None:
    compute, other = driver.stream(), driver.stream()
    event = _C.CudaEvent(device)
    reached: list[str] = []
    with compute.capture() as graph:
        compute.call_host(lambda: reached.append("replayed"))
        event.record(compute.address)
        event.wait(other.address)
        assert event.query()
    other.call_host(lambda: reached.append("other"))
    other.synchronize()
    assert reached == ["other"]
    event.wait(compute.address)
    event.record(compute.address)
    event.synchronize()
    graph.destroy()
    for stream in (compute, other):
        stream.destroy()


@pytest.mark.parametrize("use", ["event", "engine", "range", "another event"])
def test_a_captured_stream_may_go_when_the_fabric_was_used_after_the_capture(
    driver: Driver, device: _C.CudaDevice, standin: Standin, use: str
) -> None:
    """No call is made with its handle then: a GPU's driver would not find out that it is gone."""
    compute, other = driver.stream(), driver.stream()
    engine = _C.CudaCopyEngine(device, 1, 1)
    source, slot, dropped = (mapped(driver, device, 4096, seed=i) for i in range(3))
    fetch = engine.prepare([[(slot.address, source.address, 4096)]], [source, slot])
    free, ready = _C.CudaEvent(device), _C.CudaEvent(device)
    with compute.capture() as graph:
        free.record(compute.address)
        engine.submit(fetch, after=free, done=ready)
        ready.wait(compute.address)
    graph.destroy()
    if use == "event":
        ready.wait(other.address)
    elif use == "another event":
        _C.CudaEvent(device).record(other.address)
    elif use == "range":
        dropped.close()
    else:
        engine.close()
    compute.destroy()
    before = standin.misuses("dead stream")
    if use != "engine":
        engine.submit(fetch, after=free, done=ready)  # for which no capture goes on any more
        ready.synchronize()
        assert driver.read(slot.address, 4096) == pattern(0, 4096)
    free.record(other.address)
    source.close()
    engine.close()
    other.destroy()
    assert standin.misuses("dead stream") == before


def test_one_event_serves_one_capture_after_another(driver: Driver, device: _C.CudaDevice) -> None:
    compute = driver.stream()
    engine = _C.CudaCopyEngine(device, 2, 1)
    source, slot, result = (mapped(driver, device, NUM_BYTES) for _ in range(3))
    lanes = random_lanes(random.Random(3), 2, slot.address, source.address, NUM_BYTES, 9000)
    fetch = engine.prepare(lanes, [source, slot])
    free, ready = _C.CudaEvent(device), _C.CudaEvent(device)
    graphs = [
        capture_step(driver, compute, engine, fetch, free, ready, slot, result) for _ in range(3)
    ]
    for seed, graph in enumerate(graphs):
        driver.write(source.address, pattern(seed, NUM_BYTES))
        graph.instantiate().launch(compute)
        compute.synchronize()
        assert driver.read(result.address, NUM_BYTES) == pattern(seed, NUM_BYTES)
        graph.destroy()
    engine.close()
    compute.destroy()


def capture_step(
    driver: Driver,
    compute: Stream,
    engine: _C.CudaCopyEngine,
    fetch: _C.CudaFetch,
    free: _C.CudaEvent,
    ready: _C.CudaEvent,
    slot: _C.CudaAddressRange,
    result: _C.CudaAddressRange,
) -> cu.Graph:
    with compute.capture() as graph:
        ready.wait(compute.address)
        free.record(compute.address)
        engine.submit(fetch, after=free, done=ready)
        ready.wait(compute.address)
        driver.copy(result.address, slot.address, NUM_BYTES, compute)
    return graph
