"""A worker joins its group with its main model, and leaves it when it shuts down."""

from __future__ import annotations

import copy
import gc
import inspect
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dwdp.engines.tensorrt_llm import worker
from dwdp.engines.tensorrt_llm.worker import WorkerSession
from dwdp.rendezvous import GroupError, serve_store

NUM_EXPERTS, NUM_RANKS, TIMEOUT_S = 6, 2, 300


class Arguments(SimpleNamespace):
    """Those of ``LLM`` that a worker looks at."""


def arguments(rank: int, store: Any, **changes: Any) -> Arguments:
    settings: dict[str, Any] = {
        "parallel": "dwdp",
        "dwdp_config": {"dwdp_size": NUM_RANKS, "fetch_mode": "staged", "setup_timeout_s": 300.0},
        "env_overrides": {
            "DWDP_RANK": str(rank),
            "DWDP_WORLD_SIZE": str(NUM_RANKS),
            "DWDP_RENDEZVOUS": f"127.0.0.1:{store.port}",
            "DWDP_STORE_IS_SERVED": "1",
        },
        "cuda_graph_config": "as the user gave it",
        "torch_compile_config": None,
    }
    return Arguments(**{**settings, **changes})


def loader_of(llm_args: Any) -> Any:
    """TensorRT-LLM's own ``ModelLoader``, made for nothing but loading."""
    from tensorrt_llm._torch.pyexecutor.model_loader import ModelLoader
    from tensorrt_llm.mapping import Mapping

    return ModelLoader(llm_args, Mapping(), None, None, max_num_tokens=64, max_seq_len=None)


class Checkpoint:
    """Where ``ModelLoader.load`` gets weights from."""

    def __init__(self, layers: list[dict[str, torch.Tensor]]) -> None:
        self._layers = layers

    def load_weights(self, directory: str, mapping: Any) -> list[dict[str, torch.Tensor]]:
        return [dict(layer) for layer in self._layers]

    def get_initialized_weight_mapper(self, model: Any, config: Any) -> None:
        return None


@pytest.fixture
def checkpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Checkpoint]:
    """A tiny model's, which TensorRT-LLM's ``ModelLoader`` then makes and loads on a pretended GPU."""
    import moe_models
    from pretend_cuda import PretendCuda, pretend_gpu
    from tensorrt_llm._torch.pyexecutor import model_loader
    from tensorrt_llm.llmapi.llm_args import LoadFormat
    from tensorrt_llm.mapping import Mapping

    case = moe_models.Case("CUTLASS", None, 90, moe_models.plain)
    monkeypatch.setattr(moe_models, "NUM_LAYERS", 4)

    class Model(moe_models.Model):
        def __init__(self) -> None:
            super().__init__([moe_models._make_layer(case, i, NUM_EXPERTS) for i in range(4)])
            for layer in self.layers:
                layer.create_weights()

        def load_weights(self, weights: list[dict[str, torch.Tensor]]) -> None:
            for layer, own in zip(self.layers, weights, strict=True):
                layer.backend.load_weights([own])

    original = inspect.unwrap(model_loader.ModelLoader.load)

    def load_on_pretended_gpu(self: Any, *args: Any) -> Any:
        with PretendCuda():
            return original(self, *args)

    config = SimpleNamespace(
        moe_load_balancer=None,
        mapping=Mapping(),
        pretrained_config=SimpleNamespace(architectures=["Tiny"]),
    )
    auto_model = SimpleNamespace(from_config=lambda _: Model())
    monkeypatch.setattr(model_loader, "AutoModelForCausalLM", auto_model)
    monkeypatch.setattr(Arguments, "load_format", LoadFormat.AUTO, raising=False)
    monkeypatch.setattr(
        model_loader.ModelLoader, "_load_and_validate_config", lambda *_: copy.copy(config)
    )
    monkeypatch.setattr(model_loader.ModelLoader, "load", load_on_pretended_gpu)
    monkeypatch.setattr(model_loader.ModelLoader, "reload", model_loader.ModelLoader.reload)
    worker.patch_model_loader(model_loader)
    with pretend_gpu(90):
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None)
        )
        yield Checkpoint(moe_models.make_checkpoint(case, NUM_EXPERTS))
    worker._close_session()


def load_as(session: WorkerSession, llm_args: Any, checkpoint: Checkpoint) -> nn.Module:
    """What the wrapper of ``ModelLoader.load`` does, in a session that is not this process's own."""
    loader = loader_of(llm_args)
    model, _ = session.load(lambda: type(loader).load.__wrapped__(loader, "model", checkpoint))
    return model


def load_peer(llm_args: Any, checkpoint: Checkpoint) -> tuple[WorkerSession, nn.Module]:
    from dwdp.engines.tensorrt_llm.arguments import config_of

    session = WorkerSession(llm_args, config_of(llm_args))  # type: ignore[arg-type]
    return session, load_as(session, llm_args, checkpoint)


