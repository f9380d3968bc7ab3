"""Jobs for ranks of a :class:`rank_pool.RankPool`: whole models, bare runtimes, graphs, full memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_support import cuda_fabric, odd_layers
from rank_pool import RankProcess
from ranks import layers_of, load, reference
from transformers import AutoModelForCausalLM, PreTrainedModel

import dwdp.engines.transformers as engine
from dwdp.config import DwdpConfig
from dwdp.group import Group
from dwdp.runtime import DwdpRuntime
from dwdp.weights import LayerSpec

MIB = 1 << 20
LENGTHS = (11, 1, 200)
AUTO_MAX_TOKENS = 16


def tokens_of(length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(3, 128, (1, length), generator=generator).cuda()


def config_of(size: int, mode: str, **options: Any) -> DwdpConfig:
    if mode == "auto":
        options["demand_max_tokens"] = AUTO_MAX_TOKENS
    return DwdpConfig(dwdp_size=size, fetch_mode=mode, slice_bytes=MIB, **options)


def whole_model(process: RankProcess, checkpoint: str) -> PreTrainedModel:
    """The unsharded model on this rank's GPU."""
    if checkpoint not in process.kept:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
        process.kept[checkpoint] = model.cuda().eval()
    model = process.kept[checkpoint]
    assert isinstance(model, PreTrainedModel)
    return model


def load_model(
    process: RankProcess, group: Group, checkpoint: str, config: DwdpConfig
) -> engine.Attachment:
    device = f"cuda:{torch.cuda.current_device()}"
    return engine.load(checkpoint, group, config, dtype="bfloat16", device=device)


@torch.inference_mode()
def compare_models(
    process: RankProcess, name: str, size: int, checkpoint: str, mode: str, share: int | None
) -> dict[str, Any]:
    """Logits and greedy tokens against the unsharded model's; returns the runtime's counters."""
    whole = whole_model(process, checkpoint)
    config = config_of(size, mode, num_experts_per_worker=share)
    with load_model(process, process.group(name, size), checkpoint, config) as attachment:
        for _ in range(2):
            for length in LENGTHS:
                tokens = tokens_of(length)
                expected = whole(tokens, use_cache=False).logits
                actual = attachment.model(tokens, use_cache=False).logits
                assert torch.equal(actual, expected), f"{length} tokens"
        assert greedy(attachment.model) == greedy(whole)
        return dict(vars(attachment.runtime.stats()))


def greedy(model: PreTrainedModel) -> list[int]:
    output = model.generate(tokens_of(9), max_new_tokens=8, do_sample=False, pad_token_id=0)
    return output[0].tolist()


@torch.inference_mode()
def replay_model(
    process: RankProcess, name: str, size: int, checkpoint: str, mode: str
) -> str | None:
    """A captured forward, replayed with other inputs, against the unsharded model's.

    Returns why the unsharded model cannot be captured, where it cannot.
    """
    try:
        expected, expected_logits = capture(whole_model(process, checkpoint))
    except RuntimeError as error:
        return str(error)
    config = config_of(size, mode)
    with load_model(process, process.group(name, size), checkpoint, config) as attachment:
        replay, logits = capture(attachment.model)
        for seed in range(4):
            tokens = tokens_of(24, seed)
            expected(tokens)
            replay(tokens)
            torch.cuda.synchronize()
            assert torch.equal(logits, expected_logits), f"replay {seed}"
            eager = attachment.model(tokens, use_cache=False).logits
            whole = whole_model(process, checkpoint)(tokens, use_cache=False).logits
            assert torch.equal(eager, whole), f"eager forward after replay {seed}"
        del replay
    return None


def capture(model: PreTrainedModel) -> tuple[Callable[[torch.Tensor], None], torch.Tensor]:
    """A function that replays the model's forward, and where its logits lie."""
    tokens = tokens_of(24, seed=99)

    def forward() -> torch.Tensor:
        logits: torch.Tensor = model(tokens, use_cache=False).logits
        return logits

    graph, logits = captured(forward)

    def replay(replacement: torch.Tensor) -> None:
        tokens.copy_(replacement)
        graph.replay()

    return replay, logits


