"""The CUDA driver API as the tests use it: the stand-in or the real one, by ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import byref, c_char, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

# Names of the newest form where a plain one is older.
VERSIONED = {
    "cuCtxPushCurrent": "cuCtxPushCurrent_v2",
    "cuCtxPopCurrent": "cuCtxPopCurrent_v2",
    "cuDevicePrimaryCtxRelease": "cuDevicePrimaryCtxRelease_v2",
    "cuEventDestroy": "cuEventDestroy_v2",
    "cuMemAlloc": "cuMemAlloc_v2",
    "cuMemFree": "cuMemFree_v2",
    "cuMemGetInfo": "cuMemGetInfo_v2",
    "cuStreamBeginCapture": "cuStreamBeginCapture_v2",
    "cuStreamDestroy": "cuStreamDestroy_v2",
}

SUCCESS = 0
INVALID_VALUE = 1
OUT_OF_MEMORY = 2
NOT_INITIALIZED = 3
INVALID_DEVICE = 101
INVALID_CONTEXT = 201
INVALID_HANDLE = 400
NOT_FOUND = 500
NOT_READY = 600
ILLEGAL_ADDRESS = 700
NOT_PERMITTED = 800
NOT_SUPPORTED = 801
STREAM_CAPTURE_UNSUPPORTED = 900
STREAM_CAPTURE_INVALIDATED = 901
STREAM_CAPTURE_UNJOINED = 904
STREAM_CAPTURE_ISOLATION = 905
STREAM_CAPTURE_IMPLICIT = 906
CAPTURED_EVENT = 907

NON_BLOCKING = 1
DISABLE_TIMING = 2
EXTERNAL = 1
CAPTURE_GLOBAL, CAPTURE_THREAD_LOCAL, CAPTURE_RELAXED = 0, 1, 2
SOURCE_ORDER_STREAM = 1

POSIX, FABRIC = 1, 8
READ, READ_WRITE = 1, 3

HostFunction = ctypes.CFUNCTYPE(None, c_void_p)


class DriverError(RuntimeError):
    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"{name} returned {code}")
        self.code = code


class Location(ctypes.Structure):
    _fields_ = (("type", c_int), ("id", c_int))


class AllocationProperties(ctypes.Structure):
    _fields_ = (
        ("type", c_int),
        ("handle_types", c_int),
        ("location", Location),
        ("win32", c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class AccessDescription(ctypes.Structure):
    _fields_ = (("location", Location), ("flags", c_int))


class CopyAttributes(ctypes.Structure):
    _fields_ = (
        ("order", c_int),
        ("src_hint", Location),
        ("dst_hint", Location),
        ("flags", c_uint),
    )


class Driver:
    """Calls of one driver library, made in the primary context of device 0.

    Methods raise :class:`DriverError`; ``result`` returns the code instead.

    Args:
        keeps_streams: whether streams live on until :meth:`close` when they are destroyed. A GPU's
            driver does not check handles: using one that is gone may end the process.
    """

    def __init__(self, library: ctypes.CDLL, keeps_streams: bool = False) -> None:
        self.library = library
        self.keeps_streams = keeps_streams
        self.kept_streams: list[c_void_p] = []
        self._callbacks: list[Any] = []
        self.call("cuInit", c_uint(0))
        self._context = c_void_p()
        self.call("cuDevicePrimaryCtxRetain", byref(self._context), c_int(0))
        self.make_current()
        self._reader = self.stream()

    def close(self) -> None:
        self._reader.destroy()
        for handle in self.kept_streams:
            self.call("cuStreamDestroy", handle)
        self.kept_streams.clear()
        self.call("cuCtxSetCurrent", None)
        self.call("cuDevicePrimaryCtxRelease", c_int(0))

    def make_current(self) -> None:
        """In this thread."""
        self.call("cuCtxSetCurrent", self._context)

    def result(self, name: str, *arguments: Any) -> int:
        return int(getattr(self.library, VERSIONED.get(name, name))(*arguments))

    def call(self, name: str, *arguments: Any) -> None:
        code = self.result(name, *arguments)
        if code != SUCCESS:
            raise DriverError(name, code)

    def entry_point(self, name: str, version: int, *types: Any) -> Any:
        """A function of the driver in the form it had in ``version``; None where it has none."""
        address, status = c_void_p(), c_int()
        self.call(
            "cuGetProcAddress_v2",
            name.encode(),
            byref(address),
            version,
            c_uint64(0),
            byref(status),
        )
        return ctypes.CFUNCTYPE(c_int, *types)(address.value) if address.value else None

    # Memory

    def allocate(self, num_bytes: int) -> int:
        address = c_uint64()
        self.call("cuMemAlloc", byref(address), c_size_t(num_bytes))
        return address.value

    def free(self, address: int) -> None:
        self.call("cuMemFree", c_uint64(address))

    def read(self, address: int, num_bytes: int) -> bytes:
        """Bytes of device memory, as they are now: other streams are not waited for."""
        buffer = (c_char * num_bytes)()
        self.copy(ctypes.addressof(buffer), address, num_bytes, self._reader)
        self._reader.synchronize()
        return buffer.raw

    def write(self, address: int, data: bytes) -> None:
        buffer = ctypes.create_string_buffer(data, len(data))
        self.copy(address, ctypes.addressof(buffer), len(data), self._reader)
        self._reader.synchronize()

    def copy(self, dst: int, src: int, num_bytes: int, stream: Stream | None = None) -> None:
        self.call(
            "cuMemcpyAsync", c_uint64(dst), c_uint64(src), c_size_t(num_bytes), handle_of(stream)
        )

    def fill(self, address: int, value: int, num_bytes: int, stream: Stream) -> None:
        self.call(
            "cuMemsetD8Async",
            c_uint64(address),
            ctypes.c_ubyte(value),
            c_size_t(num_bytes),
            stream.handle,
        )

    def granularity(self) -> int:
        value = c_size_t()
        self.call(
            "cuMemGetAllocationGranularity",
            byref(value),
            byref(allocation_properties(POSIX)),
            c_int(0),
        )
        return value.value

    def create(self, num_bytes: int, handle_types: int = POSIX) -> int:
        handle = c_uint64()
        properties = allocation_properties(handle_types)
        self.call("cuMemCreate", byref(handle), c_size_t(num_bytes), byref(properties), c_uint64(0))
        return handle.value

    def release(self, handle: int) -> None:
        self.call("cuMemRelease", c_uint64(handle))

    def export(self, handle: int) -> int:
        """A descriptor of the memory."""
        fd = c_int(-1)
        self.call(
            "cuMemExportToShareableHandle", byref(fd), c_uint64(handle), c_int(POSIX), c_uint64(0)
        )
        return fd.value

    def import_(self, fd: int) -> int:
        handle = c_uint64()
        self.call("cuMemImportFromShareableHandle", byref(handle), c_void_p(fd), c_int(POSIX))
        return handle.value

    def reserve(self, num_bytes: int) -> int:
        address = c_uint64()
        self.call(
            "cuMemAddressReserve",
            byref(address),
            c_size_t(num_bytes),
            c_size_t(0),
            c_uint64(0),
            c_uint64(0),
        )
        return address.value

    def free_reservation(self, address: int, num_bytes: int) -> None:
        self.call("cuMemAddressFree", c_uint64(address), c_size_t(num_bytes))

    def map(self, address: int, num_bytes: int, handle: int, offset: int = 0) -> None:
        self.call(
            "cuMemMap",
            c_uint64(address),
            c_size_t(num_bytes),
            c_size_t(offset),
            c_uint64(handle),
            c_uint64(0),
        )

    def unmap(self, address: int, num_bytes: int) -> None:
        self.call("cuMemUnmap", c_uint64(address), c_size_t(num_bytes))

    def set_access(self, address: int, num_bytes: int, flags: int = READ_WRITE) -> None:
        description = access_description(flags)
        self.call(
            "cuMemSetAccess",
            c_uint64(address),
            c_size_t(num_bytes),
            byref(description),
            c_size_t(1),
        )

    def make_readable(self, address: int, num_bytes: int) -> None:
        """Read-only, or writable as well where the driver maps nothing read-only."""
        try:
            self.set_access(address, num_bytes, READ)
        except DriverError as error:
            if error.code not in (INVALID_VALUE, NOT_SUPPORTED, NOT_PERMITTED):
                raise
            self.set_access(address, num_bytes)

    def free_bytes(self) -> int:
        free, total = c_size_t(), c_size_t()
        self.call("cuMemGetInfo", byref(free), byref(total))
        return free.value

    # Streams

    def stream(self, flags: int = NON_BLOCKING) -> Stream:
        handle = c_void_p()
        self.call("cuStreamCreate", byref(handle), c_uint(flags))
        return Stream(self, handle)

    def event(self, flags: int = DISABLE_TIMING) -> Event:
        handle = c_void_p()
        self.call("cuEventCreate", byref(handle), c_uint(flags))
        return Event(self, handle)

    def synchronize(self) -> None:
        self.call("cuCtxSynchronize")

    def keep(self, function: Callable[[], None]) -> Any:
        """``function`` as a host function; kept for good, because graphs may call it at any time."""
        callback = HostFunction(lambda _: function())
        self._callbacks.append(callback)
        return callback


class Stream:
    def __init__(self, driver: Driver, handle: c_void_p) -> None:
        self.driver = driver
        self.handle = handle

    @property
    def address(self) -> int:
        return self.handle.value or 0

    def synchronize(self) -> None:
        self.driver.call("cuStreamSynchronize", self.handle)

    def idle(self) -> bool:
        code = self.driver.result("cuStreamQuery", self.handle)
        if code not in (SUCCESS, NOT_READY):
            raise DriverError("cuStreamQuery", code)
        return code == SUCCESS

    def wait(self, event: Event, flags: int = 0) -> None:
        self.driver.call("cuStreamWaitEvent", self.handle, event.handle, c_uint(flags))

    def call_host(self, function: Callable[[], None]) -> None:
        """Run ``function`` in the order of the stream; it must not call the driver."""
        self.driver.call("cuLaunchHostFunc", self.handle, self.driver.keep(function), None)

    def destroy(self) -> None:
        if self.driver.keeps_streams:
            self.synchronize()
            self.driver.kept_streams.append(self.handle)
        else:
            self.driver.call("cuStreamDestroy", self.handle)

    @contextmanager
    def capture(self, mode: int = CAPTURE_THREAD_LOCAL) -> Iterator[Graph]:
        """Capture what is submitted into a graph, which is complete when the block ends."""
        graph = Graph(self.driver)
        self.driver.call("cuStreamBeginCapture", self.handle, c_int(mode))
        try:
            yield graph
            self.driver.call("cuStreamEndCapture", self.handle, byref(graph.handle))
        except BaseException:
            # Whatever failed, the stream is an ordinary one again.
            self.driver.result("cuStreamEndCapture", self.handle, byref(graph.handle))
            graph.destroy()
            raise


class Event:
    def __init__(self, driver: Driver, handle: c_void_p) -> None:
        self.driver = driver
        self.handle = handle

    def record(self, stream: Stream | None = None, flags: int = 0) -> None:
        self.driver.call("cuEventRecordWithFlags", self.handle, handle_of(stream), c_uint(flags))

    def complete(self) -> bool:
        code = self.driver.result("cuEventQuery", self.handle)
        if code not in (SUCCESS, NOT_READY):
            raise DriverError("cuEventQuery", code)
        return code == SUCCESS

    def synchronize(self) -> None:
        self.driver.call("cuEventSynchronize", self.handle)

    def destroy(self) -> None:
        self.driver.call("cuEventDestroy", self.handle)


class Graph:
    """A captured graph, and once launched its executable form."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.handle = c_void_p()
        self.executable = c_void_p()

    def instantiate(self) -> Graph:
        self.driver.call(
            "cuGraphInstantiateWithFlags", byref(self.executable), self.handle, c_uint64(0)
        )
        return self

    def launch(self, stream: Stream) -> None:
        self.driver.call("cuGraphLaunch", self.executable, stream.handle)

    def num_nodes(self) -> int:
        count = c_size_t()
        self.driver.call("cuGraphGetNodes", self.handle, None, byref(count))
        return count.value

    def destroy(self) -> None:
        if self.executable:
            self.driver.call("cuGraphExecDestroy", self.executable)
        if self.handle:
            self.driver.call("cuGraphDestroy", self.handle)
        self.executable, self.handle = c_void_p(), c_void_p()


def handle_of(stream: Stream | None) -> c_void_p:
    return c_void_p() if stream is None else stream.handle


def allocation_properties(handle_types: int, device: int = 0) -> AllocationProperties:
    pinned, on_device = 1, 1
    return AllocationProperties(
        type=pinned, handle_types=handle_types, location=Location(on_device, device)
    )


def access_description(flags: int, device: int = 0) -> AccessDescription:
    on_device = 1
    return AccessDescription(location=Location(on_device, device), flags=flags)


def c_array(type_: Any, values: Sequence[int]) -> Any:
    return (type_ * len(values))(*values)
