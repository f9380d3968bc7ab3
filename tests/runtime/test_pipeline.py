"""The ring: slot assignment, and no hazard whatever the order and the timing of layers."""

from __future__ import annotations

import random
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dwdp.fabric import create_fabric
from dwdp.fabric.base import Copy
from dwdp.pipeline import Pipeline, PreparedLayer, assign_slots


@given(num_layers=st.integers(2, 200), num_slots=st.integers(2, 12))
def test_cyclic_neighbours_never_share_a_slot(num_layers: int, num_slots: int) -> None:
    slots = assign_slots(num_layers, num_slots)
    assert len(slots) == num_layers
    for layer in range(num_layers):
        assert slots[layer] != slots[(layer + 1) % num_layers]
    odd_with_two = num_layers % 2 == 1 and num_slots == 2
    assert max(slots) < num_slots + odd_with_two
    assert set(slots) == set(range(max(slots) + 1))


def test_one_layer_needs_one_slot() -> None:
    assert assign_slots(1, 2) == (0,)


def test_a_ring_of_one_slot_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        assign_slots(4, 1)


class Ring:
    """A pipeline over the host fabric whose layer i holds the byte i + 1 everywhere."""

    def __init__(self, num_layers: int, num_slots: int, num_bytes: int, num_lanes: int) -> None:
        self.fabric = create_fabric("host")
        pages = -(-num_bytes // self.fabric.granularity) * self.fabric.granularity
        self.slots = assign_slots(num_layers, num_slots)
        self._memory = []
        sources = [self._range(pages, layer + 1) for layer in range(num_layers)]
        targets = [self._range(pages, 0) for _ in range(max(self.slots) + 1)]
        self.views = [target.bytes_tensor(0, num_bytes) for target in targets]
        self.engine = self.fabric.copy_engine(num_lanes, 2)
        self.layers = []
        for layer in range(num_layers):
            source, target = sources[layer], targets[self.slots[layer]]
            cuts = [num_bytes * lane // num_lanes for lane in range(num_lanes + 1)]
            lanes = [
                [Copy(target.address + start, source.address + start, stop - start)]
                for start, stop in pairwise(cuts)
            ]
            fetch = self.engine.prepare(lanes, [source, target])
            self.layers.append(PreparedLayer(fetch, num_bytes))
        self.pipeline = Pipeline(self.fabric, self.engine, self.layers, self.slots)

    def _range(self, num_bytes: int, value: int):
        region = self.fabric.allocate(num_bytes)
        memory = self.fabric.reserve(num_bytes)
        memory.map(0, region)
        memory.enable_access(writable=True)
        memory.bytes_tensor(0, num_bytes).fill_(value)
        self._memory.append((region, memory))
        return memory

    def read(self, layer: int) -> set[int]:
        """The smallest and the largest byte of the layer's slot, as its kernel would see them."""
        view = self.views[self.slots[layer]]
        return {int(view.min()), int(view.max())}

    def run(self, layer: int, pause_s: float = 0.0) -> None:
        self.pipeline.begin(layer)
        before = self.read(layer)
        time.sleep(pause_s)
        assert before == self.read(layer) == {layer + 1}
        self.pipeline.end(layer)

    def close(self) -> None:
        self.pipeline.close()
        self.fabric.close()


@settings(max_examples=25)
@given(
    num_layers=st.integers(1, 9),
    num_slots=st.integers(2, 4),
    num_lanes=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_forwards_in_order_read_what_was_fetched(
    num_layers: int, num_slots: int, num_lanes: int, seed: int
) -> None:
    jitter = random.Random(seed)
    ring = Ring(num_layers, num_slots, 200_000, num_lanes)
    ring.pipeline.start()
    for _ in range(4):
        for layer in range(num_layers):
            ring.run(layer, pause_s=jitter.choice((0, 0, 0.0005)))
    # The first fetches, and one at each end of a layer that shares its slot: none in begin().
    num_sharing = sum(ring.slots.count(slot) > 1 for slot in ring.slots)
    assert ring.pipeline.stats.num_fetches == ring.pipeline.num_slots + 4 * num_sharing
    ring.close()


@settings(max_examples=25)
@given(st.data())
def test_layers_in_any_order_read_their_own_experts(data: st.DataObject) -> None:
    num_layers = data.draw(st.integers(1, 6))
    ring = Ring(num_layers, data.draw(st.integers(2, 3)), 100_000, 2)
    ring.pipeline.start()
    for layer in data.draw(st.lists(st.integers(0, num_layers - 1), max_size=20)):
        ring.run(layer)
    ring.close()


def test_a_layer_that_keeps_its_slot_is_fetched_once() -> None:
    ring = Ring(num_layers=2, num_slots=2, num_bytes=4096, num_lanes=1)
    ring.pipeline.start()
    for _ in range(5):
        ring.run(0)
        ring.run(1)
    assert ring.pipeline.stats.num_fetches == 2
    assert ring.pipeline.stats.fetched_bytes == 2 * 4096
    ring.close()


def test_the_next_forward_is_fetched_while_this_one_ends() -> None:
    ring = Ring(num_layers=4, num_slots=2, num_bytes=4096, num_lanes=1)
    ring.pipeline.start()
    for layer in range(4):
        ring.run(layer)
    # Both slots were given to layers 0 and 1 of the next forward when 2 and 3 ended.
    assert ring.pipeline.stats.num_fetches == 6
    ring.close()


def test_a_slot_is_not_refilled_under_its_reader() -> None:
    ring = Ring(num_layers=4, num_slots=2, num_bytes=1 << 20, num_lanes=2)
    ring.pipeline.start()
    ring.pipeline.begin(0)
    with pytest.raises(RuntimeError, match="layer 2 was started while layer 0 still reads slot 0"):
        ring.pipeline.begin(2)
    assert ring.read(0) == {1}
    ring.pipeline.end(0)
    ring.run(2)
    ring.close()


def test_parts_of_a_layer_wait_for_the_same_fetch() -> None:
    ring = Ring(num_layers=4, num_slots=2, num_bytes=1 << 20, num_lanes=2)
    ring.pipeline.start()
    for layer in (0, 1, 2, 3, 0, 2, 2):
        for _ in range(3):
            ring.pipeline.begin(layer)
            assert ring.read(layer) == {layer + 1}
        ring.pipeline.end(layer)
    # The first two, one at each of the seven ends, and one of the repeated layer, its second time.
    assert ring.pipeline.stats.num_fetches == 2 + 7 + 1
    ring.close()


def test_parts_of_a_layer_that_is_captured_are_fetched_once() -> None:
    ring = Ring(num_layers=3, num_slots=2, num_bytes=4096, num_lanes=1)
    ring.pipeline.start()
    ring.fabric.is_capturing = lambda: True
    for layer in range(3):
        ring.pipeline.begin(layer)
        before = ring.pipeline.stats.num_fetches
        ring.pipeline.begin(layer)
        assert ring.pipeline.stats.num_fetches == before
        assert ring.read(layer) == {layer + 1}
        ring.pipeline.end(layer)
    ring.close()


def test_after_a_capture_no_forward_relies_on_what_another_left() -> None:
    """A replayed graph refills slots unseen: here they are scribbled over between forwards."""
    ring = Ring(num_layers=5, num_slots=2, num_bytes=4096, num_lanes=1)
    capturing = False
    ring.fabric.is_capturing = lambda: capturing
    ring.pipeline.start()
    for step in range(6):
        capturing = step in (2, 4)
        for layer in range(5):
            ring.run(layer)
        if step >= 2:
            for view in ring.views:
                view.fill_(99)
    ring.close()


def test_memory_outlives_a_fetch_that_nobody_waits_for() -> None:
    """Dropping everything while copies are under way must not take the memory from under them."""
    for _ in range(20):
        ring = Ring(num_layers=4, num_slots=2, num_bytes=8 << 20, num_lanes=2)
        ring.pipeline.start()
        del ring


def test_without_the_free_event_the_hazard_is_real() -> None:
    """What test_a_slot_is_not_refilled_under_its_reader would see of a fetch that does not wait."""
    ring = Ring(num_layers=4, num_slots=2, num_bytes=1 << 20, num_lanes=1)
    ring.pipeline.start()
    ring.pipeline.begin(0)
    done = ring.fabric.event()
    ring.engine.submit(ring.layers[2].fetch, after=None, done=done)
    done.wait()
    assert ring.read(0) == {3}
    ring.pipeline.end(0)
    ring.close()
