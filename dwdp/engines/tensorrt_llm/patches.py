"""Which modules of ``tensorrt_llm`` are patched by what, and what happens where they cannot be.

A patch is a function of dwdp that takes the module right after it was executed and rebinds attributes in
place. It imports no other module of ``tensorrt_llm``, which may be half loaded by then. Patches are inert
until somebody asks for ``parallel="dwdp"``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType

from dwdp.engines.tensorrt_llm import refusal

_OURS = "dwdp.engines.tensorrt_llm"

PATCHES: dict[str, tuple[str, ...]] = {
    "tensorrt_llm.llmapi.llm_args": (f"{_OURS}.arguments:patch",),
    "tensorrt_llm.llmapi.utils": (f"{_OURS}.affinity:patch",),
    "tensorrt_llm.commands.serve": (f"{_OURS}.command_line:patch",),
    "tensorrt_llm.executor.base_worker": (f"{_OURS}.worker:patch_shutdown",),
    "tensorrt_llm.executor.executor": (f"{_OURS}.executor:patch",),
    "tensorrt_llm.executor.worker": (f"{_OURS}.worker:patch_shutdown",),
    "tensorrt_llm._torch.models.checkpoints.hf.weight_loader": (f"{_OURS}.checkpoint:patch",),
    "tensorrt_llm._torch.pyexecutor.model_loader": (f"{_OURS}.worker:patch_model_loader",),
    **{
        f"tensorrt_llm._torch.modules.fused_moe.{name}": (f"{_OURS}.sharding:patch",)
        for name in (
            "fused_moe_cutlass",
            "fused_moe_triton",
            "fused_moe_trtllm_gen",
            "fused_moe_vanilla",
            "fused_moe_wide_ep",
        )
    },
}
"""Patches by module, each ``"module:function"``; those of one module in order."""

_failures: list[str] = []


def watched_modules() -> frozenset[str]:
    """The modules that :func:`apply` is to be called with."""
    return frozenset(PATCHES) | frozenset(refusal.REFUSALS)


def prepare() -> None:
    """Called before ``tensorrt_llm`` runs, and so before it initialises MPI. Never raises."""
    try:
        from dwdp.engines.tensorrt_llm import launch

        launch.prepare_process()
    except Exception as error:
        _failures.append(f"dwdp could not prepare this process: {error!r}")


def apply(module: ModuleType) -> None:
    """Patch ``module``; where the contract or a patch failed, make it refuse ``parallel="dwdp"``.

    Never raises: whoever does not ask for DWDP is to notice nothing.
    """
    if obstacle() is None:
        try:
            for target in PATCHES.get(module.__name__, ()):
                _function(target)(module)
        except Exception as error:
            _failures.append(f"dwdp could not patch {module.__name__}: {error!r}")
            for name in refusal.REFUSALS:
                if name in sys.modules and name != module.__name__:
                    refusal.refuse(sys.modules[name], _failures[0])
    reason = obstacle()
    if reason is not None:
        refusal.refuse(module, reason)


def obstacle() -> str | None:
    """Why ``parallel="dwdp"`` cannot be had from the TensorRT-LLM of this process; None if it can."""
    return _failures[0] if _failures else _contract_obstacle()


@cache
def _contract_obstacle() -> str | None:
    try:
        from dwdp.engines.tensorrt_llm import contract, contract_reader

        source = contract_reader.find_source()
        verdict = contract.check(contract_reader.read_surface(source, contract.wanted()))
    except Exception as error:
        return f"dwdp could not check TensorRT-LLM before patching it: {error!r}"
    return None if verdict.fits else verdict.explain()


def _function(target: str) -> Callable[[ModuleType], None]:
    module, _, name = target.partition(":")
    function: Callable[[ModuleType], None] = getattr(import_module(module), name)
    return function
