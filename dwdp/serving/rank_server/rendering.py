"""From deltas to the protocol's documents: events of a stream, or one answer at the end."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dwdp._version import __version__
from dwdp.serving.openai.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChatMessage,
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionLogprobs,
    FinishReason,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from dwdp.serving.rank_server.detokenizer import TokenTexts
from dwdp.serving.rank_server.text import ReportedToken, TextDelta

FINGERPRINT = f"dwdp-{__version__}"


@dataclass
class _Answer:
    text: str = ""
    tokens: list[ReportedToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class Renderer(ABC):
    """Renders the answers to one request.

    Args:
        response_id: the ``id`` of its documents.
        model: the model's name, as it is served.
        texts: of single tokens.
        num_logprobs: candidates reported per token; None: no log-probabilities.
    """

    def __init__(
        self, response_id: str, model: str, texts: TokenTexts, num_logprobs: int | None
    ) -> None:
        self._id = response_id
        self._model = model
        self._texts = texts
        self._num_logprobs = num_logprobs
        self._created = int(time.time())

    @abstractmethod
    def chunks(self, delta: TextDelta) -> list[CompletionChunk | ChatCompletionChunk]:
        """Events for ``delta``; none if it brings nothing to tell."""

    @abstractmethod
    def usage_chunk(self, usage: Usage) -> CompletionChunk | ChatCompletionChunk:
        """The event that ends a stream which reports its tokens."""

    @abstractmethod
    def whole(self, deltas: Iterable[TextDelta], usage: Usage) -> Completion | ChatCompletion:
        """The answer that all ``deltas`` make up."""

    def _text(self, token_id: int) -> str:
        return self._texts.of(token_id).decode("utf-8", "replace")


class CompletionRenderer(Renderer):
    def chunks(self, delta: TextDelta) -> list[CompletionChunk | ChatCompletionChunk]:
        if not delta.text and not delta.tokens and delta.finish_reason is None:
            return []
        choice = CompletionChoice(
            index=delta.index,
            text=delta.text,
            logprobs=self._logprobs(delta.tokens),
            finish_reason=delta.finish_reason,
        )
        return [self._chunk((choice,), None)]

    def usage_chunk(self, usage: Usage) -> CompletionChunk:
        return self._chunk((), usage)

    def whole(self, deltas: Iterable[TextDelta], usage: Usage) -> Completion:
        choices = tuple(
            CompletionChoice(
                index=index,
                text=answer.text,
                logprobs=self._logprobs(answer.tokens),
                finish_reason=answer.finish_reason,
            )
            for index, answer in sorted(_collect(deltas).items())
        )
        return Completion(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=FINGERPRINT,
            choices=choices,
            usage=usage,
        )

    def _chunk(self, choices: tuple[CompletionChoice, ...], usage: Usage | None) -> CompletionChunk:
        return CompletionChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=FINGERPRINT,
            choices=choices,
            usage=usage,
        )

    def _logprobs(self, tokens: Sequence[ReportedToken]) -> CompletionLogprobs | None:
        if self._num_logprobs is None:
            return None
        top = None
        if self._num_logprobs:
            # The chosen token is among the candidates even if it is none of the likeliest, as at OpenAI.
            top = tuple(
                {self._text(token): logprob for token, logprob in reversed(one.logprobs.top)}
                | {self._text(one.token_id): one.logprobs.chosen}
                for one in tokens
            )
        return CompletionLogprobs(
            text_offset=tuple(one.offset for one in tokens),
            token_logprobs=tuple(one.logprobs.chosen for one in tokens),
            tokens=tuple(self._text(one.token_id) for one in tokens),
            top_logprobs=top,
        )


class ChatRenderer(Renderer):
    def __init__(
        self, response_id: str, model: str, texts: TokenTexts, num_logprobs: int | None
    ) -> None:
        super().__init__(response_id, model, texts, num_logprobs)
        self._begun: set[int] = set()

    def chunks(self, delta: TextDelta) -> list[CompletionChunk | ChatCompletionChunk]:
        chunks: list[CompletionChunk | ChatCompletionChunk] = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            chunks.append(self._choice_chunk(delta.index, {"role": "assistant", "content": ""}))
        if delta.text or delta.tokens:
            logprobs = self._logprobs(delta.tokens)
            chunks.append(self._choice_chunk(delta.index, {"content": delta.text}, logprobs))
        if delta.finish_reason is not None:
            chunks.append(self._choice_chunk(delta.index, {}, None, delta.finish_reason))
        return chunks

    def usage_chunk(self, usage: Usage) -> ChatCompletionChunk:
        return self._chunk((), usage)

    def whole(self, deltas: Iterable[TextDelta], usage: Usage) -> ChatCompletion:
        choices = []
        for index, answer in sorted(_collect(deltas).items()):
            assert answer.finish_reason is not None
            choices.append(
                ChatChoice(
                    index=index,
                    message=ChatMessage(content=answer.text),
                    logprobs=self._logprobs(answer.tokens),
                    finish_reason=answer.finish_reason,
                )
            )
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=FINGERPRINT,
            choices=tuple(choices),
            usage=usage,
        )

    def _choice_chunk(
        self,
        index: int,
        delta: dict[str, str],
        logprobs: ChatLogprobs | None = None,
        finish_reason: FinishReason | None = None,
    ) -> ChatCompletionChunk:
        choice = ChatChunkChoice(
            index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason
        )
        return self._chunk((choice,), None)

    def _chunk(
        self, choices: tuple[ChatChunkChoice, ...], usage: Usage | None
    ) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=FINGERPRINT,
            choices=choices,
            usage=usage,
        )

    def _logprobs(self, tokens: Sequence[ReportedToken]) -> ChatLogprobs | None:
        if self._num_logprobs is None:
            return None
        return ChatLogprobs(content=tuple(self._token(one) for one in tokens))

    def _token(self, one: ReportedToken) -> TokenLogprob:
        return TokenLogprob(
            token=self._text(one.token_id),
            bytes=tuple(self._texts.of(one.token_id)),
            logprob=one.logprobs.chosen,
            top_logprobs=tuple(
                TopLogprob(
                    token=self._text(token), bytes=tuple(self._texts.of(token)), logprob=logprob
                )
                for token, logprob in one.logprobs.top
            ),
        )


def _collect(deltas: Iterable[TextDelta]) -> dict[int, _Answer]:
    answers: dict[int, _Answer] = {}
    for delta in deltas:
        answer = answers.setdefault(delta.index, _Answer())
        answer.text += delta.text
        answer.tokens += delta.tokens
        answer.finish_reason = delta.finish_reason
    return answers
