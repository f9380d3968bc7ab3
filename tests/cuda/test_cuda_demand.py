"""Fetching on demand: the experts that the device's indices name, and nothing else."""

from __future__ import annotations

import struct

import pytest
from cuda_support import mapped, pattern
from driver import Driver
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from standin import Standin

from dwdp import _C
from dwdp.fabric import FabricError

SPACE = 1 << 18
OF_LAST_TEST = bytes([0x5A])


class Experts:
    """Slices of experts in one buffer, and where they go in another: gathered here and by the device."""

    def __init__(self, driver: Driver, device: _C.CudaDevice, demand_blocks: int = 3) -> None:
        self.driver = driver
        self.device = device
        self.source = mapped(driver, device, SPACE, seed=1)
        self.target = mapped(driver, device, SPACE)
        self.indices = mapped(driver, device, 4096)
        self.contents = pattern(1, SPACE)
        self.stream = driver.stream()
        self.engine = _C.CudaCopyEngine(device, 1, 1, demand_blocks=demand_blocks)

    def close(self) -> None:
        self.engine.close()
        self.stream.destroy()

    def slices(self, sizes: list[list[int]], offset: int) -> list[list[tuple[int, int, int]]]:
        """One after the other, from ``offset`` on, and 16 bytes further in the source."""
        lists = []
        for of_expert in sizes:
            slices = []
            for num_bytes in of_expert:
                at = offset + 16
                slices.append((self.target.address + offset, self.source.address + at, num_bytes))
                offset += num_bytes
            lists.append(slices)
        assert offset + 16 <= SPACE
        return lists

    def gathered(self, lists: list[list[tuple[int, int, int]]], chosen: list[int]) -> bytes:
        """What the target holds after the experts in ``chosen`` were copied into clean memory."""
        expected = bytearray(OF_LAST_TEST * SPACE)
        for expert in set(chosen):
            if not 0 <= expert < len(lists):
                continue
            for dst, src, num_bytes in lists[expert]:
                to, start = dst - self.target.address, src - self.source.address
                expected[to : to + num_bytes] = self.contents[start : start + num_bytes]
        return bytes(expected)

    def write_indices(self, chosen: list[int], index_bytes: int) -> None:
        kind = {4: "i", 8: "q"}[index_bytes]
        if chosen:
            self.driver.write(self.indices.address, struct.pack(f"{len(chosen)}{kind}", *chosen))

    def fetch(self, demand: _C.CudaDemand, chosen: list[int], index_bytes: int = 4) -> bytes:
        """What the target holds afterwards; it was clean before."""
        self.driver.fill(self.target.address, OF_LAST_TEST[0], SPACE, self.stream)
        self.write_indices(chosen, index_bytes)
        self.engine.fetch_activated(
            demand, self.indices.address, len(chosen), index_bytes, self.stream.address
        )
        self.stream.synchronize()
        return self.driver.read(self.target.address, SPACE)


@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_fetched_is_what_the_indices_name(
    driver: Driver, device: _C.CudaDevice, data: st.DataObject
) -> None:
    sizes = data.draw(
        st.lists(
            st.lists(st.integers(1, 9000) | st.integers(1, 40), max_size=3), max_size=40
        ).filter(lambda lists: sum(map(sum, lists)) < SPACE - 64)
    )
    offset = data.draw(st.integers(0, 31))
    blocks = data.draw(st.integers(1, 5))
    index_bytes = data.draw(st.sampled_from([4, 8]))
    chosen = data.draw(st.lists(st.integers(-2, len(sizes) + 2), max_size=60))
    experts = Experts(driver, device, blocks)
    lists = experts.slices(sizes, offset)
    demand = experts.engine.prepare_demand(lists, [experts.source, experts.target])
    assert demand.num_experts == len(sizes)
    assert demand.num_bytes == sum(map(sum, sizes))
    assert experts.fetch(demand, chosen, index_bytes) == experts.gathered(lists, chosen)
    in_range = {expert for expert in chosen if 0 <= expert < len(sizes)}
    assert experts.engine.demanded_bytes == sum(sum(sizes[expert]) for expert in in_range)
    experts.close()


