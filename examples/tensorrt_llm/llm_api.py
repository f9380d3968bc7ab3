"""``python llm_api.py MODEL [RANKS]``: one program, a group of ranks on this node, each on a GPU of its own.

Under a launcher each process is one rank, and generates for the prompts that it is given::

    DWDP_PARALLEL=dwdp torchrun --nproc-per-node 4 llm_api.py MODEL
"""

from __future__ import annotations

import sys

from tensorrt_llm import LLM, SamplingParams

from dwdp import DwdpConfig

PROMPTS = [
    "The capital of France is",
    "In the beginning",
    "Weights travel, tokens",
    "One, two, three,",
]


def main() -> None:
    model, num_ranks = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None
    # Under a launcher it says how many ranks there are.
    config = (
        {} if num_ranks is None else DwdpConfig(dwdp_size=num_ranks).model_dump(exclude_unset=True)
    )
    with LLM(model, parallel="dwdp", dwdp_config=config) as llm:
        for answer in llm.generate(PROMPTS, SamplingParams(max_tokens=32)):
            print(f"{answer.prompt!r} -> {answer.outputs[0].text!r}")


if __name__ == "__main__":  # workers import this file
    main()
