"""End to end: prefill and generation servers apart, and what users and owners see of it.

Requests wait in one queue for prefill ("context") GPUs. Under DEP a group takes a batch per rank and all
of it is done when the slowest rank is; under DWDP every rank takes a batch by itself. A prompt's first
token leaves with the prefill. Generation GPUs run all their sequences in step: with b sequences per GPU
each of them gets ``1 / step(b)`` tokens per second (processor sharing).

Prefill times come from the group simulators, generation times from the roofline with expert parallelism over
all generation GPUs. Sending the KV cache from one to the other is left out: it is the same for both.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import fmean
from typing import Literal

from dwdp.perf.dep import simulate_dep
from dwdp.perf.fetches import ALL_AT_ONCE, FetchPolicy
from dwdp.perf.hardware import Hardware
from dwdp.perf.model import Model
from dwdp.perf.operators import Batch
from dwdp.perf.roofline import ONE_COPY_PER_RANK, Collective, Group, iteration_time
from dwdp.perf.simulator import Interconnect, simulate_group
from dwdp.perf.work import rank_work
from dwdp.perf.workload import Lengths, Request, packed_batches, rank_loads
from dwdp.placement import build_placement

Strategy = Literal["dwdp", "dep"]

MAX_SEQUENCES_PER_GPU = 1 << 16
"""More than any scheduler holds; where sequences leave next to nothing in a cache, memory sets no limit."""


@dataclass(frozen=True)
class PrefillScenario:
    """What prefill ranks are given, and how uneven it is.

    Attributes:
        lengths: of the prompts.
        max_num_tokens: per rank and forward.
        load_cv: coefficient of variation of the load between ranks, beside that of the lengths.
        noise_cv: of the time of one layer on one rank.
        num_iterations: forwards per rank that are simulated; the first is not counted.
        seed: of all drawing.
        max_prompts: per rank and forward; None: as many as there is room for.
    """

    lengths: Lengths
    max_num_tokens: int = 32768
    load_cv: float = 0.0
    noise_cv: float = 0.02
    num_iterations: int = 6
    seed: int = 0
    max_prompts: int | None = None


@dataclass(frozen=True)
class PrefillRate:
    """Prefill throughput of one rank.

    Attributes:
        tokens_per_s: per rank.
        iteration_s: mean time of a forward.
        tokens_per_iteration: mean per rank.
        wait_s: mean exposed wait (DWDP) or synchronisation (DEP) per forward.
        fetch_s: mean time of one fetch; 0 under DEP.
    """

    tokens_per_s: float
    iteration_s: float
    tokens_per_iteration: float
    wait_s: float
    fetch_s: float


def prefill_rate(
    model: Model,
    hardware: Hardware,
    group: Group,
    scenario: PrefillScenario,
    strategy: Strategy,
    policy: FetchPolicy = ALL_AT_ONCE,
    collective: Collective = ONE_COPY_PER_RANK,
    num_slots: int = 2,
) -> PrefillRate:
    """Simulate one group on ``scenario``; the same seed gives both strategies the same prompts."""
    iterations = scenario.num_iterations
    batches = [
        packed_batches(
            scenario.lengths,
            scenario.max_num_tokens,
            iterations,
            scenario.seed * 1009 + rank,
            scenario.max_prompts,
        )
        for rank in range(group.size)
    ]
    loads = rank_loads(scenario.load_cv, group.size, iterations, scenario.seed)
    work = [
        [
            rank_work(model, hardware, batch, group, collective).scaled(load)
            for batch, load in zip(batches[rank], loads[rank], strict=True)
        ]
        for rank in range(group.size)
    ]
    tokens = fmean(
        batch.num_tokens * load
        for rank in range(group.size)
        for batch, load in zip(batches[rank][1:], loads[rank][1:], strict=True)
    )
    if strategy == "dep":
        run = simulate_dep(work, scenario.noise_cv, seed=scenario.seed)
    else:
        moe = model.moe
        run = simulate_group(
            work,
            build_placement(
                moe.num_experts, group.size, num_experts_per_worker=group.num_experts_per_worker
            ),
            model.expert_bytes(moe),
            Interconnect.of(hardware),
            policy,
            num_slots,
            scenario.noise_cv,
            scenario.seed,
        )
    iteration_s = run.mean_s(1)
    return PrefillRate(
        tokens / iteration_s, iteration_s, tokens, run.mean_part_s("wait", 1), run.mean_fetch_s(1)
    )


@dataclass(frozen=True)
class Generation:
    """Generation GPUs of one deployment.

    Attributes:
        num_gpus: that share the experts.
        context_tokens: mean length of a sequence while it is generated.
        exchange_latency_s: of one dispatch or combine, whatever its size (assumed, not measured).
        tokens_per_step: accepted per step; above 1 with speculative decoding.
        efficiency: share of the roofline that a step reaches in what grows with the sequences; what one
            sequence takes (reading the weights) is at the roofline.
    """

    model: Model
    hardware: Hardware
    num_gpus: int
    context_tokens: int
    exchange_latency_s: float = 10e-6
    tokens_per_step: float = 1.0
    efficiency: float = 1.0

    def step_s(self, sequences_per_gpu: float) -> float:
        """Time of one step with that many sequences per GPU (interpolated between whole numbers)."""
        low = int(sequences_per_gpu)
        share = sequences_per_gpu - low
        low_s = _decode_step_s(self, max(1, low))
        if not share:
            return low_s
        return low_s + share * (_decode_step_s(self, low + 1) - low_s)

    def tps_per_user(self, sequences_per_gpu: float) -> float:
        """Tokens per second of one sequence."""
        return self.tokens_per_step / self.step_s(sequences_per_gpu)

    def max_sequences_per_gpu(self) -> int:
        """How many sequences' KV caches fit beside the weights, with a tenth of the memory to spare."""
        weights = self.model.dense_bytes + self.model.all_expert_bytes / self.num_gpus
        free = 0.9 * self.hardware.memory_bytes - weights
        per_sequence = self.model.kv_bytes_per_token() * self.context_tokens
        if free < per_sequence:
            return 0
        return int(min(MAX_SEQUENCES_PER_GPU, free / max(1.0, per_sequence)))

    def sequences_at(self, tps_per_user: float) -> int:
        """The most sequences per GPU that fit and still get ``tps_per_user``; 0 if not even one does."""
        low, high = 0, self.max_sequences_per_gpu()
        while low < high:
            middle = (low + high + 1) // 2
            if self.tps_per_user(middle) >= tps_per_user:
                low = middle
            else:
                high = middle - 1
        return low


