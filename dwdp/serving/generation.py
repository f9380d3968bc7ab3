"""Continues prompts with a Transformers model: a batch of one, greedy or drawn from the distribution."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from dwdp.serving.messages import FinishReason, Request

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


class Generator:
    """Answers requests with ``model.generate``.

    What the checkpoint's generation config says about end tokens, penalties, top-k and top-p is kept;
    the number of tokens and the temperature are the request's.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        base = model.generation_config
        end = base.eos_token_id
        self._end_tokens = frozenset(end if isinstance(end, list) else [end]) - {None}
        if not all(isinstance(token, int) for token in self._end_tokens):
            raise ValueError(
                f"generation_config.json: eos_token_id is {end!r}, not a token's number"
            )
        self._greedy = copy.deepcopy(base)
        self._greedy.update(do_sample=False, temperature=None, top_k=None, top_p=None, min_p=None)
        self._drawn = copy.deepcopy(base)
        # Without a top-k of its own a checkpoint gets none, rather than Transformers' default of 50.
        self._drawn.update(do_sample=True, top_k=base.top_k or 0)
        for config in (self._greedy, self._drawn):
            config.update(num_beams=1, num_return_sequences=1, max_length=None)
            if config.pad_token_id is None:
                # Never used, since nothing is padded, but Transformers asks for one.
                config.update(pad_token_id=min(self._end_tokens, default=0))

    def generate(self, request: Request) -> tuple[tuple[int, ...], FinishReason]:
        """The new tokens, end token included, and why there are no more."""
        import torch

        model: Any = self._model
        prompt = torch.tensor([request.token_ids], device=model.device)
        if request.temperature > 0:
            torch.manual_seed(request.seed)
        sequences = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=self._config_for(request),
        )
        token_ids = tuple(sequences[0, prompt.shape[1] :].tolist())
        return token_ids, "stop" if token_ids[-1] in self._end_tokens else "length"

    def _config_for(self, request: Request) -> GenerationConfig:
        config = copy.copy(self._drawn if request.temperature > 0 else self._greedy)
        config.max_new_tokens = request.max_new_tokens
        if request.temperature > 0:
            config.temperature = request.temperature
        return config


def quiet_transformers() -> None:
    """Keep Transformers' advice and progress bars off standard error. Errors are raised as ever."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
