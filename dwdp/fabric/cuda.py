"""The CUDA fabric: GPU memory that peers map over NVLink or PCIe, copied by copy engines.

One rank has one device. Memory comes from the driver's virtual memory management (``cuMemCreate``),
whose handles travel as POSIX file descriptors on one host and as fabric handles between hosts of one
NVLink domain. Copies run on streams of their own; compute is the current stream of torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dwdp import _C
from dwdp.fabric.base import Fabric, FabricError, Region, checked_indices
from dwdp.fabric.cuda_devices import CudaDeviceInfo, list_devices
from dwdp.fabric.descriptor_limit import raise_descriptor_limit
from dwdp.observability.spans import Span

if TYPE_CHECKING:
    import torch


class TorchCompute:
    """Compute as torch submits it to one device: its current stream, and tensors over our memory."""

    device_type = "cuda"

    def __init__(self, ordinal: int) -> None:
        import torch

        if not torch.cuda.is_available():
            raise FabricError(
                f"torch {torch.__version__} sees no CUDA device: install a CUDA build of torch, and "
                "check CUDA_VISIBLE_DEVICES"
            )
        self._torch = torch
        self._device = torch.device("cuda", ordinal)

    def stream(self) -> int:
        """The handle of the stream that compute is submitted to now."""
        return int(self._torch.cuda.current_stream(self._device).cuda_stream)

    def is_capturing(self) -> bool:
        """Whether that stream is being captured into a CUDA graph."""
        return bool(self._torch.cuda.is_current_stream_capturing())

    def synchronize(self) -> None:
        self._torch.cuda.synchronize(self._device)

    def tensor(self, capsule: Any) -> torch.Tensor:
        """The tensor of a DLPack capsule."""
        from torch.utils.dlpack import from_dlpack

        tensor: torch.Tensor = from_dlpack(capsule)
        return tensor


class CudaAddressRange(_C.CudaAddressRange):
    """A reserved range of device addresses whose bytes can be seen as a tensor."""

    def __init__(self, device: _C.CudaDevice, num_bytes: int, compute: TorchCompute) -> None:
        super().__init__(device, num_bytes)
        self._compute = compute

    def bytes_tensor(self, offset: int, num_bytes: int) -> torch.Tensor:
        """A ``uint8 [num_bytes]`` tensor on the device over the bytes at ``offset``, without a copy.

        The tensor keeps the range mapped.

        Raises:
            FabricError: the bytes reach past the end of the range, or it is closed.
        """
        return self._compute.tensor(self.bytes_capsule(offset, num_bytes))


class CudaEvent(_C.CudaEvent):
    """A CUDA event on the compute stream of the moment.

    A compute stream that was captured into a graph has to exist until the fabric is used once more after
    the capture: an event recorded or waited for, an engine or a range closed. Torch never destroys
    the streams that it makes itself.
    """

    def __init__(self, device: _C.CudaDevice, compute: TorchCompute) -> None:
        super().__init__(device)
        self._compute = compute

    def record(self) -> None:  # type: ignore[override]
        """Issue a generation that completes when the compute submitted so far has finished."""
        super().record(self._compute.stream())

    def wait(self) -> float:  # type: ignore[override]
        """Make compute wait on the device; the host goes on at once, hence 0."""
        super().wait(self._compute.stream())
        return 0.0


class CudaCopyEngine(_C.CudaCopyEngine):
    """Streams that copy slices in the background, and a kernel that fetches on demand."""

    def __init__(
        self, device: _C.CudaDevice, num_lanes: int, lane_depth: int, compute: TorchCompute
    ) -> None:
        super().__init__(device, num_lanes, lane_depth)
        self._compute = compute

    def prepare(
        self,
        lanes: Sequence[Sequence[tuple[int, int, int]]],
        ranges: Sequence[_C.CudaAddressRange] = (),
        layer: int = 0,
    ) -> _C.CudaFetch:
        """Lay out a fetch. ``layer`` is not used, as there are no spans."""
        return super().prepare(lanes, ranges)

    def prepare_demand(
        self,
        experts: Sequence[Sequence[tuple[int, int, int]]],
        ranges: Sequence[_C.CudaAddressRange] = (),
        layer: int = 0,
    ) -> _C.CudaDemand:
        """Lay out what each expert takes. ``layer`` as in ``prepare``."""
        return super().prepare_demand(experts, ranges)

    def fetch_activated(  # type: ignore[override]
        self, demand: _C.CudaDemand, indices: torch.Tensor
    ) -> float:
        """Fetch the experts that ``indices`` (int32 or int64, on the device) names, on the compute stream.

        Nothing is read back to the host, which does not wait either, hence 0.
        """
        indices = checked_indices(indices, self._compute.device_type)
        super().fetch_activated(
            demand,
            indices.data_ptr(),
            indices.numel(),
            indices.itemsize,
            self._compute.stream(),
        )
        return 0.0

    def drain_spans(self) -> list[Span]:
        """None: copies are not timed one by one, as events that tell the time would slow their streams."""
        return []


class CudaFabric(Fabric):
    """Memory of one GPU that the ranks of its NVLink domain can map, and its copy engines.

    Args:
        ordinal: the device, as this process counts them.
        across_hosts: whether ranks run on several hosts, so that fabric handles are needed.
        compute: where compute is submitted; torch's current stream if none is given.

    Raises:
        FabricError: no usable device or driver, or no way to export memory as asked; the text says
            which and why.
    """

    name = "cuda"

    def __init__(
        self, ordinal: int = 0, *, across_hosts: bool = False, compute: TorchCompute | None = None
    ) -> None:
        self.info = _device_info(ordinal)
        self.device_name = self.info.name
        self._compute = compute if compute is not None else TorchCompute(ordinal)
        self._device = _C.CudaDevice(ordinal)
        self._handle_type = self._device.choose_handle_type(across_hosts)
        self.granularity = self._device.granularity
        self._server: _C.DescriptorServer | None = None
        self._handles: dict[str, list[str]] = {}
        raise_descriptor_limit()

    @property
    def handle_type(self) -> str:
        """How memory is exported: ``posix_fd`` or ``fabric``."""
        return self._handle_type

    def is_capturing(self) -> bool:
        return self._compute.is_capturing()

    def synchronize(self) -> None:
        self._compute.synchronize()

    def allocate(self, num_bytes: int) -> _C.CudaRegion:
        return _C.CudaRegion(self._device, num_bytes, self._handle_type)

    def reserve(self, num_bytes: int) -> CudaAddressRange:
        return CudaAddressRange(self._device, num_bytes, self._compute)

    def event(self) -> CudaEvent:
        return CudaEvent(self._device, self._compute)

    def copy_engine(self, num_lanes: int, lane_depth: int) -> CudaCopyEngine:
        return CudaCopyEngine(self._device, num_lanes, lane_depth, self._compute)

    def serve(self, token: bytes) -> None:
        if self._server is not None:
            raise FabricError(f"this fabric already serves its regions at {self._server.address}")
        self._server = _C.DescriptorServer(token)

    def publish(self, name: str, regions: Sequence[Region]) -> None:
        server = self._serving()
        if self._handle_type == "fabric":
            self._handles[name] = [region.export_fabric().hex() for region in regions]  # type: ignore[attr-defined]
        else:
            server.publish(name, regions)

    def ticket(self) -> bytes:
        server = self._serving()
        return json.dumps(
            {"uuid": self.info.uuid, "address": server.address, "handles": self._handles}
        ).encode()

    def fetch_regions(
        self, ticket: bytes, token: bytes, name: str, sizes: Sequence[int], timeout_s: float
    ) -> list[Region]:
        peer = json.loads(ticket)
        self._check_peer_access(peer["uuid"])
        if self._handle_type == "fabric":
            handles = [bytes.fromhex(handle) for handle in peer["handles"].get(name, ())]
            if len(handles) != len(sizes):
                raise FabricError(
                    f"the peer published {len(handles)} regions under {name!r}, not {len(sizes)}"
                )
            return [
                _C.CudaRegion.import_fabric(self._device, handle, num_bytes)
                for handle, num_bytes in zip(handles, sizes, strict=True)
            ]
        return list(
            _C.fetch_cuda_regions(self._device, peer["address"], token, name, sizes, timeout_s)
        )

    def close(self) -> None:
        self._handles.clear()
        if self._server is not None:
            self._server.close()
            self._server = None

    def _serving(self) -> _C.DescriptorServer:
        if self._server is None:
            raise FabricError("regions cannot be published before serve() or after close()")
        return self._server

    def _check_peer_access(self, uuid: str) -> None:
        """Refuse a peer's device that this one cannot read. One this process cannot see is not judged."""
        for device in list_devices():
            if device.uuid != uuid or device.ordinal == self.info.ordinal:
                continue
            if not self._device.can_access_peer(device.ordinal):
                raise FabricError(
                    f"GPU {self.info.ordinal} ({self.info.name}) cannot read the memory of GPU "
                    f"{device.ordinal} ({device.name}): there is no peer access between them. Use GPUs "
                    "joined by NVLink or by one PCIe root"
                )


def _device_info(ordinal: int) -> CudaDeviceInfo:
    devices = list_devices()
    if not 0 <= ordinal < len(devices):
        raise FabricError(f"there is no GPU {ordinal}: this process sees {len(devices)}")
    device = devices[ordinal]
    if not device.supports_virtual_memory:
        raise FabricError(
            f"GPU {ordinal} ({device.name}) does not support virtual memory management (cuMemCreate), "
            "which the CUDA fabric maps experts with"
        )
    return device
