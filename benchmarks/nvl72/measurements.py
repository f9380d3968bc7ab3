"""What a finished run measured, from the files that TensorRT-LLM's own tools leave behind.

* ``concurrency_N/result.json``: ``benchmark_serving --save-result``
  (``tensorrt_llm/serve/scripts/benchmark_serving.py``).
* ``run/context_I.log``: with ``print_iter_log``, context servers log a line per forward
  (``tensorrt_llm/_torch/pyexecutor/py_executor.py``). ``prev_device_step_time`` is of the forward before, so
  a forward's time stands in the next line of the same server. Only the first rank of a server logs.
* ``concurrency_N/window.txt``: when the load began and ended, in the servers' own clock format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from sweep import Point

_FORWARD = re.compile(
    r"iter = (?P<iter>\d+), .*?prev_device_step_time = (?P<before>[\d.]+ms|N/A), "
    r"timestamp = (?P<timestamp>[\d-]+ [\d:]+), .*?'num_ctx_tokens': (?P<tokens>\d+)"
)


class Forward(NamedTuple):
    """One forward of a context server: when it was logged, tokens of its first rank, time on the device."""

    timestamp: str
    tokens: int
    device_ms: float


@dataclass(frozen=True)
class Iterations:
    """Prefill forwards of all context servers within a run.

    Attributes:
        count: forwards that were timed.
        mean_ms, median_ms: on the device.
        mean_tokens: of one rank.
    """

    count: int
    mean_ms: float
    median_ms: float
    mean_tokens: float


@dataclass(frozen=True)
class Measurement:
    """One load on one point. Times to first token and rates as the client saw them.

    Attributes:
        failed: requests that were sent and not completed; such a run is shown, but not compared.
        context_tokens_per_s_per_gpu: input tokens over the whole run per context GPU.
        tps_per_user: 1 / mean time per output token after the first; None where one token was generated.
        tps_per_gpu: output tokens per second over all GPUs.
        iterations: from the context servers' logs; None without any.
    """

    requests: int
    failed: int
    duration_s: float
    context_tokens_per_s_per_gpu: float
    tps_per_user: float | None
    tps_per_gpu: float
    mean_ttft_ms: float
    median_ttft_ms: float
    p99_ttft_ms: float
    iterations: Iterations | None

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def read_measurement(folder: Path, point: Point, concurrency: int) -> Measurement | None:
    """The run of ``point`` (whose folder it is) at ``concurrency``; None if it has not finished.

    Raises:
        ValueError: a result that is not one of ``benchmark_serving``; names the file and the key.
    """
    run = folder / f"concurrency_{concurrency}"
    path = run / "result.json"
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error.msg}") from error

    def number(key: str) -> float:
        value = result.get(key) if isinstance(result, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{path}: {key}: {value!r} is not a number")
        return float(value)

    duration_s, requests = number("duration"), int(number("num_prompts"))
    if duration_s <= 0:
        raise ValueError(f"{path}: duration: {duration_s} is not more than 0")
    if requests != point.rounds * concurrency:
        raise ValueError(
            f"{path}: num_prompts: {requests}, and the point sends {point.rounds * concurrency}"
        )
    per_token_ms = number("mean_tpot_ms") if point.osl > 1 else 0.0
    return Measurement(
        requests,
        requests - int(number("completed")),
        duration_s,
        number("total_input_tokens") / duration_s / point.context_gpus,
        1e3 / per_token_ms if per_token_ms > 0 else None,
        number("output_throughput") / point.num_gpus,
        number("mean_ttft_ms"),
        number("median_ttft_ms"),
        number("p99_ttft_ms"),
        _iterations(folder, run),
    )


def _iterations(folder: Path, run: Path) -> Iterations | None:
    window_path = run / "window.txt"
    window = window_path.read_text(encoding="utf-8").split("\n") if window_path.is_file() else []
    if len(window) < 2 or not window[1]:
        return None
    forwards = [
        forward
        for log in sorted((folder / "run").glob("context_*.log"))
        for forward in read_forwards(log.open(encoding="utf-8", errors="replace"))
        if window[0] <= forward.timestamp <= window[1]
    ]
    if not forwards:
        return None
    times_ms = [forward.device_ms for forward in forwards]
    return Iterations(
        len(forwards), fmean(times_ms), median(times_ms), fmean(f.tokens for f in forwards)
    )


def read_forwards(lines: Iterable[str]) -> Iterator[Forward]:
    """Prefill forwards of one server's log. A forward whose successor was not logged is left out."""
    before: re.Match[str] | None = None
    for line in lines:
        found = _FORWARD.search(line)
        if found is None:
            continue
        if (
            before is not None
            and int(found["iter"]) == int(before["iter"]) + 1
            and found["before"] != "N/A"
            and int(before["tokens"])
        ):
            device_ms = float(found["before"].removesuffix("ms"))
            yield Forward(before["timestamp"], int(before["tokens"]), device_ms)
        before = found
