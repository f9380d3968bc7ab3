"""The rules of the driver API that the project relies on: the stand-in obeys them, and so does a GPU."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_int, c_size_t, c_uint64, c_void_p

import cuda_processes as processes
import driver as cu
import pytest
from driver import Driver, DriverError, Stream
from standin import Standin


@contextmanager
def refused(code: int) -> Iterator[None]:
    with pytest.raises(DriverError) as error:
        yield
    assert error.value.code == code


@contextmanager
def mapped(driver: Driver, num_bytes: int) -> Iterator[int]:
    """An address with memory of its own."""
    address, handle = driver.reserve(num_bytes), driver.create(num_bytes)
    driver.map(address, num_bytes, handle)
    driver.release(handle)
    driver.set_access(address, num_bytes)
    yield address
    driver.unmap(address, num_bytes)
    driver.free_reservation(address, num_bytes)


class Gate:
    """Holds up a stream until it is opened.

    A GPU may run the host functions of all streams one by one: there is one gate at a time, and
    nothing else that a host function has to do before it opens.
    """

    def __init__(self, stream: Stream) -> None:
        self._opened = threading.Event()
        stream.call_host(lambda: self._opened.wait(20.0) and None)

    def open(self) -> None:
        self._opened.set()


# Memory


def test_only_whole_handles_are_mapped_and_only_into_free_reservations(driver: Driver) -> None:
    page = driver.granularity()
    address, handle = driver.reserve(3 * page), driver.create(2 * page)
    with refused(cu.INVALID_VALUE):
        driver.map(address, page, handle, offset=page)
    with refused(cu.INVALID_VALUE):
        driver.map(address + 2 * page, 2 * page, handle)
    driver.map(address, 2 * page, handle)
    with refused(cu.INVALID_VALUE):
        driver.map(address + page, 2 * page, handle)
    with refused(cu.INVALID_VALUE):
        driver.unmap(address, page)
    with refused(cu.INVALID_VALUE):
        driver.set_access(address, 3 * page)
    with refused(cu.INVALID_VALUE):
        driver.free_reservation(address, 3 * page)
    driver.unmap(address, 2 * page)
    driver.release(handle)
    driver.free_reservation(address, 3 * page)


@pytest.mark.usefixtures("standin")  # a GPU might find out only later, and be lost to other tests
def test_mapped_memory_is_used_only_as_its_access_allows(driver: Driver) -> None:
    page = driver.granularity()
    address, handle = driver.reserve(page), driver.create(page)
    driver.map(address, page, handle)
    with refused(cu.INVALID_VALUE):
        driver.read(address, 1)
    driver.set_access(address, page)
    driver.write(address, b"x")
    driver.set_access(address, page, cu.READ)
    with refused(cu.INVALID_VALUE):
        driver.write(address, b"y")
    assert driver.read(address, 1) == b"x"
    driver.unmap(address, page)
    driver.release(handle)
    driver.free_reservation(address, page)


def test_memory_lives_while_a_handle_or_a_mapping_does(driver: Driver, standin: Standin) -> None:
    page = driver.granularity()
    before = standin.live()["memory_bytes"]
    address, handle = driver.reserve(2 * page), driver.create(page)
    driver.map(address, page, handle)
    driver.map(address + page, page, handle)
    driver.release(handle)
    driver.set_access(address, 2 * page)
    driver.write(address + 5, b"shared")
    assert driver.read(address + page + 5, 6) == b"shared"
    driver.unmap(address, page)
    assert standin.live()["memory_bytes"] == before + page
    driver.unmap(address + page, page)
    assert standin.live()["memory_bytes"] == before
    driver.free_reservation(address, 2 * page)


def test_imported_memory_outlives_the_process_that_made_it(driver: Driver) -> None:
    page = driver.granularity()
    exporter = processes.start_exporter(b"made elsewhere", page)
    handle = driver.import_(exporter.descriptor)
    os.close(exporter.descriptor)
    os.kill(exporter.pid, signal.SIGKILL)
    exporter.join()
    address = driver.reserve(page)
    driver.map(address, page, handle)
    driver.release(handle)
    driver.make_readable(address, page)
    assert driver.read(address, 14) == b"made elsewhere"
    driver.unmap(address, page)
    driver.free_reservation(address, page)


def test_memory_runs_out_and_comes_back(driver: Driver, standin: Standin) -> None:
    page = driver.granularity()
    standin.set("MEMORY_BYTES", standin.live()["memory_bytes"] + 2 * page)
    first = driver.create(page)
    assert driver.free_bytes() == page
    with refused(cu.OUT_OF_MEMORY):
        driver.create(2 * page)
    driver.release(first)
    driver.release(driver.create(2 * page))


@pytest.mark.usefixtures("standin")
def test_touching_unmapped_memory_breaks_the_context_for_good() -> None:
    assert processes.outcome_of("copy_after_unmap") == cu.ILLEGAL_ADDRESS


# Streams and events


def test_a_wait_is_for_the_record_before_it(driver: Driver) -> None:
    first, second = driver.stream(), driver.stream()
    event = driver.event()
    event.record(first)
    gate = Gate(first)
    second.wait(event)
    event.record(first)
    second.synchronize()
    assert not event.complete()
    second.wait(event)
    event.record(first)
    assert not second.idle()
    gate.open()
    second.synchronize()
    event.synchronize()
    for thing in (event, first, second):
        thing.destroy()


@pytest.mark.usefixtures("standin")  # two gates at a time
def test_the_legacy_stream_and_blocking_streams_wait_for_each_other(driver: Driver) -> None:
    blocking, free = driver.stream(flags=0), driver.stream()
    order: list[str] = []
    gates = Gate(blocking), Gate(free)
    legacy = Stream(driver, c_void_p())
    legacy.call_host(lambda: order.append("legacy"))
    blocking.call_host(lambda: order.append("blocking"))
    assert not order
    gates[0].open()
    blocking.synchronize()
    assert order == ["legacy", "blocking"]
    assert not free.idle()
    gates[1].open()
    free.synchronize()
    blocking.destroy()
    free.destroy()


def test_the_driver_is_unusable_in_a_forked_child(driver: Driver) -> None:
    child = os.fork()
    if child == 0:
        os._exit(driver.result("cuCtxSynchronize"))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == cu.NOT_INITIALIZED


# Batches of copies


def batch_arguments(dst: int, src: int, num_bytes: int, order: int) -> list[object]:
    attributes = cu.CopyAttributes(order=order)
    return [
        cu.c_array(c_uint64, [dst]),
        cu.c_array(c_uint64, [src]),
        cu.c_array(c_size_t, [num_bytes]),
        c_size_t(1),
        ctypes.byref(attributes),
        cu.c_array(c_size_t, [0]),
        c_size_t(1),
    ]


def test_the_batch_copy_has_the_signature_of_the_version_asked_for(driver: Driver) -> None:
    page = driver.granularity()
    pointers = [c_void_p, c_void_p, c_void_p, c_size_t, c_void_p, c_void_p, c_size_t]
    stream = driver.stream()
    assert driver.entry_point("cuMemcpyBatchAsync", 12070) is None
    with mapped(driver, page) as address:
        old = driver.entry_point("cuMemcpyBatchAsync", 12080, *pointers, c_void_p, c_void_p)
        new = driver.entry_point("cuMemcpyBatchAsync", 13000, *pointers, c_void_p)
        failed = c_size_t(7)
        driver.write(address, b"12.8")
        arguments = batch_arguments(address + 8, address, 4, cu.SOURCE_ORDER_STREAM)
        assert old(*arguments, ctypes.byref(failed), stream.handle) == cu.SUCCESS
        stream.synchronize()
        assert driver.read(address + 8, 4) == b"12.8"
        arguments = batch_arguments(address + 8, address, 3, cu.SOURCE_ORDER_STREAM)
        driver.write(address, b"13.0")
        assert new(*arguments, stream.handle) == cu.SUCCESS
        stream.synchronize()
        assert driver.read(address + 8, 4) == b"13.8"
        assert new(*arguments, None) == cu.INVALID_VALUE
        assert new(*batch_arguments(address + 8, address, 4, 0), stream.handle) == cu.INVALID_VALUE
    stream.destroy()


def test_the_batch_copy_cannot_be_captured_and_leaves_the_capture_valid(driver: Driver) -> None:
    page = driver.granularity()
    pointers = [c_void_p, c_void_p, c_void_p, c_size_t, c_void_p, c_void_p, c_size_t]
    batch = driver.entry_point("cuMemcpyBatchAsync", 13000, *pointers, c_void_p)
    stream = driver.stream()
    with mapped(driver, page) as address:
        with stream.capture() as graph:
            arguments = batch_arguments(address + 8, address, 4, cu.SOURCE_ORDER_STREAM)
            assert batch(*arguments, stream.handle) == cu.STREAM_CAPTURE_UNSUPPORTED
            driver.copy(address + 8, address, 4, stream)
        assert graph.num_nodes() == 1
        graph.destroy()
    stream.destroy()


# Capture


def test_a_graph_copies_what_the_source_holds_when_it_is_launched(driver: Driver) -> None:
    stream = driver.stream()
    with mapped(driver, driver.granularity()) as address:
        driver.write(address, b"captured")
        with stream.capture() as graph:
            driver.copy(address + 8, address, 8, stream)
        graph.instantiate()
        for data in (b"replay 1", b"replay 2"):
            driver.write(address, data)
            graph.launch(stream)
            stream.synchronize()
            assert driver.read(address + 8, 8) == data
        graph.destroy()
    stream.destroy()


@pytest.mark.usefixtures("standin")  # host functions that wait for each other
def test_forked_streams_join_a_capture_and_run_at_once(driver: Driver) -> None:
    """Two branches that each wait for the other: only concurrent ones finish."""
    main, side = driver.stream(), driver.stream()
    fork, join = driver.event(), driver.event()
    barrier = threading.Barrier(2)
    with main.capture() as graph:
        fork.record(main)
        side.wait(fork)
        for stream in (main, side):
            stream.call_host(lambda: barrier.wait(20.0) and None)
        join.record(side)
        main.wait(join)
    graph.instantiate().launch(main)
    main.synchronize()
    assert not barrier.broken
    assert driver.result("cuEventQuery", fork.handle) == cu.CAPTURED_EVENT
    graph.destroy()
    for thing in (fork, join, main, side):
        thing.destroy()


def test_a_capture_waits_for_outside_events_only_as_external_nodes(driver: Driver) -> None:
    main, other = driver.stream(), driver.stream()
    outside = driver.event()
    outside.record(other)
    with refused(cu.STREAM_CAPTURE_ISOLATION), main.capture():
        main.wait(outside)
    with refused(cu.INVALID_VALUE):
        main.wait(outside, cu.EXTERNAL)  # not while nothing is captured
    reached: list[int] = []
    with main.capture() as graph:
        main.wait(outside, cu.EXTERNAL)
        main.call_host(lambda: reached.append(1))
    graph.instantiate()
    gate = Gate(other)
    outside.record(other)
    graph.launch(main)
    assert not main.idle()
    assert not reached
    gate.open()
    main.synchronize()
    assert reached == [1]
    graph.destroy()
    for thing in (outside, main, other):
        thing.destroy()


def test_an_external_record_is_a_record_of_each_launch(
    driver: Driver, loaded_standin: Standin | None
) -> None:
    main = driver.stream()
    event = driver.event()
    gates: list[threading.Event] = [threading.Event(), threading.Event()]
    upcoming = iter(gates)
    with main.capture() as graph:
        main.call_host(lambda: next(upcoming).wait(20.0) and None)
        event.record(main, cu.EXTERNAL)
    assert event.complete()
    graph.instantiate()
    for gate in gates:
        graph.launch(main)
        # A GPU may take until the node's turn to make the event a new one.
        assert loaded_standin is None or not event.complete()
        gate.set()
        main.synchronize()
        assert event.complete()
    graph.destroy()
    event.destroy()
    main.destroy()


def test_a_capture_ends_only_when_all_its_streams_have_joined(driver: Driver) -> None:
    main, side = driver.stream(), driver.stream()
    fork = driver.event()
    with refused(cu.STREAM_CAPTURE_UNJOINED), main.capture():
        fork.record(main)
        side.wait(fork)
        side.call_host(lambda: None)
    assert main.idle() and side.idle()  # both are ordinary streams again
    for thing in (fork, main, side):
        thing.destroy()


def test_waiting_in_the_host_ends_a_capture(driver: Driver) -> None:
    stream = driver.stream()
    event = driver.event()
    event.record(stream)
    stream.synchronize()
    with refused(cu.STREAM_CAPTURE_INVALIDATED), stream.capture():
        assert driver.result("cuEventSynchronize", event.handle) == cu.STREAM_CAPTURE_UNSUPPORTED
    mode = c_int(cu.CAPTURE_RELAXED)
    driver.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    with stream.capture() as graph:
        assert event.complete()
    driver.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    graph.destroy()
    event.destroy()
    stream.destroy()


def test_launches_of_one_graph_do_not_overlap(driver: Driver) -> None:
    first, second = driver.stream(), driver.stream()
    running: list[int] = []
    overlaps: list[int] = []

    def work() -> None:
        running.append(1)
        overlaps.append(len(running))
        threading.Event().wait(0.02)
        running.pop()

    with first.capture() as graph:
        first.call_host(work)
    graph.instantiate()
    for stream in (first, second, first):
        graph.launch(stream)
    first.synchronize()
    second.synchronize()
    assert overlaps == [1, 1, 1]
    graph.destroy()
    first.destroy()
    second.destroy()


# Faults


def test_a_fault_hits_the_call_it_is_meant_for(driver: Driver, standin: Standin) -> None:
    page = driver.granularity()
    standin.fail("cuMemCreate", nth=2, code=cu.NOT_PERMITTED)
    first = driver.create(page)
    with refused(cu.NOT_PERMITTED):
        driver.create(page)
    assert standin.fault_raised() == "cuMemCreate"
    driver.release(first)
    standin.fail("*", nth=1)
    driver.free_reservation(*leaked_reservation(driver, page))
    assert standin.fault_raised() == "cuMemAddressReserve"


def leaked_reservation(driver: Driver, num_bytes: int) -> tuple[int, int]:
    """Reserve after one failure."""
    with refused(cu.OUT_OF_MEMORY):
        driver.reserve(num_bytes)
    return driver.reserve(num_bytes), num_bytes
