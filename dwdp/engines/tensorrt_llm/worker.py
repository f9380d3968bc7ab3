"""One worker's part in a group: from the loading of its model to its shutdown.

A worker is a process that computes. It joins the group when its main model is loaded, before the KV cache
is sized, and leaves when the worker shuts down. The executor that TensorRT-LLM makes first, to size the
KV cache with, comes and goes in between.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from dwdp.config import DwdpConfig
from dwdp.engines.tensorrt_llm import forward, launch, log, sharding, workspace
from dwdp.engines.tensorrt_llm.arguments import config_of
from dwdp.engines.tensorrt_llm.conflicts import value_of
from dwdp.engines.tensorrt_llm.sharing import SharedModel, share_experts
from dwdp.fabric import Fabric, create_fabric
from dwdp.group import Group
from dwdp.launch import DWDP_RANK, discover_launch

_session: WorkerSession | None = None


def patch_model_loader(module: Any) -> None:
    """Wrap ``ModelLoader`` of ``tensorrt_llm._torch.pyexecutor.model_loader``."""
    load: Callable[..., tuple[Any, Any]] = module.ModelLoader.load
    reload = module.ModelLoader.reload

    @functools.wraps(load)
    def load_shared(self: Any, checkpoint_dir: str, checkpoint_loader: Any) -> tuple[Any, Any]:
        config = config_of(self.llm_args)
        if config is None or not _starts_session():
            return load(self, checkpoint_dir, checkpoint_loader)
        try:
            session = _begin_session(self.llm_args, config)
            return session.load(lambda: load(self, checkpoint_dir, checkpoint_loader))
        except BaseException:
            _close_session()
            raise

    @functools.wraps(reload)
    def refuse_reload(self: Any, *args: Any, **kwargs: Any) -> Any:
        if config_of(self.llm_args) is not None:
            raise ValueError(
                "weights cannot be loaded into a model whose experts are shared: its peers read them; "
                'start it anew, or without parallel="dwdp"'
            )
        return reload(self, *args, **kwargs)

    module.ModelLoader.load, module.ModelLoader.reload = load_shared, refuse_reload


def patch_shutdown(module: Any) -> None:
    """Wrap ``shutdown`` of the workers that ``module`` defines.

    For ``tensorrt_llm.executor.worker`` and ``base_worker``; RPC workers inherit from the latter.
    """
    for name in ("BaseWorker", "GenerationExecutorWorker"):
        worker = vars(module).get(name)
        if worker is not None and worker.__module__ == module.__name__:
            worker.shutdown = _closing_session(worker.shutdown)


class WorkerSession:
    """Membership of this process in its group.

    Args:
        llm_args: the worker's arguments; its CUDA graphs are turned off where fetches cannot be captured.
        config: what they say about the group.

    Raises:
        LaunchError, ValueError: nobody told this process its rank.
        GroupError: the peers did not come, or failed.
    """

    def __init__(self, llm_args: Any, config: DwdpConfig) -> None:
        self._llm_args = llm_args
        self._config = config
        self._shared: SharedModel | None = None
        environ = launch.environment_of(llm_args)
        launch.end_with_server(environ)
        self._group = _join(config, environ)

    def load(self, load_whole: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        """The model that ``load_whole()`` loads, with shared experts, and what it returns besides.

        Raises:
            ValueError: the model or a setting is not supported.
            GroupError: a peer failed.
            FabricError: memory or descriptors cannot be had.
        """
        group, config = self._group, self._config
        with group.setting_up():
            fabric = _create_fabric(group)
            with sharding.resident_experts_only(sharding.placed_experts(config, group.rank)):
                model, load_balancer = load_whole()
            self._shared = share_experts(model, group, config, fabric)
            given = value_of(self._llm_args, "moe_config.max_num_tokens")
            workspace.limit(self._shared, is_given=given is not None)
            self._settle_compilation(self._shared, fabric)
            forward.wrap(self._shared)
        log.info(_describe(group, self._shared))
        return model, load_balancer

    def close(self) -> None:
        """Leave the group. Peers go on; what they read of this rank stays until they drop it. Idempotent."""
        shared, self._shared = self._shared, None
        if shared is not None:
            with ExitStack() as closed:
                closed.callback(shared.close)
                _synchronize()

    def _settle_compilation(self, shared: SharedModel, fabric: Fabric) -> None:
        """Turn off what would run a layer without its wrappers, or refuse it."""
        if not shared.runtime.is_staged:
            return
        arguments = self._llm_args
        if arguments.torch_compile_config is not None:
            traced = [layer for layer in shared.layers if not _is_operator(layer.moe)]
            if traced:
                raise ValueError(
                    f"torch_compile_config is given, but torch.compile would trace {len(traced)} MoE layers "
                    "of this model, and with them the waits for their experts; leave it out"
                )
        if arguments.cuda_graph_config is not None and fabric.name != "cuda":
            arguments.cuda_graph_config = None
            log.info(f"no CUDA graphs: fetches of the {fabric.name} fabric cannot be captured")


def _starts_session() -> bool:
    """Whether the model being loaded is the worker's first one: the main model.

    Those after it draft for it. They are small, and every rank loads them whole.
    """
    if _session is None:
        return True
    log.info("the draft model's experts are not shared: every rank loads it whole")
    return False


def _begin_session(llm_args: Any, config: DwdpConfig) -> WorkerSession:
    global _session
    _session = WorkerSession(llm_args, config)
    return _session


def _close_session() -> None:
    global _session
    session, _session = _session, None
    if session is not None:
        session.close()


def _closing_session(shutdown: Any) -> Any:
    @functools.wraps(shutdown)
    def shutdown_and_close(self: Any) -> None:
        try:
            shutdown(self)
        finally:
            # A worker whose construction failed has no arguments yet.
            if config_of(getattr(self, "llm_args", None)) is not None:
                _close_session()

    return shutdown_and_close


def _join(config: DwdpConfig, environ: Mapping[str, str]) -> Group:
    found = discover_launch(environ) if DWDP_RANK in environ else None
    if found is not None:
        return Group.join(found, timeout_s=config.setup_timeout_s)
    if config.dwdp_size > 1:
        raise ValueError(
            f"this worker is to be one of {config.dwdp_size} ranks, but {DWDP_RANK} does not say which; "
            "start it through LLM(...), trtllm-serve or a launcher"
        )
    return Group.single()


def _create_fabric(group: Group) -> Fabric:
    import torch

    if not torch.cuda.is_available():
        return create_fabric("host")
    return create_fabric(
        "cuda", ordinal=torch.cuda.current_device(), across_hosts=not group.is_one_host
    )


def _synchronize() -> None:
    """Wait for kernels that still read experts."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _is_operator(moe: Any) -> bool:
    """Whether torch.compile sees the layer as one operator, which calls it as it is."""
    return bool(getattr(moe, "register_to_config", False))


def _describe(group: Group, shared: SharedModel) -> str:
    stats = shared.runtime.stats()
    counts = {
        (len(sharding.resident_experts(layer.backend) or ()), layer.backend.num_experts)
        for layer in shared.layers
    }
    experts = ", ".join(f"{resident} of {total}" for resident, total in sorted(counts))
    slots = f", {stats.num_slots} slots ({_gib(stats.staging_bytes)})" if stats.num_slots else ""
    return (
        f"rank {group.rank} of {group.size}: {experts} experts resident "
        f"({_gib(stats.resident_expert_bytes)} in {len(shared.layers)} MoE layers), "
        f"fetch mode {stats.fetch_mode}{slots}"
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