def test_large_slices_are_shared_out_in_tiles(driver: Driver, device: _C.CudaDevice) -> None:
    """65536 bytes are a tile: some slices have several, with ends that are no whole vector."""
    experts = Experts(driver, device, demand_blocks=2)
    lists = experts.slices([[65536 + 7], [3], [2 * 65536 + 15], [40_000]], offset=5)
    demand = experts.engine.prepare_demand(lists)
    for chosen in ([2], [0, 1], [3, 2, 1, 0]):
        assert experts.fetch(demand, chosen) == experts.gathered(lists, chosen)
    experts.close()


def test_what_follows_in_the_stream_finds_the_experts(
    driver: Driver, device: _C.CudaDevice
) -> None:
    """Without the host: indices are computed by the stream, and the result used by it."""
    experts = Experts(driver, device)
    lists = experts.slices([[5000], [5000], [5000]], offset=0)
    demand = experts.engine.prepare_demand(lists)
    chosen, result = mapped(driver, device, 4096), mapped(driver, device, 5000)
    driver.write(chosen.address, struct.pack("i", 1))
    device.spin(experts.stream.address, 200_000_000)
    driver.copy(experts.indices.address, chosen.address, 4, experts.stream)
    experts.engine.fetch_activated(demand, experts.indices.address, 1, 4, experts.stream.address)
    driver.copy(result.address, experts.target.address + 5000, 5000, experts.stream)
    assert not experts.stream.idle()
    experts.stream.synchronize()
    assert driver.read(result.address, 5000) == experts.contents[5016:10016]
    assert experts.engine.demanded_bytes == 5000
    assert 0.0 <= experts.engine.demand_waited_s < 10.0
    experts.close()


def test_a_captured_demand_reads_the_indices_of_each_replay(
    driver: Driver, device: _C.CudaDevice
) -> None:
    experts = Experts(driver, device)
    lists = experts.slices([[100], [200], [300], [400]], offset=3)
    demand = experts.engine.prepare_demand(lists, [experts.source, experts.target])
    with experts.stream.capture() as graph:
        experts.engine.fetch_activated(
            demand, experts.indices.address, 2, 8, experts.stream.address
        )
    del demand  # the engine keeps what is captured
    graph.instantiate()
    for chosen in ([0, 2], [3, 3], [-1, 1]):
        driver.fill(experts.target.address, OF_LAST_TEST[0], SPACE, experts.stream)
        experts.write_indices(chosen, 8)
        graph.launch(experts.stream)
        experts.stream.synchronize()
        found = driver.read(experts.target.address, SPACE)
        assert found == experts.gathered(lists, chosen)
    assert experts.engine.demanded_bytes == 0  # replays are not counted
    graph.destroy()
    experts.close()


def test_bad_demands_are_refused(driver: Driver, device: _C.CudaDevice) -> None:
    experts = Experts(driver, device)
    dst, src = experts.target.address, experts.source.address
    engine = experts.engine
    with pytest.raises(FabricError, match=r"expert 1 .* remainders modulo 16 differ"):
        engine.prepare_demand([[], [(dst, src + 8, 32)]])
    with pytest.raises(FabricError, match="must not be zero"):
        engine.prepare_demand([[(dst, src, 0)]])
    demand = engine.prepare_demand([[(dst, src, 16)]])
    with pytest.raises(FabricError, match="4 or 8 bytes each, not 2"):
        engine.fetch_activated(demand, experts.indices.address, 1, 2, experts.stream.address)
    with pytest.raises(FabricError, match="at address 0"):
        engine.fetch_activated(demand, 0, 1, 4, experts.stream.address)
    for blocks in (0, 1 << 20):
        with pytest.raises(FabricError, match="blocks"):
            _C.CudaCopyEngine(device, 1, 1, demand_blocks=blocks)
    experts.close()
    with pytest.raises(FabricError, match="closed copy engine"):
        engine.fetch_activated(demand, experts.indices.address, 1, 4, experts.stream.address)


def test_a_demand_is_one_launch(driver: Driver, device: _C.CudaDevice, standin: Standin) -> None:
    experts = Experts(driver, device)
    demand = experts.engine.prepare_demand(experts.slices([[100]] * 8, offset=0))
    experts.fetch(demand, [1])
    names = ("cuMemAlloc", "cuModuleLoadData", "cuStreamSynchronize", "cuEventSynchronize")
    before = [standin.calls(name) for name in names]
    launches = standin.calls("cuLaunchKernel")
    experts.engine.fetch_activated(demand, experts.indices.address, 1, 4, experts.stream.address)
    assert standin.calls("cuLaunchKernel") == launches + 1
    assert [standin.calls(name) for name in names] == before
    experts.close()