@lru_cache(maxsize=4096)
def _decode_step_cached(
    model: Model, hardware_json: str, num_gpus: int, context_tokens: int, sequences: int
) -> float:
    hardware = Hardware.model_validate_json(hardware_json)
    batch = Batch.decode(sequences, context_tokens)
    return iteration_time(model, hardware, batch, Group(num_gpus)).dep_s


def _decode_step_s(generation: Generation, sequences: int) -> float:
    hardware_json = generation.hardware.model_dump_json()

    def roofline_s(count: int) -> float:
        return _decode_step_cached(
            generation.model, hardware_json, generation.num_gpus, generation.context_tokens, count
        )

    latency_s = 2 * len(generation.model.moe_layers) * generation.exchange_latency_s
    grown_s = roofline_s(sequences) - roofline_s(1)
    return roofline_s(1) + grown_s / generation.efficiency + latency_s


@dataclass(frozen=True)
class RateMatch:
    """A deployment whose prefill just keeps up with its generation, per request.

    Attributes:
        tps_per_user: tokens per second of one sequence.
        prefill_gpu_s, generation_gpu_s: GPU time that one request takes on either side.
        output_tokens: per request.
    """

    tps_per_user: float
    prefill_gpu_s: float
    generation_gpu_s: float
    output_tokens: int

    @property
    def tps_per_gpu(self) -> float:
        """Output tokens per second and GPU, prefill GPUs included."""
        return self.output_tokens / (self.prefill_gpu_s + self.generation_gpu_s)

    @property
    def prefill_share(self) -> float:
        """Share of the GPUs that prefill."""
        return self.prefill_gpu_s / (self.prefill_gpu_s + self.generation_gpu_s)


