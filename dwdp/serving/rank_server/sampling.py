"""Chooses the next token of every sequence in a batch: each by its own parameters, and its own seed.

Transformers' continuous batching draws all sequences of a batch from one generator, so that an answer
would depend on who else is being served. Here a draw depends on the sequence's seed, the position of
the token and its distribution alone. Either way of batching uses this code, as its last logits processor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity (suppressed tokens), as at OpenAI: JSON has no number for it."""

_SEED_BYTES = 8


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence's tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token each time; above that, tokens are drawn.
        top_k: draw from the ``top_k`` likeliest tokens; 0 from all.
        top_p: draw from the likeliest tokens that together have this probability.
        min_p: draw from the tokens that have at least this part of the likeliest one's probability.
        seed: of this sequence's draws.
        num_logprobs: candidates to report per token, besides the chosen one; None reports nothing.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    num_logprobs: int | None


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities at one position, as the model gives them: before temperature and top-k.
    All are finite, ``LOWEST_LOGPROB`` at least.

    Attributes:
        chosen: of the chosen token.
        top: (token id, log-probability) of the likeliest tokens, best first.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


def choose(
    scores: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> tuple[torch.Tensor, list[TokenLogprobs | None]]:
    """Turn scores into ones whose largest value is at the chosen token.

    Args:
        scores: ``[num_sequences, vocab_size]``, float32 logits. Not changed.
        params: per sequence.
        positions: per sequence, the index that the chosen token will have in it.

    Returns:
        Scores ``[num_sequences, vocab_size]`` for argmax, and per sequence what it asked to be reported.
    """
    drawn = [row for row, one in enumerate(params) if one.temperature > 0]
    reported = [row for row, one in enumerate(params) if one.num_logprobs is not None]
    logprobs: list[TokenLogprobs | None] = [None] * len(params)
    if not drawn and not reported:
        return scores, logprobs
    chosen = scores.clone()
    if drawn:
        chosen[drawn] = _draw(
            scores[drawn], [params[row] for row in drawn], [positions[row] for row in drawn]
        )
    for row in reported:
        token = chosen[row].argmax()
        logprobs[row] = _report(scores[row], int(token), params[row].num_logprobs or 0)
        chosen[row, token] = (
            torch.inf
        )  # whichever way the caller breaks ties, it finds the same token
    return chosen, logprobs


def _draw(
    scores: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> torch.Tensor:
    """Race of exponential clocks: argmax of p/E, with E drawn from Exp(1), has distribution p.

    Gumbel-max in another form; see Maddison, Tarlow and Minka, "A* Sampling" (2014), section 2.
    """
    temperatures = scores.new_tensor([one.temperature for one in params]).unsqueeze(1)
    # Shifted first: the difference to the largest stays finite however small the temperature is.
    shifted = (scores - scores.amax(dim=-1, keepdim=True)) / temperatures
    probabilities = torch.softmax(_filtered(shifted, params), dim=-1)
    clocks = torch.empty_like(probabilities)
    generator = torch.Generator(device=scores.device)
    for row, (one, position) in enumerate(zip(params, positions, strict=True)):
        generator.manual_seed(_position_seed(one.seed, position))
        clocks[row].exponential_(generator=generator)
    return probabilities / clocks.clamp_(min=torch.finfo(clocks.dtype).tiny)


def _filtered(scores: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Scores with -inf in place of the tokens that top-k, top-p and min-p leave out."""
    if all(one.top_k == 0 and one.top_p >= 1 and one.min_p == 0 for one in params):
        return scores
    vocab_size = scores.shape[-1]
    best_first, order = scores.sort(dim=-1, descending=True, stable=True)
    top_k = torch.tensor([[one.top_k or vocab_size] for one in params], device=scores.device)
    kept = torch.arange(vocab_size, device=scores.device) < top_k
    # Each filter works on what the one before it has left, as in Transformers.
    probabilities = torch.softmax(best_first.masked_fill(~kept, -torch.inf), dim=-1)
    better = probabilities.cumsum(dim=-1) - probabilities
    kept &= better < scores.new_tensor([[one.top_p] for one in params])
    probabilities = torch.softmax(best_first.masked_fill(~kept, -torch.inf), dim=-1)
    kept &= probabilities >= probabilities[:, :1] * scores.new_tensor(
        [[one.min_p] for one in params]
    )
    kept[:, 0] = True
    best_first = best_first.masked_fill(~kept, -torch.inf)
    return torch.empty_like(scores).scatter_(-1, order, best_first)


def _report(scores: torch.Tensor, token: int, num_logprobs: int) -> TokenLogprobs:
    logprobs = torch.log_softmax(scores, dim=-1).nan_to_num_(nan=LOWEST_LOGPROB)
    logprobs.clamp_(min=LOWEST_LOGPROB)
    values, ids = logprobs.topk(min(num_logprobs, logprobs.numel()))
    return TokenLogprobs(
        chosen=float(logprobs[token]),
        top=tuple(zip(ids.tolist(), values.tolist(), strict=True)),
    )


def _position_seed(seed: int, position: int) -> int:
    """Seeds for neighbouring positions and sequences that have nothing to do with each other."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=_SEED_BYTES)
    return int.from_bytes(digest.digest(), "little", signed=True)
