"""Lets TensorRT-LLM load weights "on a GPU" where there is none: the CPU's tensors say they are there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference_operators import REFERENCES, resmooth_to_fp8_e8m0
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda", 0)


class PretendCuda(TorchFunctionMode):
    """In this thread, every tensor on the CPU says that it is on ``cuda:0``, and what goes there stays."""

    def __torch_function__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.Tensor.cuda:
            return args[0]
        result = function(
            *map(_on_cpu, args),
            **{name: _on_cpu(value) for name, value in (kwargs or {}).items()},
        )
        attribute = getattr(function, "__self__", None)
        if attribute is torch.Tensor.device and result.type == "cpu":
            return CUDA
        if attribute is torch.Tensor.is_cuda:
            return not args[0].is_meta
        return result


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    if isinstance(value, str) and value.startswith("cuda"):
        return "cpu"
    return value


class _Stream:
    """A stream or an event that orders nothing: all work is done when it is submitted."""

    def __init__(self, **_options: object) -> None: ...
    def record(self, *_: object) -> None: ...
    def wait(self, *_: object) -> None: ...
    def wait_stream(self, *_: object) -> None: ...
    def synchronize(self) -> None: ...


@contextmanager
def pretend_gpu(sm_version: int) -> Iterator[None]:
    """A GPU of compute capability ``sm_version`` (90 is Hopper) for this process, and operators."""
    import tensorrt_llm._torch.modules.fused_moe.quantization as quantization
    from tensorrt_llm import _utils

    properties = SimpleNamespace(major=sm_version // 10, minor=sm_version % 10, is_integrated=False)
    capability = (properties.major, properties.minor)
    cached = (_utils.get_sm_version, _utils.is_sm_100f)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "synchronize", lambda *_: None)
        patch.setattr(torch.cuda, "Stream", _Stream)
        patch.setattr(torch.cuda, "Event", _Stream)
        patch.setattr(quantization, "resmooth_to_fp8_e8m0", resmooth_to_fp8_e8m0)
        for name, reference in REFERENCES.items():
            patch.setattr(torch.ops.trtllm, name, reference, raising=False)
        for function in cached:
            function.cache_clear()
        try:
            yield
        finally:
            for function in cached:
                function.cache_clear()
