"""Wait for a layer's experts, run, release them: wrappers on the MoE modules of one model.

Where a backend computes (``run_moe``) every stream waits for the layer's fetch, so that routing and
quantisation of the input overlap with it. The layer is released when the outermost forward returns: by
then its chunks have joined on one stream.

| module | waits in | released after |
| --- | --- | --- |
| ConfigurableMoE | ``backend.run_moe`` | ``forward_impl`` |
| Cutlass, TRTLLM-Gen, CuteDSL, DeepGEMM, bare | ``run_moe`` | ``forward_impl`` |
| Triton, which routes inside its kernels | ``forward_impl`` | ``forward_impl`` |
| Vanilla | ``run_experts`` | ``forward`` |

The wrappers are attributes of the instances: ``forward_impl`` is what the eager path and the operator
that stands for the layer under torch.compile both call. They run when a CUDA graph is captured, not
when it is replayed: the fetches are part of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from dwdp.engines.tensorrt_llm import log

if TYPE_CHECKING:
    import torch

    from dwdp.engines.tensorrt_llm.sharing import SharedModel
    from dwdp.runtime import DwdpRuntime

Indices = Callable[[tuple[Any, ...], Mapping[str, Any]], "torch.Tensor | None"]
"""The router's choice, ``[tokens, top_k]``, from the arguments of the wrapped method."""


def wrap(shared: SharedModel) -> None:
    """Put the wrappers on every layer of ``shared``. Nothing to do where remote experts are not staged."""
    if not shared.runtime.is_staged:
        return
    num_rerouted = 0
    for layer in shared.layers:
        if shared.runtime.fetch_mode != "staged":
            num_rerouted += _route_before_the_kernel(layer.moe, layer.backend)
        _wrap_layer(_Bracket(shared.runtime, layer.index), layer.moe, layer.backend)
    if num_rerouted:
        log.info(
            f"{num_rerouted} MoE layers are routed before their kernel instead of inside it: fetches "
            "on demand need the router's choice (fetch_mode staged does not)"
        )


class _Bracket:
    """``begin`` and ``end`` of one layer, however many parts its tokens are computed in.

    A forward of one part may fetch on demand. Parts choose different experts and run on several streams:
    then all experts are fetched.
    """

    def __init__(self, runtime: DwdpRuntime, index: int) -> None:
        self._runtime = runtime
        self._index = index
        self._num_tokens: int | None = None
        self._has_begun = False

    def outer(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """``forward(x, ...)`` of all tokens; releases the layer, also when it raises."""

        def forward_and_release(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else kwargs["x"]
            self._num_tokens = x.shape[:-1].numel()
            try:
                return forward(*args, **kwargs)
            finally:
                self._num_tokens = None
                self._release()

        return forward_and_release

    def inner(self, run: Callable[..., Any], indices_of: Indices) -> Callable[..., Any]:
        """``run`` of some or all tokens, which reads the experts."""

        def wait_and_run(*args: Any, **kwargs: Any) -> Any:
            indices = indices_of(args, kwargs)
            is_outermost = self._num_tokens is None
            if not is_outermost and indices is not None and len(indices) != self._num_tokens:
                indices = None
            self._runtime.begin(self._index, indices)
            self._has_begun = True
            try:
                return run(*args, **kwargs)
            finally:
                if is_outermost:
                    self._release()

        return wait_and_run

    def _release(self) -> None:
        if self._has_begun:
            self._has_begun = False
            self._runtime.end(self._index)


def _wrap_layer(bracket: _Bracket, moe: Any, backend: Any) -> None:
    if hasattr(backend, "run_experts"):
        choice = _sorted_choice(backend.routing_method.experts_per_token)
        backend.run_experts = bracket.inner(backend.run_experts, choice)
        moe.forward = bracket.outer(moe.forward)
    elif _has_run_moe(backend):
        backend.run_moe = bracket.inner(backend.run_moe, _choice)
        moe.forward_impl = bracket.outer(moe.forward_impl)
    else:
        moe.forward_impl = bracket.outer(bracket.inner(moe.forward_impl, _no_choice))


def _has_run_moe(backend: Any) -> bool:
    from tensorrt_llm._torch.modules.fused_moe.interface import MoE

    return type(backend).run_moe is not MoE.run_moe


def _route_before_the_kernel(moe: Any, backend: Any) -> bool:
    """Have ConfigurableMoE route where the backend's kernel would, by its own path for such backends.

    What is fetched and what the kernel reads then follow from one choice. A choice made twice could
    differ where two experts score the same.

    Returns:
        Whether that changes anything.
    """
    if moe is backend or not _has_run_moe(backend) or backend._supports_load_balancer():
        return False
    backend._supports_load_balancer = lambda: True
    return True


def _choice(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Of ``run_moe(x, token_selected_experts, ...)``; None where the kernel routes."""
    return args[1] if len(args) > 1 else kwargs["token_selected_experts"]


def _sorted_choice(top_k: int) -> Indices:
    """Of ``run_experts``, whose fourth argument is the choice of all tokens, sorted: ``[tokens * top_k]``."""

    def choice(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
        experts: torch.Tensor = args[3] if len(args) > 3 else kwargs["sorted_experts"]
        return experts.view(-1, top_k)

    return choice


def _no_choice(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    return None
