"""Synthetic prompts: drawn lengths, random tokens, one file for every system that is compared.

Prompts are lists of token ids, so that no tokenizer changes their lengths. The same seed gives the same
file, and a longer file begins with the shorter one.

Formats (TensorRT-LLM 1.3.0rc3), one JSON object per line:

* ``benchmark_serving``: ``--dataset-name trtllm_custom`` (``CustomDataset`` in
  ``tensorrt_llm/serve/scripts/benchmark_dataset.py``): the prompt is the second message's content;
  ``num_tokens`` spares the client its tokenizer.
* ``trtllm-bench``: ``--dataset`` (``create_dataset_from_stream`` in ``tensorrt_llm/bench/utils/data.py``).
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from sweep import Point

from dwdp.perf.workload import Lengths

Format = Literal["benchmark_serving", "trtllm-bench"]


@dataclass(frozen=True)
class Dataset:
    """What a file of prompts is made from.

    Attributes:
        isl, length_ratio, length_cv: distribution of the input lengths, as in a sweep file.
        longest_input: longer draws are cut to it.
        osl: output length of every request.
        seed: of lengths and tokens.
        num_requests: lines of the file.
        first_token, last_token: range of the token ids; special tokens are at the ends of a vocabulary.
    """

    isl: int
    length_ratio: float | None
    length_cv: float | None
    longest_input: int
    osl: int
    seed: int
    num_requests: int
    first_token: int
    last_token: int

    @classmethod
    def of(cls, point: Point, num_requests: int, vocab_size: int) -> Dataset:
        """The dataset of ``point``."""
        return cls(
            point.isl,
            point.length_ratio,
            point.length_cv,
            point.longest_input,
            point.osl,
            point.seed,
            num_requests,
            vocab_size // 100,
            vocab_size * 9 // 10,
        )

    @property
    def name(self) -> str:
        """Equal for points that are compared on the same prompts."""
        spread = f"ratio{1.0 if self.length_ratio is None else self.length_ratio:g}"
        if self.length_cv is not None:
            spread = f"cv{self.length_cv:g}"
        return f"isl{self.isl}-{spread}-osl{self.osl}-seed{self.seed}"

    def input_lengths(self) -> Iterator[int]:
        """Tokens of every prompt."""
        if self.length_cv is not None:
            lengths = Lengths(self.isl, cv=self.length_cv)
        else:
            lengths = Lengths(
                self.isl, ratio=1.0 if self.length_ratio is None else self.length_ratio
            )
        random_numbers = random.Random(self.seed)
        for _ in range(self.num_requests):
            yield min(self.longest_input, lengths.draw(random_numbers))

    def lines(self, kind: Format) -> Iterator[str]:
        """The file's lines, without their ends."""
        random_numbers = random.Random(self.seed + 1)
        tokens = range(self.first_token, self.last_token + 1)
        for number, length in enumerate(self.input_lengths()):
            prompt = random_numbers.choices(tokens, k=length)
            yield json.dumps(self._request(kind, number, prompt), separators=(",", ":"))

    def _request(self, kind: Format, number: int, prompt: list[int]) -> dict[str, Any]:
        if kind == "trtllm-bench":
            return {"task_id": number, "input_ids": prompt, "output_tokens": self.osl}
        messages = [{"role": "system", "content": ""}, {"role": "user", "content": prompt}]
        return {"input": {"messages": messages, "max_tokens": self.osl, "num_tokens": len(prompt)}}


def description_file(folder: Path, dataset: Dataset) -> Path:
    """Where the description of ``dataset`` is kept."""
    return folder / f"{dataset.name}.yaml"


def read_dataset(path: Path) -> Dataset:
    """A description written by ``generate``."""
    return Dataset(**yaml.safe_load(path.read_text(encoding="utf-8")))


def write_dataset(dataset: Dataset, path: Path, kind: Format = "benchmark_serving") -> None:
    """Write the prompts to ``path``; a file that is cut short never has that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for line in dataset.lines(kind):
            file.write(line + "\n")
    partial.replace(path)


def check_dataset(dataset: Dataset, path: Path) -> str | None:
    """What is wrong with a file of prompts in the format of ``benchmark_serving``; None: nothing.

    Looks at the number of lines and at the first hundred prompts.
    """
    with path.open(encoding="utf-8") as file:
        for number, (line, length) in enumerate(
            itertools.islice(zip(file, dataset.input_lengths(), strict=False), 100)
        ):
            request = json.loads(line)["input"]
            prompt = request["messages"][1]["content"]
            if not len(prompt) == request["num_tokens"] == length:
                return f"{path}: prompt {number} has {len(prompt)} tokens, not {length}"
        file.seek(0)
        num_lines = sum(1 for _ in file)
    if num_lines != dataset.num_requests:
        return f"{path}: {num_lines} prompts, not {dataset.num_requests}"
    return None
