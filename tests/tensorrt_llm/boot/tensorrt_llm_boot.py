"""Runs TensorRT-LLM's own Python sources on a machine without a GPU.

The checkout is the folder in the environment variable TRTLLM_SOURCE that holds ``tensorrt_llm/``. What is
compiled or needs a GPU is replaced by stand-ins; every line of Python that runs is TensorRT-LLM's own.
Kernels do not run: a test that needs an operator of ``torch.ops.trtllm`` registers a reference for it.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from stand_ins import StandInModule

SOURCE_VARIABLE = "TRTLLM_SOURCE"

COMPILED = (
    "bindings",
    "deep_ep",
    "deep_gemm",
    "flash_mla",
    "libs",
    "tensorrt_llm_transfer_agent_binding",
)
"""Modules of ``tensorrt_llm`` that a build makes."""

OPTIONAL = frozenset(
    {
        "cv2",
        "decord",
        "deep_ep",
        "deep_gemm",
        "etcd3",
        "flash_attn",
        "flashinfer",
        "graphviz",
        "grpc",
        "llguidance",
        "modelopt",
        "nixl",
        "onnx_graphsurgeon",
        "openai_harmony",
        "peft",
        "polygraphy",
        "prometheus_fastapi_instrumentator",
        "ray",
        "tensorrt",
        "tensorrt_bindings",
        "tensorrt_llm_transfer_agent_binding",
        "torchao",
        "torchvision",
        "triton_kernels",
        "tvm_ffi",
        "xgrammar",
    }
)
"""Packages that are replaced where they are not installed."""


class CheckoutFinder(importlib.abc.MetaPathFinder):
    """Finds ``tensorrt_llm`` in the checkout, whatever else is installed."""

    def __init__(self, source: Path) -> None:
        self._source = source
        self._is_prepared = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "tensorrt_llm":
            return PathFinder.find_spec(fullname, [str(self._source)])
        # Whoever only looks for the package pays nothing: the first submodule means that it is imported.
        if fullname.startswith("tensorrt_llm.") and not self._is_prepared:
            self._is_prepared = True
            prepare()
            sys.meta_path.append(StandInFinder())
        return None


class StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last finder: it is asked for what nobody else has."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        top, _, rest = fullname.partition(".")
        is_compiled = top == "tensorrt_llm" and rest.startswith(COMPILED)
        if is_compiled or top in OPTIONAL or fullname.endswith("._rawref"):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return StandInModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def install() -> None:
    """Make ``import tensorrt_llm`` work in this process. Imports nothing large yet.

    Raises:
        ValueError: TRTLLM_SOURCE is not a folder that holds ``tensorrt_llm/``.
    """
    if any(isinstance(finder, CheckoutFinder) for finder in sys.meta_path):
        return
    source = Path(os.environ[SOURCE_VARIABLE]).resolve()
    if not (source / "tensorrt_llm" / "__init__.py").is_file():
        raise ValueError(
            f"{SOURCE_VARIABLE}={source} has no tensorrt_llm/__init__.py: name the folder of a "
            "TensorRT-LLM checkout"
        )
    # Not first: a finder that watches imports, such as dwdp's, has to stay in front.
    sys.meta_path.insert(sys.meta_path.index(PathFinder), CheckoutFinder(source))
    ctypes.cdll.LoadLibrary = _without_libpython(ctypes.cdll.LoadLibrary)  # type: ignore[method-assign]
    # TensorRT-LLM's own switch: it then loads neither its plugin library nor its operators.
    os.environ["TRT_LLM_NO_LIB_INIT"] = "1"
    # What the .pth of an installed dwdp does; there may be one on PYTHONPATH only.
    import dwdp.engines.tensorrt_llm.startup  # noqa: F401


def prepare() -> None:
    """What has to be so before TensorRT-LLM's modules run."""
    # These look for optional packages themselves, and shall see what is really there.
    import pandas  # noqa: F401
    import torch
    import torch.utils.flop_counter
    import transformers  # noqa: F401
    import triton  # noqa: F401

    if not torch.cuda.is_available():
        # The real one raises where there is no driver.
        sys.modules["pynvml"] = StandInModule("pynvml")
    for namespace in ("trtllm", "auto_deploy"):
        setattr(torch.classes, namespace, _NoClasses())


class _NoClasses:
    """A namespace of ``torch.classes`` in which there is nothing; torch's own would look for a library."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


def _without_libpython(load: Callable[[str], Any]) -> Callable[[str], Any]:
    """TensorRT-LLM loads libpython again for its bindings; a static interpreter has none."""
    return lambda name: None if "libpython" in str(name) else load(name)
