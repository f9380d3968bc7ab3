"""A few tokens generated before a model is served, to see whether it can be, and computes the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dwdp.serving.rank_server.backend import SequenceRequest, UnsupportedModel
from dwdp.serving.rank_server.sampling import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROMPT_TOKENS = 45
_NEW_TOKENS = 2
_STRIDE = 7

MAX_DIFFERENCE = 0.5
"""Nats by which a token's log-probability may differ between two ways to run a model. Rounding in bfloat16
stays well below it; attention to the wrong tokens does not, in a model that was trained."""


@dataclass(frozen=True)
class Trial:
    """A greedy request, and what the model's ordinary forward makes of it.

    Attributes:
        logprobs: ``[_NEW_TOKENS, vocab_size]``, natural log-probabilities after the prompt, and after
            the prompt and the likeliest token.
    """

    request: SequenceRequest
    logprobs: torch.Tensor

    @classmethod
    def of(cls, model: PreTrainedModel, max_sequence_length: int) -> Trial:
        vocab_size = model.config.get_text_config().vocab_size
        num_prompt_tokens = max(1, min(_PROMPT_TOKENS, max_sequence_length - _NEW_TOKENS))
        prompt = [index * _STRIDE % vocab_size for index in range(1, num_prompt_tokens + 1)]
        request = SequenceRequest(
            id="trial",
            prompt=tuple(prompt),
            max_new_tokens=min(_NEW_TOKENS, max_sequence_length - num_prompt_tokens),
            end_tokens=frozenset(),
            sampling=SamplingParams(0.0, 0, 1.0, 0.0, seed=0, num_logprobs=0),
        )
        run: Any = model
        rows = []
        with torch.inference_mode():
            for _ in range(request.max_new_tokens):
                scores = run(input_ids=torch.tensor([prompt], device=model.device)).logits[0, -1]
                rows.append(torch.log_softmax(scores.float(), dim=-1))
                prompt = [*prompt, int(rows[-1].argmax())]
        return cls(request, torch.stack(rows))

    def check(self, token_ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Compare with what was generated.

        Raises:
            UnsupportedModel: a log-probability differs by more than ``MAX_DIFFERENCE``.
        """
        for row, (token, logprob) in enumerate(zip(token_ids, logprobs, strict=True)):
            difference = abs(float(self.logprobs[row, token]) - logprob)
            if not difference <= MAX_DIFFERENCE:
                raise UnsupportedModel(
                    f"log-probabilities differ by {difference:.2f} from those of the model's own forward"
                )
            if token != int(self.logprobs[row].argmax()):
                return  # a near tie: from here on the two texts are different ones
