"""What several files of tests share: a rank's server, and the model that it has to agree with."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from rank_servers import MODEL_DIR, Rank, started


@pytest.fixture(scope="session")
def rank() -> Iterator[Rank]:
    """A rank that is a group of its own, with the options' defaults. It has to be left as it was."""
    with started() as [one]:
        yield one


@pytest.fixture(scope="session")
def greedy() -> Callable[[str, int], str]:
    """What the unsharded model's own ``generate`` makes of a prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()

    def answer(prompt: str, num_tokens: int) -> str:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=num_tokens)
        torch.set_num_threads(num_threads)
        new = output[0, inputs["input_ids"].shape[1] :]
        return str(tokenizer.decode(new, skip_special_tokens=True))

    return answer
