"""The constants that the paper's figures fix, and how: each from one cell, none from what it predicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import fmean

from dwdp.perf import paper
from dwdp.perf.fetches import SERIAL_FIXED, FetchPolicy
from dwdp.perf.hardware import Achieved, Hardware, load_hardware
from dwdp.perf.model import Model
from dwdp.perf.model_config import load_model
from dwdp.perf.operators import Batch
from dwdp.perf.roofline import Group, iteration_time
from dwdp.perf.serving import (
    Generation,
    PrefillScenario,
    RateMatch,
    Strategy,
    prefill_rate,
    rate_match,
)
from dwdp.perf.simulator import GroupRun, Interconnect, simulate_group
from dwdp.perf.work import rank_work
from dwdp.perf.workload import Lengths, rank_loads
from dwdp.placement import build_placement

GROUP = Group(4)
LENGTHS = Lengths(8192, ratio=0.8)
MEAN_LENGTH = 7373
PROMPTS_PER_FORWARD = 4  # 32768 tokens hold 4 prompts of 0.8 to 1 times 8192, whatever is drawn
LOAD_CV = 0.2
"""Variation of the load between ranks: what the paper names for the set-up of its breakdown."""
NOISE_CV = 0.05
"""Variation of the time of a layer, which makes ranks drift apart (assumed)."""
GENERATION_GPUS = 32
OUTPUT_TOKENS = 922  # 1024, ratio 0.8
SEEDS = range(4)


@dataclass(frozen=True)
class Constant:
    """One calibrated constant.

    Attributes:
        name, value, unit: what it is.
        from_cell: the paper's figure that fixes it.
    """

    name: str
    value: float
    unit: str
    from_cell: str


@dataclass(frozen=True)
class Calibration:
    """The hardware with what it achieves, the share that generation reaches, and where both are from."""

    hardware: Hardware
    generation_efficiency: float
    constants: tuple[Constant, ...]


def paper_model() -> Model:
    """DeepSeek-R1 as the paper ran it."""
    return load_model("deepseek-r1-nvfp4")


def shares_of_breakdown(hardware: Hardware, model: Model) -> Achieved:
    """Shares of the peaks that make the compute and communication cells of the DEP4 column exact."""
    batch = Batch.prefill([MEAN_LENGTH] * PROMPTS_PER_FORWARD)
    peak = iteration_time(model, hardware.at_peak(), batch, GROUP)
    cells = paper.DEP4_MS
    return Achieved(
        attention=peak.category_s("attention") * 1e3 / cells["attention"],
        dense_gemm=peak.category_s("dense_gemm") * 1e3 / cells["dense GEMM"],
        grouped_gemm=peak.category_s("grouped_gemm") * 1e3 / cells["grouped GEMM"],
        collective=peak.exchange_s * 1e3 / cells["communication"],
        other_s_per_token_layer=cells["others"] / 1e3 / batch.num_tokens / len(model.layers),
    )


def loads_around_1(
    load_cv: float, num_iterations: int, seed: int, skip: int = 0
) -> list[list[float]]:
    """Loads of the paper's ranks whose mean is exactly 1 in what is counted.

    A column of table 3 is one iteration, not a sample of loads. The first ``skip`` are not counted.
    """
    loads = rank_loads(load_cv, GROUP.size, num_iterations, seed)
    mean = fmean(load for rank in loads for load in rank[skip:])
    return [[load / mean for load in rank] for rank in loads]


def breakdown_run(hardware: Hardware, model: Model, policy: FetchPolicy, seed: int = 0) -> GroupRun:
    """The DWDP4 column's iteration, simulated."""
    work = rank_work(model, hardware, Batch.prefill([MEAN_LENGTH] * PROMPTS_PER_FORWARD), GROUP)
    loads = loads_around_1(LOAD_CV, 5, seed, skip=1)
    return simulate_group(
        [[work.scaled(load) for load in rank] for rank in loads],
        build_placement(model.moe.num_experts, GROUP.size),
        model.expert_bytes(model.moe),
        Interconnect.of(hardware),
        policy,
        noise_cv=NOISE_CV,
        seed=seed,
    )


