"""MoE backends create and load the resident experts alone.

While a model is loaded inside :func:`resident_experts_only`, each backend takes itself for a module with
as many experts as its rank stores: it makes parameters of that size and loads those experts' weights. The
mapping stays that of one rank, routing knows all experts, and nothing is different outside of the context.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dwdp.config import DwdpConfig
from dwdp.engines.tensorrt_llm import formats
from dwdp.engines.tensorrt_llm.formats import MoEModule
from dwdp.placement import build_placement

if TYPE_CHECKING:
    import torch

ResidentOf = Callable[[int], Sequence[int]]
"""From the number of experts of a layer to those that this rank stores, ascending."""

_ACTIVE: ContextVar[ResidentOf | None] = ContextVar("resident_experts_only", default=None)

# Kept on the module itself: weights are loaded by a pool of threads, which know no context.
_RESIDENT_ATTRIBUTE = "dwdp_resident_experts"


@contextmanager
def resident_experts_only(resident_of: ResidentOf) -> Iterator[None]:
    """Inside, MoE backends that this thread creates hold the experts of ``resident_of`` alone.

    Their weights are loaded inside as well. :func:`dwdp.engines.tensorrt_llm.sharing.share_experts` then
    makes them see all experts.
    """
    token = _ACTIVE.set(resident_of)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def active_resident_of() -> ResidentOf | None:
    """The argument of the :func:`resident_experts_only` that this thread is in."""
    return _ACTIVE.get()


def placed_experts(config: DwdpConfig, rank: int) -> ResidentOf:
    """What ``rank`` stores of a layer, by the options of ``config``.

    The function returned raises ValueError where the experts cannot be placed so.
    """

    @functools.cache
    def resident_of(num_experts: int) -> Sequence[int]:
        placement = build_placement(
            num_experts,
            config.dwdp_size,
            num_experts_per_worker=config.num_experts_per_worker,
            num_prefetch_experts=config.num_prefetch_experts,
        )
        return placement.resident_experts(rank)

    return resident_of


def resident_experts(backend: MoEModule) -> tuple[int, ...] | None:
    """The experts that a backend holds, or None where it was created outside of the context."""
    resident: tuple[int, ...] | None = getattr(backend, _RESIDENT_ATTRIBUTE, None)
    return resident


def patch(module: ModuleType) -> None:
    """Wrap what creates and loads weights in the MoE backends that ``module`` defines.

    For the modules ``fused_moe_{cutlass,trtllm_gen,triton,vanilla,wide_ep}`` of
    ``tensorrt_llm._torch.modules.fused_moe``. CuteDSL and DeepGEMM inherit from Cutlass.
    """
    for name in ("CutlassFusedMoE", "TRTLLMGenFusedMoE", "TritonFusedMoE"):
        if name in vars(module):
            _wrap(vars(module)[name], "create_weights", _create_fused)
            _wrap(vars(module)[name], "load_weights", _load_fused)
    if "VanillaMoE" in vars(module):
        _wrap(module.VanillaMoE, "create_weights", _create_vanilla)
        _wrap(module.VanillaMoE, "load_weights", _load_vanilla)
    if "WideEPMoE" in vars(module):
        _wrap(module.WideEPMoE, "__init__", _refuse_on_creation)


def widen(backend: MoEModule) -> None:
    """Let a backend see all experts again, after its parameters hold them."""
    num_experts = backend.num_experts
    backend.expert_size_per_partition = num_experts
    if type(backend).__name__ == formats.VANILLA_BACKEND:
        backend.expert_start, backend.expert_end = 0, num_experts
    else:
        backend.initial_local_expert_ids = list(range(num_experts))


def ranges(experts: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending experts as ranges ``(start, stop)``: one, or two where they wrap around the last."""
    found: list[tuple[int, int]] = []
    for expert in experts:
        if found and found[-1][1] == expert:
            found[-1] = (found[-1][0], expert + 1)
        else:
            found.append((expert, expert + 1))
    return found


def _wrap(cls: type, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(cls, name)

    @functools.wraps(original)
    def wrapped(self: MoEModule, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    # TensorRT-LLM asks for argument names in a way that does not follow wrappers.
    wrapped.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    setattr(cls, name, wrapped)


def _refuse_on_creation(original: Callable[..., None], self: MoEModule, **kwargs: Any) -> None:
    if _ACTIVE.get() is not None:
        formats.check_backend(self)
    original(self, **kwargs)


def _take_resident(backend: MoEModule) -> tuple[int, ...] | None:
    """What the backend is to create, noted on it; None outside of the context, or if it is created."""
    resident_of = _ACTIVE.get()
    if resident_of is None or backend._weights_created:
        return None
    formats.check_backend(backend)
    resident = tuple(resident_of(backend.num_experts))
    setattr(backend, _RESIDENT_ATTRIBUTE, resident)
    return resident


def _create_fused(original: Callable[[MoEModule], None], self: MoEModule) -> None:
    import torch

    resident = _take_resident(self)
    if resident is None:
        original(self)
        return
    self.expert_size_per_partition = len(resident)
    self.initial_local_expert_ids = list(resident)
    original(self)
    formats.check_parameters(self, len(resident))
    for name in formats.find_format(self).expert_attributes:
        values = getattr(self, name)
        if values is not None:
            # Loading divides them by what it loads, in place: one value for each, on a copy.
            rows = [values[start:stop] for start, stop in ranges(resident)]
            setattr(self, name, torch.cat(rows))


def _load_fused(
    original: Callable[..., None],
    self: MoEModule,
    weights: list[dict[str, torch.Tensor]],
    *args: Any,
    **kwargs: Any,
) -> None:
    resident = resident_experts(self)
    if resident is not None:
        weights = [formats.as_full_load_reads(self, layer, resident) for layer in weights]
    original(self, weights, *args, **kwargs)


def _create_vanilla(original: Callable[[MoEModule], None], self: MoEModule) -> None:
    from torch import nn

    resident = _take_resident(self)
    if resident is None:
        original(self)
        return
    experts = nn.ModuleList([nn.Identity() for _ in range(self.num_experts)])
    for self.expert_start, self.expert_end in ranges(resident):
        created = nn.ModuleList([nn.Identity() for _ in range(self.num_experts)])
        self.create_experts(created)
        for expert in range(self.expert_start, self.expert_end):
            experts[expert] = created[expert]
    formats.check_vanilla_expert(experts[resident[0]])
    for expert in range(self.num_experts):
        self[expert] = experts[expert]
    self._weights_created = True


def _load_vanilla(
    original: Callable[..., None], self: MoEModule, *args: Any, **kwargs: Any
) -> None:
    resident = resident_experts(self)
    if resident is None:
        original(self, *args, **kwargs)
        return
    for self.expert_start, self.expert_end in ranges(resident):
        original(self, *args, **kwargs)
