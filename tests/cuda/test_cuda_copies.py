"""Events and copy engines of the CUDA fabric: order, whatever is late."""

from __future__ import annotations

import random
import threading

import cuda_processes as processes
import pytest
from cuda_support import mapped, pattern, random_lanes
from driver import Driver
from standin import Standin

from dwdp import _C
from dwdp.fabric import FabricError

LATE_NS = 200_000_000


def jitter(standin: Standin | None, longest_us: int, seed: int = 0) -> None:
    """Let everything start late by random times; a GPU has to do with its own."""
    if standin is not None:
        standin.set("SEED", seed)
        standin.set("JITTER_US", longest_us)


# Events


def test_an_event_is_complete_before_anything_was_issued(
    driver: Driver, device: _C.CudaDevice
) -> None:
    stream = driver.stream()
    event = _C.CudaEvent(device)
    assert event.query()
    event.synchronize()
    event.wait(stream.address)
    event.record(stream.address)
    event.synchronize()
    assert event.query()
    assert event.num_waits == 0 and event.waited_s == 0.0
    stream.destroy()


def test_a_stream_waits_for_the_generation_before_and_the_host_does_not(
    driver: Driver, device: _C.CudaDevice
) -> None:
    first, second = driver.stream(), driver.stream()
    event = _C.CudaEvent(device)
    order: list[str] = []
    device.spin(first.address, LATE_NS)
    first.call_host(lambda: order.append("first"))
    event.record(first.address)
    event.wait(second.address)
    second.call_host(lambda: order.append("second"))
    assert not event.query()
    assert order == []
    second.synchronize()
    assert order == ["first", "second"]
    assert event.query()
    assert event.num_waits == 1
    assert 0.0 < event.waited_s < 10.0
    for stream in (first, second):
        stream.destroy()


def test_a_generation_completes_after_all_before_it_also_of_other_streams(
    driver: Driver, device: _C.CudaDevice
) -> None:
    slow, quick = driver.stream(), driver.stream()
    event = _C.CudaEvent(device)
    reached: list[bool] = []
    device.spin(slow.address, LATE_NS)
    slow.call_host(lambda: reached.append(True))
    event.record(slow.address)
    event.record(quick.address)
    event.synchronize()
    assert reached
    for stream in (slow, quick):
        stream.destroy()


def test_waiting_in_the_host_leaves_python_running(driver: Driver, device: _C.CudaDevice) -> None:
    """A host function of the stream needs the interpreter, which the waiting thread must not hold."""
    stream = driver.stream()
    event = _C.CudaEvent(device)
    engine = _C.CudaCopyEngine(device, 1, 1)
    done = _C.CudaEvent(device)
    reached = threading.Event()
    stream.call_host(reached.set)
    event.record(stream.address)
    engine.submit(engine.prepare([]), after=event, done=done)
    engine.close()
    event.synchronize()
    assert reached.is_set()
    stream.destroy()


# Copy engines


def test_fetches_into_one_place_follow_each_other_by_their_events(
    driver: Driver, device: _C.CudaDevice
) -> None:
    """Of one engine or of two. Sources never change, and may be read at any time."""
    num_bytes = 300_000
    sources = [mapped(driver, device, num_bytes, seed=i) for i in range(4)]
    target = mapped(driver, device, num_bytes)
    engines = [_C.CudaCopyEngine(device, *shape) for shape in ((1, 1), (3, 2))]
    events = [_C.CudaEvent(device) for _ in range(5)]
    stream = driver.stream()
    device.spin(stream.address, LATE_NS)
    events[0].record(stream.address)
    rng = random.Random(1)
    for i, source in enumerate(sources):
        engine = engines[i % 2]
        lanes = random_lanes(
            rng, engine.num_lanes, target.address, source.address, num_bytes, 40_000
        )
        engine.submit(engine.prepare(lanes, [source, target]), after=events[i], done=events[i + 1])
        assert not events[i + 1].query()
    events[4].synchronize()
    assert driver.read(target.address, num_bytes) == pattern(3, num_bytes)
    for engine in engines:
        engine.close()
    stream.destroy()


def test_one_call_of_the_driver_for_the_slices_of_a_stream(
    driver: Driver, device: _C.CudaDevice, standin: Standin
) -> None:
    num_bytes = 200 * 100
    source, target = (mapped(driver, device, num_bytes, seed=i) for i in range(2))
    engine = _C.CudaCopyEngine(device, 3, 2)
    assert engine.uses_batch_copies
    rng = random.Random(2)
    lanes = random_lanes(rng, 3, target.address, source.address, num_bytes, 100)
    fetch = engine.prepare(lanes, [source, target])
    assert (fetch.num_slices, fetch.num_bytes) == (sum(map(len, lanes)), num_bytes)
    done = _C.CudaEvent(device)
    names = ("cuMemcpyBatchAsync", "cuMemcpyAsync", "cuMemAlloc", "cuEventCreate", "cuStreamCreate")
    before = [standin.calls(name) for name in names]
    for _ in range(2):
        engine.submit(fetch, after=None, done=done)
    assert [standin.calls(name) - count for name, count in zip(names, before, strict=True)] == [
        2 * 6,
        0,
        0,
        0,
        0,
    ]
    done.synchronize()
    assert driver.read(target.address, num_bytes) == pattern(0, num_bytes)
    engine.close()