def rate_match(
    prefill_tokens_per_s: float,
    generation: Generation,
    input_tokens: float,
    output_tokens: int,
    tps_per_user: float,
) -> RateMatch | None:
    """The matched deployment at ``tps_per_user``; None if generation cannot be that fast.

    ``prefill_tokens_per_s`` is per GPU. A request takes ``input / rate`` of prefill GPU time and, with
    b sequences per GPU, ``output * step(b) / b`` of generation GPU time.
    """
    sequences = generation.sequences_at(tps_per_user)
    if not sequences:
        return None
    generation_gpu_s = (
        output_tokens * generation.step_s(sequences) / sequences / generation.tokens_per_step
    )
    return RateMatch(
        generation.tps_per_user(sequences),
        input_tokens / prefill_tokens_per_s,
        generation_gpu_s,
        output_tokens,
    )


@dataclass(frozen=True)
class Deployment:
    """GPUs that serve together.

    Attributes:
        strategy: of the prefill side.
        num_prefill_ranks: under DEP a multiple of ``group_size``.
        group_size: ranks per group.
        prefill_s: time of a forward of that many tokens on one rank, waits included.
        max_num_tokens: per rank and forward.
        generation: the other side.
    """

    strategy: Strategy
    num_prefill_ranks: int
    group_size: int
    prefill_s: Callable[[int], float]
    max_num_tokens: int
    generation: Generation

    @property
    def num_gpus(self) -> int:
        """Prefill and generation GPUs."""
        return self.num_prefill_ranks + self.generation.num_gpus


@dataclass(frozen=True)
class ServingResult:
    """What users and owners see.

    Attributes:
        tps_per_user: mean over requests of tokens per second while generating.
        tps_per_gpu: output tokens per second over all GPUs.
        ttft_s: times to first token, ascending, queueing included.
        prefill_busy: share of the time that prefill ranks computed.
    """

    tps_per_user: float
    tps_per_gpu: float
    ttft_s: tuple[float, ...]
    prefill_busy: float

    def ttft_percentile_s(self, percent: float) -> float:
        """The ``percent``-th percentile of the time to first token (nearest rank)."""
        return self.ttft_s[max(0, math.ceil(len(self.ttft_s) * percent / 100) - 1)]