def outputs(model: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(9, 256, generator=generator).bfloat16()
    logits = torch.randn(9, NUM_EXPERTS, generator=generator).bfloat16()
    return [layer(x, logits) for layer in model.layers]


def descriptors() -> dict[str, str]:
    """What is open in this process, by descriptor."""
    gc.collect()
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # The one that lists them.
            found[name] = os.readlink(f"/proc/self/fd/{name}")
    return found


@pytest.mark.trtllm
def test_a_model_is_shared_while_its_worker_lives(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorrt_llm.executor.base_worker import BaseWorker
    from tensorrt_llm.executor.worker import GenerationExecutorWorker
    from tensorrt_llm.logger import logger

    logged: list[str] = []
    monkeypatch.setattr(logger, "info", lambda *text: logged.append(" ".join(map(str, text))))
    whole, _ = loader_of(Arguments(parallel=None)).load("model", checkpoint)
    expected = outputs(whole)
    assert not any("dwdp" in text for text in logged)
    store = serve_store("127.0.0.1", 0, NUM_RANKS)
    before = descriptors()
    own, peers = arguments(0, store), arguments(1, store)
    with ThreadPoolExecutor() as others:
        peer = others.submit(load_peer, peers, checkpoint)
        model, load_balancer = loader_of(own).load("model", checkpoint)
        peer_session, peer_model = peer.result(TIMEOUT_S)
    assert load_balancer is None
    assert any("rank 0 of 2: 3 of 6 experts resident" in text for text in logged)
    for computed in (outputs(model), outputs(peer_model), outputs(model)):
        assert all(map(torch.equal, computed, expected))
    # Fetches of the host fabric cannot be captured.
    assert own.cuda_graph_config is None
    assert any("no CUDA graphs" in text for text in logged)

    draft, _ = loader_of(own).load("draft model", checkpoint)
    assert draft.layers[0].backend.w3_w1_weight.shape[0] == NUM_EXPERTS
    assert any("draft model's experts are not shared" in text for text in logged)
    with pytest.raises(ValueError, match="weights cannot be loaded into a model whose experts are"):
        loader_of(own).reload(model, {})

    def shut_down(kind: Any, llm_args: Any) -> None:
        kind.shutdown(SimpleNamespace(doing_shutdown=True, llm_args=llm_args))

    shut_down(BaseWorker, Arguments(parallel=None))  # Another LLM's worker in this process.
    assert all(map(torch.equal, outputs(model), expected))
    for kind in (GenerationExecutorWorker, BaseWorker, GenerationExecutorWorker):
        shut_down(kind, own)
    with pytest.raises(RuntimeError, match="after detach"):
        outputs(model)
    assert all(map(torch.equal, outputs(peer_model), expected))
    peer_session.close()
    peer_session.close()
    del model, peer_model, peer_session, draft, peer
    assert descriptors() == before


@pytest.mark.trtllm
def test_a_rank_that_cannot_load_ends_the_others_with_its_reason(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-LLM tries again when a model cannot be made; the reason comes through all the same."""
    from tensorrt_llm._torch.pyexecutor import model_loader

    make = model_loader.AutoModelForCausalLM.from_config
    main_thread = threading.get_ident()

    def fail_on_rank_0(config: Any) -> Any:
        if threading.get_ident() == main_thread:
            raise ValueError("layer 3 is of no supported kind")
        return make(config)

    monkeypatch.setattr(
        model_loader, "AutoModelForCausalLM", SimpleNamespace(from_config=fail_on_rank_0)
    )
    store = serve_store("127.0.0.1", 0, NUM_RANKS)
    before = descriptors()
    with ThreadPoolExecutor() as others:
        peer = others.submit(load_peer, arguments(1, store), checkpoint)
        with pytest.raises(ValueError, match="layer 3 is of no supported kind"):
            loader_of(arguments(0, store)).load("model", checkpoint)
        with pytest.raises(GroupError, match="rank 0: layer 3 is of no supported kind"):
            peer.result(TIMEOUT_S)
    assert worker._session is None
    del peer
    assert descriptors() == before


@pytest.mark.trtllm
def test_a_compiled_model_must_not_trace_the_waits(checkpoint: Checkpoint) -> None:
    store = serve_store("127.0.0.1", 0, NUM_RANKS)
    compiled = {"torch_compile_config": object()}

    def load(rank: int) -> None:
        llm_args = arguments(rank, store, **compiled)
        session, _ = load_peer(llm_args, checkpoint)
        shared = session._shared
        assert shared is not None
        shared.layers[2].moe.register_to_config = False
        try:
            with pytest.raises(ValueError, match=r"torch\.compile would trace 1 MoE layers"):
                session._settle_compilation(shared, SimpleNamespace(name="host"))  # type: ignore[arg-type]
        finally:
            session.close()

    with ThreadPoolExecutor() as ranks:
        for done in [ranks.submit(load, rank) for rank in range(NUM_RANKS)]:
            done.result(TIMEOUT_S)


def test_a_worker_that_nobody_told_its_rank_says_so() -> None:
    llm_args = arguments(0, SimpleNamespace(port=1), env_overrides={})
    config = worker.config_of(llm_args)
    assert config is not None
    with pytest.raises(ValueError, match="to be one of 2 ranks, but DWDP_RANK does not say which"):
        WorkerSession(llm_args, config)


def test_nothing_is_different_for_other_models() -> None:
    class ModelLoader:
        llm_args = Arguments(parallel=None)

        def load(self, checkpoint_dir: str, checkpoint_loader: Any) -> tuple[str, None]:
            return checkpoint_dir, None

        def reload(self, model: Any, weights: Any, allow_partial_loading: bool = False) -> bool:
            return allow_partial_loading

    class BaseWorker:
        num_shutdowns = 0

        def shutdown(self) -> None:
            self.num_shutdowns += 1

    worker.patch_model_loader(SimpleNamespace(ModelLoader=ModelLoader))
    worker.patch_shutdown(SimpleNamespace(__name__=__name__, BaseWorker=BaseWorker))
    assert ModelLoader().load("a model", None) == ("a model", None)
    assert ModelLoader().reload(None, None, allow_partial_loading=True)
    unfinished = BaseWorker()  # Its construction failed before it had arguments.
    unfinished.shutdown()
    assert unfinished.num_shutdowns == 1