@pytest.mark.parametrize("lanes", [[], [[]], [[], [], []]], ids=str)
def test_an_empty_fetch_completes_in_its_turn(
    driver: Driver, device: _C.CudaDevice, lanes: list[list[tuple[int, int, int]]]
) -> None:
    stream = driver.stream()
    before, done = _C.CudaEvent(device), _C.CudaEvent(device)
    engine = _C.CudaCopyEngine(device, 3, 1)
    device.spin(stream.address, LATE_NS)
    before.record(stream.address)
    engine.submit(engine.prepare(lanes), after=before, done=done)
    assert not done.query()
    done.synchronize()
    assert before.query()
    engine.close()
    stream.destroy()


def test_bad_fetches_are_refused(driver: Driver, device: _C.CudaDevice) -> None:
    memory = mapped(driver, device, 4096)
    start = memory.address
    engine = _C.CudaCopyEngine(device, 2, 1)
    with pytest.raises(FabricError, match="a fetch of 3 lanes does not fit a copy engine of 2"):
        engine.prepare([[], [], []])
    with pytest.raises(FabricError, match="must not be zero"):
        engine.prepare([[(start, start + 64, 0)]])
    with pytest.raises(FabricError, match=r"lane 1 of a fetch .* which overlap"):
        engine.prepare([[], [(start, start + 8, 9)]])
    wide = _C.CudaCopyEngine(device, 3, 1).prepare([[(start, start + 64, 8)]] * 3)
    with pytest.raises(FabricError, match="does not fit a copy engine"):
        engine.submit(wide, after=None, done=_C.CudaEvent(device))
    for num_lanes, depth in ((0, 1), (1, 0)):
        with pytest.raises(FabricError, match="at least one lane"):
            _C.CudaCopyEngine(device, num_lanes, depth)
    fetch = engine.prepare([])
    done = _C.CudaEvent(device)
    with pytest.raises(TypeError):
        engine.submit(fetch, after=None, done=None)  # type: ignore[arg-type]
    engine.close()
    engine.close()
    with pytest.raises(FabricError, match="closed copy engine"):
        engine.submit(fetch, after=None, done=done)


def test_close_finishes_what_was_submitted(driver: Driver, device: _C.CudaDevice) -> None:
    num_bytes = 100_000
    source, target = (mapped(driver, device, num_bytes, seed=i) for i in range(2))
    stream = driver.stream()
    late, done = _C.CudaEvent(device), _C.CudaEvent(device)
    device.spin(stream.address, LATE_NS)
    late.record(stream.address)
    engine = _C.CudaCopyEngine(device, 2, 1)
    copies = [[(target.address, source.address, num_bytes)]]
    engine.submit(engine.prepare(copies, [source, target]), after=late, done=done)
    del copies
    engine.close()
    assert done.query()
    assert driver.read(target.address, num_bytes) == pattern(0, num_bytes)
    stream.destroy()


def test_a_fetch_keeps_its_memory_mapped(
    driver: Driver, device: _C.CudaDevice, standin: Standin
) -> None:
    source, target = (mapped(driver, device, 4096, seed=i) for i in range(2))
    engine, done = _C.CudaCopyEngine(device, 1, 1), _C.CudaEvent(device)
    fetch = engine.prepare([[(target.address, source.address, 4096)]], [source, target])
    address = target.address
    source.close()
    target.close()
    engine.submit(fetch, after=None, done=done)
    done.synchronize()
    assert driver.read(address, 4096) == pattern(0, 4096)
    num_mappings = standin.live()["mappings"]
    del fetch
    assert standin.live()["mappings"] == num_mappings - 2
    engine.close()


# The ring of slots


