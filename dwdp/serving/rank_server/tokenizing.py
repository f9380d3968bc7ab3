"""Prompts to token ids: plain text, and conversations through a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from dwdp.serving.openai.errors import invalid
from dwdp.serving.openai.requests import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""For a checkpoint without a template: a line per message. Such a model was not trained to converse."""


class PromptTokenizer:
    """Makes prompts of text. Its methods are slow for long texts: call them off the event loop.

    Args:
        tokenizer: of the checkpoint.
        chat_template: Jinja source; None for the checkpoint's own, or a plain one if it has none.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self.has_own_template = chat_template is not None or bool(tokenizer.chat_template)
        self._template = chat_template or tokenizer.chat_template or PLAIN_CHAT_TEMPLATE

    def encode(self, text: str) -> tuple[int, ...]:
        """A completion's prompt, with the special tokens that the tokenizer adds."""
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """A conversation, up to where the assistant's answer begins.

        Raises:
            ApiError: 400, the template does not take these messages.
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
        return self._encode(text, add_special_tokens=False)

    def _encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


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