def end_to_end(
    hardware: Hardware,
    model: Model,
    strategy: Strategy,
    efficiency: float,
    tps_per_user: float,
    max_num_tokens: int = 32768,
) -> RateMatch:
    """A matched deployment as in the paper's end-to-end study."""
    generation = Generation(
        model,
        hardware,
        GENERATION_GPUS,
        MEAN_LENGTH + OUTPUT_TOKENS // 2,
        efficiency=efficiency,
    )
    rate = _prefill(hardware.model_dump_json(), strategy, max_num_tokens)
    match = rate_match(rate, generation, MEAN_LENGTH, OUTPUT_TOKENS, tps_per_user)
    assert match is not None
    return match


@cache
def calibrate() -> Calibration:
    """Fix every constant, one after the other."""
    hardware, model = load_hardware("gb200"), paper_model()
    achieved = shares_of_breakdown(hardware, model)

    # Not fitted in the simulator: there attention lies beside copies for part of its time only, and no
    # factor makes its cell exact. Compute of real GPUs slows beyond the copies (power).
    slowdown = paper.DWDP4_MS["attention"] / paper.DEP4_MS["attention"]

    def with_copies(link: float) -> Hardware:
        update = {"link": link, "copy_slowdown": slowdown}
        return hardware.model_copy(update={"achieved": achieved.model_copy(update=update)})

    def copy_ms(link: float) -> float:
        runs = [breakdown_run(with_copies(link), model, SERIAL_FIXED, seed) for seed in SEEDS]
        return 1e3 * len(model.moe_layers) * fmean(run.mean_fetch_s(1) for run in runs)

    link = _bisect(lambda share: copy_ms(share) < paper.P2P_COPY_MS, 0.5, 1.0)
    calibrated = with_copies(link)
    first = paper.TABLE_4[0]

    def gain(efficiency: float) -> float:
        tps = (first.low + first.high) / 2
        dep, dwdp = (
            end_to_end(calibrated, model, strategy, efficiency, tps) for strategy in ("dep", "dwdp")
        )
        return dwdp.tps_per_gpu / dep.tps_per_gpu

    efficiency = _bisect(lambda share: gain(share) > first.gain, 0.05, 1.0)
    table_3 = "table 3, DEP4, "
    constants = (
        Constant("attention", achieved.attention, "of bf16 peak", table_3 + "attention"),
        Constant("dense GEMM", achieved.dense_gemm, "of peak", table_3 + "dense GEMM"),
        Constant("grouped GEMM", achieved.grouped_gemm, "of fp4 peak", table_3 + "grouped GEMM"),
        Constant("all-to-all", achieved.collective, "of the link", table_3 + "communication"),
        Constant(
            "others", achieved.other_s_per_token_layer * 1e9, "ns/token/layer", table_3 + "others"
        ),
        Constant(
            "slowdown of compute beside copies",
            slowdown,
            "times",
            "table 3, attention of DWDP4 over DEP4",
        ),
        Constant("copies", link, "of the link", "table 3, DWDP4, P2P copy"),
        Constant(
            "generation",
            efficiency,
            "of the roofline",
            f"table 4, {first.low}-{first.high} TPS/user",
        ),
    )
    final = calibrated.achieved.model_copy(update={"generation": efficiency})
    return Calibration(calibrated.model_copy(update={"achieved": final}), efficiency, constants)


@cache
def _prefill_cached(
    hardware_json: str, strategy: Strategy, max_num_tokens: int, seed: int
) -> float:
    scenario = PrefillScenario(LENGTHS, max_num_tokens, LOAD_CV, NOISE_CV, seed=seed)
    hardware = Hardware.model_validate_json(hardware_json)
    return prefill_rate(
        paper_model(), hardware, GROUP, scenario, strategy, SERIAL_FIXED
    ).tokens_per_s


def _prefill(hardware_json: str, strategy: Strategy, max_num_tokens: int) -> float:
    return fmean(_prefill_cached(hardware_json, strategy, max_num_tokens, seed) for seed in SEEDS)


def _bisect(too_high: Callable[[float], bool], low: float, high: float) -> float:
    """Where ``too_high`` turns true, to three digits."""
    while high - low > 5e-4:
        middle = (low + high) / 2
        if too_high(middle):
            high = middle
        else:
            low = middle
    return (low + high) / 2