class Ring:
    """Slots filled and read as the pipeline does, by an engine and a stream of compute.

    Compute copies each slot to a place of its own, so that the host can run ahead and look at the end.
    """

    NUM_LAYERS, NUM_BYTES = 5, 100_000

    def __init__(
        self, driver: Driver, device: _C.CudaDevice, num_slots: int, num_lanes: int, depth: int
    ) -> None:
        self.driver, self.device = driver, device
        self.rng = random.Random(num_slots * 100 + num_lanes * 10 + depth)
        self.compute = driver.stream()
        self.engine = _C.CudaCopyEngine(device, num_lanes, depth)
        self.layers = [
            mapped(driver, device, self.NUM_BYTES, seed=i) for i in range(self.NUM_LAYERS)
        ]
        self.slots = [mapped(driver, device, self.NUM_BYTES) for _ in range(num_slots)]
        self.ready = [_C.CudaEvent(device) for _ in range(num_slots)]
        self.free = [_C.CudaEvent(device) for _ in range(num_slots)]

    def fetch(self, step: int, wait_for_free: bool) -> None:
        slot, layer = step % len(self.slots), step % self.NUM_LAYERS
        lanes = random_lanes(
            self.rng,
            self.engine.num_lanes,
            self.slots[slot].address,
            self.layers[layer].address,
            self.NUM_BYTES,
            30_000,
        )
        fetch = self.engine.prepare(lanes)
        after = self.free[slot] if wait_for_free else None
        self.engine.submit(fetch, after=after, done=self.ready[slot])

    def wrong_steps(
        self, num_steps: int, *, wait_for_free: bool = True, wait_for_ready: bool = True
    ) -> list[int]:
        """Steps in which compute found other bytes than its layer's."""
        results = self.driver.allocate(num_steps * self.NUM_BYTES)
        for step in range(len(self.slots)):
            self.fetch(step, wait_for_free)
        for step in range(num_steps):
            slot = step % len(self.slots)
            if wait_for_ready:
                self.ready[slot].wait(self.compute.address)
            self.device.spin(self.compute.address, self.rng.randrange(1_000_000))
            self.driver.copy(
                results + step * self.NUM_BYTES,
                self.slots[slot].address,
                self.NUM_BYTES,
                self.compute,
            )
            self.free[slot].record(self.compute.address)
            self.fetch(step + len(self.slots), wait_for_free)
        self.engine.close()
        self.compute.synchronize()
        found = self.driver.read(results, num_steps * self.NUM_BYTES)
        self.driver.free(results)
        self.compute.destroy()
        expected = [pattern(layer, self.NUM_BYTES) for layer in range(self.NUM_LAYERS)]
        return [
            step
            for step in range(num_steps)
            if found[step * self.NUM_BYTES : (step + 1) * self.NUM_BYTES]
            != expected[step % self.NUM_LAYERS]
        ]


@pytest.mark.parametrize("num_slots", [2, 3])
@pytest.mark.parametrize(("num_lanes", "depth"), [(1, 1), (1, 3), (3, 1), (4, 2)])
def test_the_ring_has_no_hazard_however_late_things_are(
    driver: Driver,
    device: _C.CudaDevice,
    loaded_standin: Standin | None,
    num_slots: int,
    num_lanes: int,
    depth: int,
) -> None:
    jitter(loaded_standin, 2000, seed=num_lanes)
    ring = Ring(driver, device, num_slots, num_lanes, depth)
    try:
        assert ring.wrong_steps(60) == []
    finally:
        jitter(loaded_standin, 0)


@pytest.mark.parametrize("missing", ["free", "ready"])
def test_without_either_wait_reads_are_wrong(
    driver: Driver, device: _C.CudaDevice, standin: Standin, missing: str
) -> None:
    """What the test above finds, when the protocol has a hole."""
    jitter(standin, 2000)
    ring = Ring(driver, device, 2, 3, 1)
    assert ring.wrong_steps(60, wait_for_free=missing != "free", wait_for_ready=missing != "ready")


@pytest.mark.parametrize("seed", range(4))
def test_random_programs_match_a_plain_reference(
    driver: Driver, device: _C.CudaDevice, loaded_standin: Standin | None, seed: int
) -> None:
    """Copies between random buffers, each after whatever touched its buffers last."""
    rng = random.Random(seed)
    num_buffers, num_bytes = 5, 60_000
    buffers = [mapped(driver, device, num_bytes, seed=i) for i in range(num_buffers)]
    reference = [bytearray(pattern(i, num_bytes)) for i in range(num_buffers)]
    engines = [_C.CudaCopyEngine(device, n, rng.randint(1, 3)) for n in (1, rng.randint(2, 4))]
    last = _C.CudaEvent(device)
    jitter(loaded_standin, 500, seed)
    try:
        for _ in range(80):
            src, dst = rng.sample(range(num_buffers), 2)
            start = rng.randrange(num_bytes)
            length = rng.randint(1, num_bytes - start)
            engine = rng.choice(engines)
            lanes = random_lanes(
                rng,
                engine.num_lanes,
                buffers[dst].address + start,
                buffers[src].address + start,
                length,
                20_000,
            )
            reference[dst][start : start + length] = reference[src][start : start + length]
            # Sources change here, so their order counts: the host waits.
            last.synchronize()
            engine.submit(engine.prepare(lanes), after=last, done=last)
        last.synchronize()
    finally:
        jitter(loaded_standin, 0)
    for buffer, expected in zip(buffers, reference, strict=True):
        assert driver.read(buffer.address, num_bytes) == expected
    for engine in engines:
        engine.close()


# Other drivers


@pytest.mark.parametrize(
    ("version", "hidden", "batch"),
    [
        (13000, "", True),
        (12080, "", True),
        (12060, "", False),
        (12020, "", False),
        (13000, "cuMemcpyBatchAsync", False),
    ],
)
@pytest.mark.usefixtures("standin", "device")
def test_older_drivers_copy_and_capture_by_their_own_calls(
    version: int, hidden: str, batch: bool
) -> None:
    """A batch copy with another signature, or none; capture information without edge data.

    None is asked for what is newer than itself: compute-sanitizer counts that as an error.
    """
    outcome = processes.outcome_of("fetch_twice", {"DRIVER_VERSION": version, "HIDE": hidden})
    assert outcome == ("copied", (version // 1000, version % 1000 // 10), batch, 0)
