"""What ranks are given to do: lengths from a distribution, or requests from a trace."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dwdp.perf.operators import Batch

LONGEST_TOKENS = 1 << 30
"""Most tokens of one input or output in a trace."""


class Request(NamedTuple):
    """One request of a trace: when it arrives, and how long its input and output are."""

    arrival_s: float
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Lengths:
    """A distribution of input lengths.

    Attributes:
        longest: the nominal input length (ISL), and the longest.
        ratio: lengths are uniform in [ratio * longest, longest]. 1: all equal.
        cv: instead of ``ratio``, a normal distribution around ``longest`` of this coefficient of variation.
    """

    longest: int
    ratio: float = 1.0
    cv: float | None = None

    def __post_init__(self) -> None:
        if self.longest < 1:
            raise ValueError(f"The input length is {self.longest}: use at least 1.")
        if not 0 < self.ratio <= 1:
            raise ValueError(f"The length ratio is {self.ratio}: use more than 0 and at most 1.")
        if self.cv is not None and not 0 <= self.cv < math.inf:
            raise ValueError(f"The length CV is {self.cv}: use at least 0.")

    @property
    def mean(self) -> float:
        """Mean length."""
        return self.longest if self.cv is not None else self.longest * (1 + self.ratio) / 2

    def draw(self, random_numbers: random.Random) -> int:
        """One length, at least 1."""
        if self.cv is not None:
            return max(1, round(random_numbers.gauss(self.longest, self.cv * self.longest)))
        return max(1, round(random_numbers.uniform(self.ratio * self.longest, self.longest)))


def pack(
    lengths: Iterable[int], max_num_tokens: int, max_prompts: int | None = None
) -> Iterator[Batch]:
    """Batches of whole prompts in order of arrival, each of at most ``max_num_tokens`` (or one prompt).

    ``max_prompts``: per batch; None: any number.
    """
    batch: list[int] = []
    num_tokens = 0
    for length in lengths:
        if batch and (num_tokens + length > max_num_tokens or len(batch) == max_prompts):
            yield Batch.prefill(batch)
            batch, num_tokens = [], 0
        batch.append(length)
        num_tokens += length
    if batch:
        yield Batch.prefill(batch)


def packed_batches(
    lengths: Lengths,
    max_num_tokens: int,
    num_batches: int,
    seed: int = 0,
    max_prompts: int | None = None,
) -> list[Batch]:
    """``num_batches`` full batches of drawn lengths."""
    random_numbers = random.Random(seed)

    def endless() -> Iterator[int]:
        while True:
            yield lengths.draw(random_numbers)

    batches = pack(endless(), max_num_tokens, max_prompts)
    return [next(batches) for _ in range(num_batches)]


def rank_loads(cv: float, num_ranks: int, num_iterations: int, seed: int = 0) -> list[list[float]]:
    """Relative load ``[rank][iteration]``: normal around 1 with this CV, at least 0.05."""
    random_numbers = random.Random(seed)
    return [
        [max(0.05, random_numbers.gauss(1.0, cv)) for _ in range(num_iterations)]
        for _ in range(num_ranks)
    ]


def poisson_requests(
    lengths: Lengths, output_tokens: int, requests_per_s: float, num_requests: int, seed: int = 0
) -> list[Request]:
    """Requests whose arrivals are a Poisson process."""
    random_numbers = random.Random(seed)
    now, requests = 0.0, []
    for _ in range(num_requests):
        now += -math.log(1.0 - random_numbers.random()) / requests_per_s
        requests.append(Request(now, lengths.draw(random_numbers), output_tokens))
    return requests


def read_trace(path: str | Path) -> list[Request]:
    """Requests of a JSON-lines file with ``arrival_s``, ``input_tokens`` and ``output_tokens``, by arrival.

    Raises:
        ValueError: a line is no such object; one line with its number and the key.
    """
    requests = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error.msg}") from error
        fields = row if isinstance(row, dict) else {}
        for key in Request._fields:
            value = fields.get(key)
            if key == "arrival_s":
                is_right = isinstance(value, int | float) and 0 <= value < math.inf
                wanted = "a time of at least 0"
            else:
                is_right = isinstance(value, int) and 1 <= value <= LONGEST_TOKENS
                wanted = f"a whole number from 1 to {LONGEST_TOKENS}"
            if not is_right or isinstance(value, bool):
                raise ValueError(f"{path}:{number}: {key}: {value!r} is not {wanted}.")
        requests.append(
            Request(float(fields["arrival_s"]), fields["input_tokens"], fields["output_tokens"])
        )
    if not requests:
        raise ValueError(f"{path}: no requests.")
    return sorted(requests)


def batches_of_trace(
    requests: Sequence[Request], num_ranks: int, max_num_tokens: int
) -> list[list[Batch]]:
    """``[rank][iteration]``: requests go to the rank with the fewest tokens so far; ranks pack their own."""
    queues: list[list[int]] = [[] for _ in range(num_ranks)]
    totals = [0] * num_ranks
    for request in requests:
        rank = min(range(num_ranks), key=lambda r: totals[r])
        queues[rank].append(request.input_tokens)
        totals[rank] += request.input_tokens
    return [list(pack(queue, max_num_tokens)) for queue in queues]
