"""Prompts to token ids: plain text, and conversations through a chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from dwdp.serving.openai.errors import context_length_exceeded, invalid
from dwdp.serving.openai.requests import Message
from dwdp.serving.rank_server.detokenizer import BYTE_OF_CHAR

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""For a checkpoint without a template: a line per message. Such a model was not trained to converse."""

_PRE_TOKENIZERS = frozenset({"ByteLevel", "Digits", "Punctuation", "Split"})
"""Those that leave nothing out."""

_NFC_SHRINKAGE = 3
"""NFC makes UTF-8 shorter by this factor at most, as NFD makes it longer (Unicode, normalization FAQ)."""


class PromptTokenizer:
    """Makes prompts of text. Its methods are slow for long texts: call them off the event loop.

    Args:
        tokenizer: of the checkpoint. Truncation and padding, which tokenizer.json may ask for, are
            switched off.
        chat_template: Jinja source; None for the checkpoint's own, or a plain one if it has none.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
    ) -> None:
        self._tokenizer = tokenizer
        _leave_lengths_alone(tokenizer)
        self.has_own_template = chat_template is not None or bool(tokenizer.chat_template)
        self._template = chat_template or tokenizer.chat_template or PLAIN_CHAT_TEMPLATE
        self._max_token_chars = max_token_chars(tokenizer)

    def encode(self, text: str, max_tokens: int) -> tuple[int, ...]:
        """A completion's prompt, with the special tokens that the tokenizer adds.

        Args:
            max_tokens: a text that is certain to have more is not tokenized. Others may have more, too.

        Raises:
            ApiError: 400, it has.
        """
        self._check_length(text, max_tokens, "prompt")
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Message], max_tokens: int) -> tuple[int, ...]:
        """A conversation, up to where the assistant's answer begins.

        Args:
            max_tokens: as for :meth:`encode`.

        Raises:
            ApiError: 400, the template does not take these messages, or they are too long.
        """
        conversation = [_for_template(message) for message in messages]
        tokenizer: Any = self._tokenizer
        try:
            text = tokenizer.apply_chat_template(
                conversation,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise invalid(
                f"The model's chat template does not take these messages: {error}", "messages"
            ) from error
        self._check_length(text, max_tokens, "messages")
        return self._encode(text, add_special_tokens=False)

    def _check_length(self, text: str, max_tokens: int, param: str) -> None:
        """Megabytes take long to tokenize, and other prompts wait meanwhile."""
        if self._max_token_chars is not None and len(text) > max_tokens * self._max_token_chars:
            raise context_length_exceeded(
                f"The longest sequence here is {max_tokens} tokens; a prompt of {len(text)} characters has "
                "more. Shorten the prompt",
                param,
            )

    def _encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


def _leave_lengths_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    """Switch truncation and padding off now.

    Transformers would do so when the first prompt is encoded: on a thread, while the event loop may be
    decoding with the same tokenizer, which is not to be changed in the midst of that.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()


def max_token_chars(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Characters of a text that one token stands for at most; None: that is not known.

    It is known of byte-level tokenizers that leave nothing out: there a text's tokens together have all its
    bytes, of which there are as many as characters or more.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "BPE":
        return None
    steps = _steps(backend.pre_tokenizer)
    names = {step["type"] for step in steps}
    drops_pieces = any(step.get("behavior") == "Removed" for step in steps)
    if "ByteLevel" not in names or not names <= _PRE_TOKENIZERS or drops_pieces:
        return None
    normalizers = {step["type"] for step in _steps(backend.normalizer)}
    added = tokenizer.added_tokens_decoder.values()
    takes_spaces = any(token.lstrip or token.rstrip for token in added)
    vocab = tokenizer.get_vocab()
    if not normalizers <= {"NFC"} or takes_spaces or not vocab.keys() >= BYTE_OF_CHAR.keys():
        return None
    longest = max(len(piece.encode()) for piece in (*vocab, *(token.content for token in added)))
    return longest * _NFC_SHRINKAGE if normalizers else longest


def _steps(part: Any) -> list[dict[str, Any]]:
    """The normalizers or pre-tokenizers that ``part`` consists of, as tokenizer.json describes them."""
    if part is None:
        return []
    description = json.loads(part.__getstate__())
    if description["type"] != "Sequence":
        return [description]
    return [step for steps in description.values() if isinstance(steps, list) for step in steps]


def read_chat_template(path: str) -> str:
    """The template in a file.

    Raises:
        ValueError: it cannot be read, or is no Jinja template.
    """
    try:
        source = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"chat_template: {path} cannot be read: {error}") from error
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"chat_template: {path}, line {error.lineno}: {error.message}") from error
    return source


def _for_template(message: Message) -> dict[str, str]:
    # "developer" is OpenAI's newer name for "system"; templates know the older one.
    role = "system" if message.role == "developer" else message.role
    named = {"name": message.name} if message.name is not None else {}
    return {"role": role, "content": message.text, **named}
