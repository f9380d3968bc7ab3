"""What the paper measured (arXiv 2604.01621; tables also in TensorRT-LLM tech blog 19). Facts only."""

from __future__ import annotations

from typing import Literal, NamedTuple

BreakdownRow = Literal[
    "attention",
    "grouped GEMM",
    "dense GEMM",
    "others",
    "communication",
    "synchronisation",
    "iteration",
]


class RooflineRow(NamedTuple):
    """One row of table 1: DeepSeek-R1 prefill on GB200, one prompt, DWDP4 against DEP4."""

    isl: int
    compute_to_prefetch: float
    dep_to_dwdp: float


TABLE_1 = (
    RooflineRow(1024, 0.19, 0.10),
    RooflineRow(8192, 0.62, 0.73),
    RooflineRow(16384, 1.52, 1.27),
    RooflineRow(32768, 4.77, 1.17),
)

DEP4_MS: dict[BreakdownRow, float] = {
    "attention": 269.67,
    "grouped GEMM": 342.40,
    "dense GEMM": 177.50,
    "others": 241.69,
    "communication": 126.74,
    "synchronisation": 161.85,
    "iteration": 1319.85,
}
"""Table 3, DEP4: ISL 8K, ratio 0.8, 32768 tokens per rank. Printed as us; see ``UNITS_OF_TABLE_3``."""

DWDP4_MS: dict[BreakdownRow, float] = {
    "attention": 320.56,
    "grouped GEMM": 337.42,
    "dense GEMM": 189.28,
    "others": 284.32,
    "communication": 0.0,
    "synchronisation": 0.0,
    "iteration": 1131.58,
}
"""Table 3, DWDP4."""

P2P_COPY_MS = 429.00
"""Table 3, DWDP4: copies, which run beside compute."""

UNITS_OF_TABLE_3 = (
    "The table says us. Only ms per whole iteration is possible: 429 us for the 4.76 GB that a rank fetches "
    "per layer would be 11 TB/s over a link of 0.9 TB/s; 429 ms for the 276 GB of 58 layers is 643 GB/s."
)

SYNCHRONISATION_SHARE_AT_CV_20 = (0.10, 0.12)
"""Share of a DEP iteration spent waiting for other ranks, when per-rank lengths vary with CV 20 %."""

CONTENTION_GAIN = 1.08
"""TPS/GPU with slices in turn over without: ISL 8K, ratio 0.5, 16384 tokens per rank."""


class EndToEndRow(NamedTuple):
    """One row of table 4: output TPS/GPU of DWDP over DEP in a range of TPS/user, ISL 8K, OSL 1K."""

    low: int
    high: int
    gain: float


TABLE_4 = (
    EndToEndRow(20, 30, 1.10),
    EndToEndRow(40, 50, 1.08),
    EndToEndRow(60, 70, 1.10),
    EndToEndRow(80, 90, 1.06),
    EndToEndRow(170, 180, 0.97),
)

MEAN_GAIN_20_TO_100 = 1.088


class DeploymentRow(NamedTuple):
    """A DEP deployment of the published matrix (``examples/dwdp/dwdp_reproduce.yaml`` of TensorRT-LLM).

    Prefill GPUs are ``num_ctx_servers * ctx_tp``, generation GPUs ``gen_tp``. Which deployments are the
    points of table 4 is not published.
    """

    low: int
    high: int
    prefill_gpus: int
    generation_gpus: int


DEP_DEPLOYMENTS = (
    DeploymentRow(20, 40, 20, 8),
    DeploymentRow(40, 60, 16, 8),
    DeploymentRow(60, 80, 28, 16),
    DeploymentRow(80, 100, 16, 16),
    DeploymentRow(160, 180, 8, 32),
)
