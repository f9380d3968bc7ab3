"""From the steps of a sequence to what its client gets: text up to a stop string, and log-probabilities."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from dwdp.serving.openai.responses import FinishReason
from dwdp.serving.rank_server.backend import Step
from dwdp.serving.rank_server.detokenizer import Detokenizer
from dwdp.serving.rank_server.sampling import TokenLogprobs
from dwdp.serving.rank_server.stops import StopMatcher


@dataclass(frozen=True)
class ReportedToken:
    """A token with its log-probabilities. ``offset``: where its text starts in the answer, in characters."""

    token_id: int
    offset: int
    logprobs: TokenLogprobs


@dataclass(frozen=True)
class TextDelta:
    """What one answer has gained.

    Attributes:
        index: which of the request's answers.
        text: new text; may be empty.
        tokens: those whose text is let through now, if log-probabilities were asked for.
        num_tokens: tokens generated since the last delta, those of a stop string included.
        finish_reason: set in an answer's last delta.
    """

    index: int
    text: str
    tokens: tuple[ReportedToken, ...] = ()
    num_tokens: int = 0
    finish_reason: FinishReason | None = None


class AnswerText:
    """One answer while it grows.

    Args:
        index: which of the request's answers.
        stops: strings at which it ends; they are not part of it.
    """

    def __init__(self, index: int, detokenizer: Detokenizer, stops: Sequence[str]) -> None:
        self._index = index
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops)
        self._num_decoded_chars = 0
        self._num_passed_chars = 0
        self._held_tokens: deque[ReportedToken] = deque()

    def add(self, step: Step) -> TextDelta:
        """The delta that ``step`` brings. After one with a finish reason there is none to come."""
        passed = ""
        num_tokens = 0
        # An end token says nothing, whether or not the tokenizer takes it for a special one.
        has_end_token = step.finish_reason == "stop" and bool(step.token_ids)
        said = step.token_ids[:-1] if has_end_token else step.token_ids
        for position, token_id in enumerate(said):
            num_tokens += 1
            if step.logprobs:
                self._held_tokens.append(
                    ReportedToken(token_id, self._num_decoded_chars, step.logprobs[position])
                )
            passed += self._pass_on(self._detokenizer.add(token_id))
            if self._matcher.is_stopped:
                break
        finish_reason = step.finish_reason
        if finish_reason is not None and not self._matcher.is_stopped:
            num_tokens += has_end_token
            passed += self._pass_on(self._detokenizer.finish())
            if not self._matcher.is_stopped:
                passed += self._matcher.finish()
        if self._matcher.is_stopped:
            finish_reason = "stop"
        self._num_passed_chars += len(passed)
        tokens = self._release_tokens(finish_reason is not None)
        return TextDelta(self._index, passed, tokens, num_tokens, finish_reason)

    def _pass_on(self, text: str) -> str:
        self._num_decoded_chars += len(text)
        return self._matcher.add(text)

    def _release_tokens(self, is_last: bool) -> tuple[ReportedToken, ...]:
        """Tokens whose text begins in what was let through; at the end also those without any text."""
        released = []
        while self._held_tokens:
            offset = self._held_tokens[0].offset
            at_end = is_last and not self._matcher.is_stopped
            if offset >= self._num_passed_chars and not at_end:
                break
            released.append(self._held_tokens.popleft())
        return tuple(released)