def captured(forward: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Warm up on a side stream, as torch asks, then capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            forward()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = forward()
    return graph, output


def runtime_of(
    process: RankProcess, name: str, size: int, mode: str, layers: list[LayerSpec]
) -> tuple[DwdpRuntime, list[dict[str, torch.Tensor]]]:
    """An attached runtime, and the whole tensors on the device."""
    full = reference(layers)
    group = process.group(name, size)
    with group.setting_up():
        runtime = DwdpRuntime(group, config_of(size, mode), cuda_fabric())
        load(runtime.allocate(layers), group.rank, full)
        runtime.attach()
    return runtime, [{key: tensor.cuda() for key, tensor in layer.items()} for layer in full]


@torch.inference_mode()
def replay_runtime(process: RankProcess, name: str, size: int, mode: str) -> None:
    """Captured reads of the experts that a router chose, replayed with other choices."""
    layers = odd_layers()
    runtime, full = runtime_of(process, name, size, mode, layers)
    with runtime:
        choice = torch.zeros((6, 2), dtype=torch.int64, device="cuda")

        def forward() -> torch.Tensor:
            read = []
            for index in range(len(layers)):
                runtime.begin(index, choice)
                read += [chosen(tensor, choice) for tensor in runtime.tensors(index).values()]
                runtime.end(index)
            return torch.cat(read)

        graph, output = captured(forward)
        for seed in range(6):
            generator = torch.Generator().manual_seed(10 * seed + process.rank)
            choice.copy_(torch.rand(6, 10, generator=generator).topk(2).indices)
            graph.replay()
            torch.cuda.synchronize()
            expected = [chosen(tensor, choice) for layer in full for tensor in layer.values()]
            assert torch.equal(output, torch.cat(expected)), f"replay {seed}"
            if seed % 2:
                assert torch.equal(forward(), torch.cat(expected)), f"forward after replay {seed}"
        del graph


def chosen(tensor: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
    """The bits of the chosen experts, flat: as int32, because random bytes can be NaN."""
    rows = tensor.view(torch.int32).reshape(tensor.shape[0], -1)
    return rows.index_select(0, choice.flatten()).flatten()


def keep_runtimes(process: RankProcess, name: str, size: int, modes: Sequence[str]) -> None:
    """Attach in every mode, and keep the runtimes for ``verified_forwards``."""
    process.kept["runtimes"] = [
        runtime_of(process, f"{name}/{mode}", size, mode, odd_layers()) for mode in modes
    ]


@torch.inference_mode()
def verified_forwards(process: RankProcess, at_least: int) -> int:
    """Forwards in all modes that compare every expert, until told to stop; returns how many."""
    num_forwards = 0
    while num_forwards < at_least or not process.is_told_to_stop():
        wrong = sum(map(num_wrong_tensors, process.kept["runtimes"]))
        num_forwards += 1
        assert not int(wrong), f"forward {num_forwards} read wrong bytes"
        if num_forwards == 1:
            process.say("started")
    return num_forwards


def num_wrong_tensors(attached: tuple[DwdpRuntime, list[dict[str, torch.Tensor]]]) -> torch.Tensor:
    """One forward that compares every expert, on the device."""
    runtime, full = attached
    everything = torch.arange(10, device="cuda").view(-1, 1)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for index, layer in enumerate(full):
        runtime.begin(index, everything)
        for key, tensor in runtime.tensors(index).items():
            wrong += (tensor.view(torch.int32) != layer[key].view(torch.int32)).any()
        runtime.end(index)
    return wrong


def drop_runtimes(process: RankProcess) -> None:
    for runtime, _ in process.kept.pop("runtimes"):
        runtime.detach()


def fill_memory(process: RankProcess, leave_bytes: int) -> None:
    """Take all but ``leave_bytes`` of the device's free memory."""
    num_bytes = torch.cuda.mem_get_info()[0] - leave_bytes
    process.kept["filler"] = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")


def free_memory(process: RankProcess) -> None:
    process.kept.pop("filler", None)


def free_device_bytes(process: RankProcess) -> int:
    return int(torch.cuda.mem_get_info()[0])


def large_layers() -> list[LayerSpec]:
    """512 MiB of experts in four layers."""
    return layers_of((4096, 1024), num_layers=4, num_experts=8)


def attach_large(process: RankProcess, name: str, size: int) -> str:
    """Attach ``large_layers`` in staged mode and detach; returns what went wrong, or nothing."""
    group = process.group(name, size)
    try:
        with group.setting_up():
            with DwdpRuntime(group, config_of(size, "staged"), cuda_fabric()) as runtime:
                runtime.allocate(large_layers())
                runtime.attach()
                torch.cuda.synchronize()
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def still_computes(process: RankProcess) -> float:
    """Torch's own use of the device goes on."""
    return float(torch.arange(1000.0, device="cuda").sum().item())
