"""What the performance model expects of a point: prefill by simulation, generation by the roofline.

End to end, the load is a closed loop of c requests, some in prefill and n in generation::

    X(n) = n v(n) / osl                        requests/s that generation finishes at speed v per user
    X    = min(X(n), G r / mean input)         and that G context GPUs of r tokens/s keep up with
    c    = n + X t + waiting                   t: a prefill forward; prompts wait where prefill is too slow

so TPS/user is v(n), TPS/GPU is X osl over all GPUs, and a first token takes ``(c - n) / X`` (Little's law).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from sweep import Point

from dwdp.perf.fetches import ALL_AT_ONCE, SERIAL_FIXED
from dwdp.perf.hardware import Hardware, load_hardware
from dwdp.perf.model import Model
from dwdp.perf.model_config import load_model
from dwdp.perf.roofline import Group
from dwdp.perf.serving import Generation, PrefillRate, PrefillScenario, Strategy, prefill_rate

NOISE_CV = 0.05
"""Variation of a layer's time, as in the reproduction of the paper."""
WITHOUT_CONTENTION_OPT = replace(SERIAL_FIXED, wrap_around=True)
"""What ``contention_opt: false`` does: one source after the other, whole, in the order of ranks."""


@dataclass(frozen=True)
class Prediction:
    """What a run is expected to show; None where the mode has no such figure."""

    context_tokens_per_s_per_gpu: float
    iteration_ms: float
    tps_per_user: float | None = None
    tps_per_gpu: float | None = None
    mean_ttft_ms: float | None = None


class Expectations:
    """Predictions for the points of one sweep."""

    def __init__(self, model: str, hardware: str) -> None:
        self.model: Model = load_model(model)
        self.hardware: Hardware = load_hardware(hardware)
        self._prefill = lru_cache(maxsize=None)(self._simulate)

    def prefill(self, point: Point) -> PrefillRate:
        """Prefill of one rank."""
        scenario = PrefillScenario(
            point.lengths,
            point.max_num_tokens,
            noise_cv=NOISE_CV,
            max_prompts=point.context_batch_size,
        )
        group = Group(point.group_size, point.num_experts_per_worker)
        return self._prefill(point.system, group, scenario, point.contention_opt)

    def _simulate(
        self, system: Strategy, group: Group, scenario: PrefillScenario, contention_opt: bool
    ) -> PrefillRate:
        policy = ALL_AT_ONCE if contention_opt else WITHOUT_CONTENTION_OPT
        return prefill_rate(self.model, self.hardware, group, scenario, system, policy)

    def generation(self, point: Point) -> Generation:
        """The point's generation servers."""
        context = round(point.lengths.mean) + point.osl // 2
        efficiency = self.hardware.achieved.generation
        return Generation(
            self.model, self.hardware, point.server_gpus, context, efficiency=efficiency
        )

    def concurrencies(self, point: Point) -> tuple[int, ...]:
        """The loads of the point; those of ``tps_per_user`` are what generation is expected to hold.

        Raises:
            ValueError: generation is not expected to give a user that speed.
        """
        if point.concurrency:
            return point.concurrency
        generation = self.generation(point)
        found = []
        for speed in point.tps_per_user:
            sequences = generation.sequences_at(speed)
            if not sequences:
                raise ValueError(
                    f"tps_per_user: {speed:g} tokens/s are not expected of {point.server_gpus} "
                    f"generation GPUs of {self.hardware.name}"
                )
            found.append(sequences * point.generation_gpus)
        return tuple(found)

    def of(self, point: Point, concurrency: int) -> Prediction:
        """What is expected of ``point`` with that many requests in flight."""
        rate = self.prefill(point)
        forward = rate.tokens_per_s, 1e3 * rate.iteration_s
        if point.osl == 1:
            return Prediction(*forward)
        generation = self.generation(point)
        capacity = point.context_gpus * rate.tokens_per_s / point.lengths.mean

        def speed(sequences: float) -> float:
            return generation.tps_per_user(max(1.0, sequences / point.generation_gpus))

        def fits(sequences: float) -> bool:
            finished = sequences * speed(sequences) / point.osl
            return finished <= capacity and sequences + finished * rate.iteration_s <= concurrency

        low, high = 0.0, float(concurrency)
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        finished = low * speed(low) / point.osl
        return Prediction(
            *forward,
            tps_per_user=speed(low),
            tps_per_gpu=finished * point.osl / point.num_gpus,
            mean_ttft_ms=1e3 * (concurrency - low) / finished,
        )
