"""Regions and address ranges of the host fabric, within one process and across several."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import fabric_peers as peers
import pytest
import torch

from dwdp.fabric import Copy, Fabric, FabricError, Region, create_fabric

F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW = 1, 2, 4


@pytest.fixture
def fabric() -> Iterator[Fabric]:
    fabric = create_fabric("host")
    yield fabric
    fabric.close()


def test_region_is_zeroed_memory(fabric: Fabric) -> None:
    num_bytes = 3 * fabric.granularity
    region = fabric.allocate(num_bytes)
    assert region.num_bytes == num_bytes
    address_range = fabric.reserve(num_bytes)
    address_range.map(0, region)
    address_range.enable_access(writable=True)
    view = address_range.bytes_tensor(0, num_bytes)
    assert view.dtype == torch.uint8
    assert view.shape == (num_bytes,)
    assert view.data_ptr() == address_range.address
    assert not view.any()


def test_region_size_is_sealed(fabric: Fabric) -> None:
    before = set(peers.region_descriptors())
    region = fabric.allocate(2 * fabric.granularity)
    [fd] = set(peers.region_descriptors()) - before
    assert peers.seals_of(fd) & 7 == F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW
    for num_bytes in (0, fabric.granularity, 3 * fabric.granularity):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, num_bytes)
    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    region.close()
    region.close()
    assert fd not in peers.region_descriptors()


@pytest.mark.parametrize("num_bytes", [0, 1, 4095, -4096])
def test_region_size_must_be_a_multiple_of_the_granularity(fabric: Fabric, num_bytes: int) -> None:
    with pytest.raises((FabricError, TypeError)):
        fabric.allocate(num_bytes)


def test_region_larger_than_memory_is_an_error_with_both_sizes(fabric: Fabric) -> None:
    with pytest.raises(FabricError, match=r"1125899906842624 bytes is wanted, but only \d+ bytes"):
        fabric.allocate(1 << 50)


def test_range_refuses_what_does_not_fit(fabric: Fabric) -> None:
    page = fabric.granularity
    region = fabric.allocate(2 * page)
    address_range = fabric.reserve(4 * page)
    with pytest.raises(FabricError, match=f"offset 8 is not a multiple of {page}"):
        address_range.map(8, region)
    with pytest.raises(FabricError, match="does not fit"):
        address_range.map(3 * page, region)
    address_range.map(page, region)
    for offset in (0, page, 2 * page):
        with pytest.raises(FabricError, match="overlaps one that is mapped there already"):
            address_range.map(offset, region)
    with pytest.raises(FabricError, match="reaches past the end"):
        address_range.bytes_tensor(page, 4 * page)
    region.close()
    with pytest.raises(FabricError, match="region of 8192 bytes is closed"):
        fabric.reserve(2 * page).map(0, region)
    address_range.close()
    with pytest.raises(FabricError, match="address range of 16384 bytes is closed"):
        address_range.bytes_tensor(0, page)
    with pytest.raises(FabricError, match="address range of 16384 bytes is closed"):
        address_range.enable_access(writable=True)


def test_ranges_may_be_far_larger_than_memory(fabric: Fabric) -> None:
    num_bytes = 1 << 40
    address_range = fabric.reserve(num_bytes)
    region = fabric.allocate(fabric.granularity)
    address_range.map(num_bytes - fabric.granularity, region)
    address_range.enable_access(writable=True)
    view = address_range.bytes_tensor(num_bytes - 5, 5)
    view.fill_(3)
    assert view.sum() == 15


def test_tensors_keep_the_range_mapped(fabric: Fabric) -> None:
    page = fabric.granularity
    mappings = peers.num_region_mappings()
    region = fabric.allocate(page)
    address_range = fabric.reserve(2 * page)
    address_range.map(page, region)
    address_range.enable_access(writable=True)
    view = address_range.bytes_tensor(page, page).view(torch.float32)[:4]
    region.close()
    address_range.close()
    del address_range, region
    gc.collect()
    view.fill_(1.5)
    assert view.tolist() == [1.5] * 4
    assert peers.num_region_mappings() == mappings + 1
    del view
    gc.collect()
    assert peers.num_region_mappings() == mappings


def test_capsule_that_nobody_consumes_is_freed(fabric: Fabric) -> None:
    mappings = peers.num_region_mappings()
    address_range = fabric.reserve(fabric.granularity)
    address_range.map(0, fabric.allocate(fabric.granularity))
    address_range.enable_access(writable=True)
    capsule = address_range.bytes_capsule(0, 16)  # type: ignore[attr-defined]
    address_range.close()
    assert peers.num_region_mappings() == mappings + 1
    del capsule
    assert peers.num_region_mappings() == mappings


def test_pieces_of_several_processes_compose_one_range(fabric: Fabric) -> None:
    """Own pieces and those of two peers, in mixed order, are bit for bit the whole."""
    page = fabric.granularity
    num_pages = [3, 1, 2, 5, 1, 4]
    owner = [0, 1, 2, 1, 0, 2]  # 0: this process
    total = sum(num_pages) * page
    address_range = fabric.reserve(total)
    exporters = {}
    pieces: dict[int, Region] = {}
    for rank in (1, 2):
        mine = [i for i in range(6) if owner[i] == rank]
        pages = [num_pages[i] for i in mine]
        exporters[rank] = peers.start(peers.export_pieces, mine, pages)
        sizes = [p * page for p in pages]
        address = exporters[rank][2]
        regions = peers.fetch(fabric, address, "pieces", sizes)
        assert [region.num_bytes for region in regions] == sizes
        pieces.update(zip(mine, regions, strict=True))
    offsets = [sum(num_pages[:i]) * page for i in range(6)]
    for i in range(6):
        region = pieces[i] if owner[i] else fabric.allocate(num_pages[i] * page)
        address_range.map(offsets[i], region)
        if owner[i] == 0:
            own_range = fabric.reserve(region.num_bytes)
            own_range.map(0, region)
            own_range.enable_access(writable=True)
            own = own_range.bytes_tensor(0, region.num_bytes)
            own.copy_(peers.pattern(i, num_pages[i] * page))
        region.close()
    address_range.enable_access(writable=False)
    whole = address_range.bytes_tensor(0, total)
    expected = torch.cat([peers.pattern(i, num_pages[i] * page) for i in range(6)])
    assert torch.equal(whole, expected)

    # It is the same memory: what a peer writes later shows.
    process, connection, _ = exporters[1]
    connection.send((1, 77))
    assert connection.recv() == "written"
    expected[offsets[3] : offsets[4]] = 77
    assert torch.equal(whole, expected)
    for process, connection, _ in exporters.values():
        connection.send("stop")
        process.join(20.0)
        assert process.exitcode == 0
    assert torch.equal(whole, expected)


@pytest.mark.parametrize("write", [False, True])
def test_writing_to_a_peers_region_faults(fabric: Fabric, write: bool) -> None:
    address, num_bytes = peers.export_one(fabric)
    process, _, total = peers.start(peers.write_to_imported, address, num_bytes, write)
    assert total == 0
    process.join(20.0)
    assert process.exitcode == (-signal.SIGSEGV if write else 0)


def test_imported_regions_are_read_only_by_descriptor_too(fabric: Fabric) -> None:
    address, num_bytes = peers.export_one(fabric)
    before = set(peers.region_descriptors())
    [region] = peers.fetch(fabric, address, "pieces", [num_bytes])
    [fd] = set(peers.region_descriptors()) - before
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    address_range = fabric.reserve(num_bytes)
    address_range.map(0, region)
    with pytest.raises(FabricError, match="received from a peer: it is read-only, not writable"):
        address_range.enable_access(writable=True)
    address_range.enable_access(writable=False)


def test_killed_exporter_leaves_its_memory_to_peers_and_nothing_else(
    fabric: Fabric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    shared_memory = set(os.listdir("/dev/shm"))
    page = fabric.granularity
    process, _, address = peers.start(peers.export_pieces, [1, 2], [64, 3])
    assert address in Path("/proc/net/unix").read_text()
    regions = peers.fetch(fabric, address, "pieces", [64 * page, 3 * page])
    address_range = fabric.reserve(67 * page)
    address_range.map(0, regions[0])
    address_range.map(64 * page, regions[1])
    address_range.enable_access(writable=False)
    process.kill()
    process.join(20.0)
    assert process.exitcode == -signal.SIGKILL
    expected = torch.cat([peers.pattern(1, 64 * page), peers.pattern(2, 3 * page)])
    assert torch.equal(address_range.bytes_tensor(0, 67 * page), expected)
    assert address not in Path("/proc/net/unix").read_text()
    assert not any("dwdp" in name for name in set(os.listdir("/dev/shm")) - shared_memory)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FabricError, match="Connection refused"):
        peers.fetch(fabric, address, "pieces", [64 * page, 3 * page], timeout_s=5.0)


def test_rounds_of_everything_leak_nothing() -> None:
    def one_round() -> None:
        fabric = create_fabric("host")
        address, num_bytes = peers.export_one(fabric, num_pages=2)
        [region] = peers.fetch(fabric, address, "pieces", [num_bytes])
        with pytest.raises(FabricError):
            peers.fetch(fabric, address, "pieces", [num_bytes * 2])
        with pytest.raises(FabricError):
            peers.fetch(fabric, address, "pieces", [num_bytes], token=bytes(16))
        address_range = fabric.reserve(2 * num_bytes)
        address_range.map(0, region)
        address_range.enable_access(writable=False)
        own_range = fabric.reserve(num_bytes)
        own_range.map(0, fabric.allocate(num_bytes))
        own_range.enable_access(writable=True)
        view = own_range.bytes_tensor(0, num_bytes)
        engine = fabric.copy_engine(2, 1)
        done = fabric.event()
        copy = Copy(own_range.address, address_range.address, num_bytes)
        fetch = engine.prepare([[], [copy]], [own_range, address_range])
        engine.submit(fetch, after=None, done=done)
        done.wait()
        assert not view.any()
        engine.close()
        fabric.close()
        fabric.close()

    one_round()
    gc.collect()
    descriptors, mappings = peers.num_descriptors(), peers.num_region_mappings()
    for _ in range(200):
        one_round()
    gc.collect()
    assert peers.num_descriptors() == descriptors
    assert peers.num_region_mappings() == mappings
    assert peers.eventually(lambda: not peers.native_threads())


def test_fork_neither_hangs_nor_submits() -> None:
    process, _, outcome = peers.start(peers.fork_with_engine)
    process.join(20.0)
    assert outcome == 0
    assert process.exitcode == 0


def test_unknown_fabric() -> None:
    with pytest.raises(ValueError, match="there is no fabric 'abacus'"):
        create_fabric("abacus")