def serve(deployment: Deployment, requests: Sequence[Request]) -> ServingResult:
    """Serve ``requests`` (by arrival) to the end.

    Raises:
        ValueError: no requests, prefill ranks that do not make whole groups under DEP, or generation GPUs
            without room for a single sequence.
    """
    if not requests:
        raise ValueError("There are no requests to serve.")
    generation = deployment.generation
    if not generation.max_sequences_per_gpu():
        raise ValueError(
            f"{generation.num_gpus} generation GPUs have no memory for {generation.model.name} and a "
            f"sequence of {generation.context_tokens} tokens: use more GPUs."
        )
    per_server = deployment.group_size if deployment.strategy == "dep" else 1
    if deployment.num_prefill_ranks < per_server or deployment.num_prefill_ranks % per_server:
        raise ValueError(
            f"{deployment.num_prefill_ranks} prefill ranks do not make groups of {per_server}."
        )
    first_tokens, busy_s = _prefill(deployment, requests, per_server)
    finished, speeds = _generate(deployment.generation, requests, first_tokens)
    span_s = max(finished) - requests[0].arrival_s
    output_tokens = sum(request.output_tokens for request in requests)
    ttft = sorted(
        first - request.arrival_s for first, request in zip(first_tokens, requests, strict=True)
    )
    prefill_span_s = max(first_tokens) - requests[0].arrival_s
    return ServingResult(
        fmean(speeds),
        output_tokens / span_s / deployment.num_gpus,
        tuple(ttft),
        busy_s / (deployment.num_prefill_ranks // per_server) / prefill_span_s,
    )


def _prefill(
    deployment: Deployment, requests: Sequence[Request], ranks_per_server: int
) -> tuple[list[float], float]:
    """When each request has its first token, and for how long servers were busy in all."""
    first_tokens = [0.0] * len(requests)
    servers = [(0.0, server) for server in range(deployment.num_prefill_ranks // ranks_per_server)]
    heapq.heapify(servers)
    waiting = deque(enumerate(requests))
    busy_s = 0.0
    while waiting:
        free_s, server = heapq.heappop(servers)
        start_s = max(free_s, waiting[0][1].arrival_s)
        loads = [0] * ranks_per_server
        taken: list[int] = []
        while waiting and waiting[0][1].arrival_s <= start_s:
            index, request = waiting[0]
            rank = loads.index(min(loads))
            if loads[rank] and loads[rank] + request.input_tokens > deployment.max_num_tokens:
                break
            loads[rank] += request.input_tokens
            taken.append(index)
            waiting.popleft()
        # A DEP group is as slow as its fullest rank; prefill_s has the synchronisation of full batches.
        seconds = deployment.prefill_s(max(loads))
        for index in taken:
            first_tokens[index] = start_s + seconds
        busy_s += seconds
        heapq.heappush(servers, (start_s + seconds, server))
    return first_tokens, busy_s


def _generate(
    generation: Generation, requests: Sequence[Request], first_tokens: Sequence[float]
) -> tuple[list[float], list[float]]:
    """When each request ends, and its tokens per second.

    All sequences progress alike, so a sequence ends when the tokens that each has been given since it
    joined reach its output length.
    """
    joins = deque(sorted((first, index) for index, first in enumerate(first_tokens)))
    capacity = generation.num_gpus * generation.max_sequences_per_gpu()
    active: list[tuple[float, int]] = []  # (tokens given to everyone at its end, request)
    joined_s: dict[int, float] = {}
    finished = [0.0] * len(requests)
    now, given = 0.0, 0.0
    while joins or active:
        may_join = joins and len(active) < capacity
        rate = generation.tps_per_user(len(active) / generation.num_gpus) if active else 0.0
        end_s = now + (active[0][0] - given) / rate if active else float("inf")
        if may_join and joins[0][0] <= end_s:
            join_s = max(now, joins[0][0])
            given += rate * (join_s - now)
            now = join_s
            index = joins.popleft()[1]
            heapq.heappush(active, (given + max(1, requests[index].output_tokens - 1), index))
            joined_s[index] = now
            continue
        given, now = active[0][0], end_s
        index = heapq.heappop(active)[1]
        finished[index] = now
    speeds = [
        max(1, request.output_tokens - 1) / max(1e-9, finished[index] - joined_s[index])
        for index, request in enumerate(requests)
    ]
    return finished, speeds


def prefill_curve(
    model: Model,
    hardware: Hardware,
    group: Group,
    scenario: PrefillScenario,
    strategy: Strategy,
    policy: FetchPolicy = ALL_AT_ONCE,
) -> Callable[[int], float]:
    """Time of a forward as a function of the tokens of a rank, from simulations at a few sizes."""
    isl = round(scenario.lengths.mean)
    counts = sorted({1, 2, 4, max(1, scenario.max_num_tokens // isl)})
    counts = [count for count in counts if count * isl <= max(isl, scenario.max_num_tokens)]
    points = [(0, 0.0)]
    for count in counts:
        sized = replace(
            scenario,
            lengths=Lengths(isl),
            max_num_tokens=count * isl,
            num_iterations=max(3, scenario.num_iterations),
        )
        rate = prefill_rate(model, hardware, group, sized, strategy, policy)
        points.append((count * isl, rate.iteration_s))

    def seconds(tokens: int) -> float:
        below = max((point for point in points if point[0] <= tokens), default=points[0])
        above = min((point for point in points if point[0] > tokens), default=None)
        if below[0] == 0 and above is not None:
            return above[1]  # A short forward still waits for its fetches.
        if above is None:
            return below[1] * tokens / below[0]
        share = (tokens - below[0]) / (above[0] - below[0])
        return below[1] + share * (above[1] - below[1])

    return seconds
