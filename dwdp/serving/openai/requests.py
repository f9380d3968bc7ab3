"""What the endpoint is asked. Types and ranges are OpenAI's; what is not supported is refused by name.

An option that this server cannot honour may be given with the value that asks for nothing
(``frequency_penalty: 0``), since clients send those; any other value is an error, never ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError, from_json

from dwdp.serving.openai.errors import ApiError, invalid

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_PROMPTS = 4096
MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_METADATA = 16
MAX_PARAMETERS = 64
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
DEFAULT_COMPLETION_TOKENS = 16
"""Tokens of a completion that names no limit. A chat answer may then fill what the prompt leaves."""


class StopAtFirstError(FailFast):
    """One wrong item of a long list is enough to say so. (A union's members have to be hashable.)"""

    __hash__ = object.__hash__


# Lists have limits, so that no body takes long to check: meanwhile all streams of the process stand still.
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], StopAtFirstError()]
_Prompts = Annotated[list[str], Field(max_length=MAX_PROMPTS), StopAtFirstError()]
_TokenizedPrompts = Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS), StopAtFirstError()]
Prompt = str | TokenIds | _Prompts | _TokenizedPrompts

_MaxTokens = Annotated[int, Field(ge=1)] | None
_Zero = Annotated[float, Field(ge=0, le=0)]
_Nothing = Annotated[list[Any], Field(max_length=0)] | None


class StreamOptions(BaseModel):
    """``include_usage``: one more event before the end says how many tokens were used."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationRequest(BaseModel):
    """What both kinds of request have in common. None stands for the default everywhere."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str = Field(min_length=1, max_length=1024)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    max_tokens: _MaxTokens = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS), StopAtFirstError()] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    ignore_eos: bool | None = None

    # Accepted and of no effect on the answer.
    user: str | None = None
    metadata: Annotated[dict[str, str], Field(max_length=MAX_METADATA)] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, str] | None = None
    prompt_cache_retention: str | None = None

    # Not supported: only the value that asks for nothing.
    frequency_penalty: _Zero | None = None
    presence_penalty: _Zero | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _check_options(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise _mistake("stream_options", "stream_options is only for stream=true")
        for stop in self.stops:
            if not 0 < len(stop) <= MAX_STOP_CHARS:
                raise _mistake(
                    "stop",
                    f"a stop string has {len(stop)} characters; it needs 1 to {MAX_STOP_CHARS}",
                )
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def num_choices(self) -> int:
        """Answers per prompt."""
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        """Whether a stream reports its tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``: continue one or several prompts, given as text or as token ids."""

    prompt: Prompt = Field(union_mode="left_to_right")
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = None

    # Not supported: only the value that asks for nothing.
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _check_prompts(self) -> CompletionRequest:
        if self.prompt == []:
            raise _mistake("prompt", "prompt is an empty list")
        if self.best_of not in (None, self.num_choices):
            raise _unsupported("best_of", f"leave it out or give it n's value, {self.num_choices}")
        return self

    @property
    def prompts(self) -> tuple[str | list[int], ...]:
        """The prompts, one by one."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return (prompt,)
        if prompt and isinstance(prompt[0], int):
            return (prompt,)
        return tuple(prompt)  # type: ignore[arg-type]

    @property
    def max_new_tokens(self) -> int | None:
        """Tokens to generate at most, per answer."""
        return self.max_tokens if self.max_tokens is not None else DEFAULT_COMPLETION_TOKENS

    @property
    def num_logprobs(self) -> int | None:
        """Candidates to report per token; None: no log-probabilities at all."""
        return self.logprobs


class TextPart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation. Only text: no images, no audio, no tool calls."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS), StopAtFirstError()]
    name: str | None = None

    # What clients send back with an assistant's message.
    refusal: None = None
    annotations: _Nothing = None
    audio: None = None
    tool_calls: _Nothing = None
    function_call: None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class TextFormat(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Literal["text"]


class ChatCompletionRequest(GenerationRequest):
    """``POST /v1/chat/completions``: answer a conversation."""

    messages: Annotated[
        list[Message], Field(min_length=1, max_length=MAX_MESSAGES), StopAtFirstError()
    ]
    max_completion_tokens: _MaxTokens = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    # Not supported: only the value that asks for nothing.
    tools: _Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: _Nothing = None
    function_call: Literal["none", "auto"] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    audio: None = None
    moderation: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None

    @model_validator(mode="after")
    def _check_chat_options(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise _mistake("top_logprobs", "top_logprobs needs logprobs=true")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise _mistake(
                "max_tokens",
                f"max_tokens is {self.max_tokens} and max_completion_tokens is "
                f"{self.max_completion_tokens}: give one of them",
            )
        return self

    @property
    def texts(self) -> tuple[str, ...]:
        """The text of every message."""
        return tuple(message.text for message in self.messages)

    @property
    def max_new_tokens(self) -> int | None:
        """Tokens to generate at most, per answer; None: as many as there is room for."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Candidates to report per token; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


_UNSUPPORTED = {
    "frequency_penalty": "leave it out or set it to 0",
    "presence_penalty": "leave it out or set it to 0",
    "logit_bias": "leave it out",
    "echo": "leave it out or set it to false",
    "suffix": "leave it out",
    "tools": "leave it out",
    "tool_choice": "leave it out",
    "functions": "leave it out",
    "function_call": "leave it out",
    "response_format": 'leave it out or set it to {"type": "text"}',
    "modalities": 'leave it out or set it to ["text"]',
    "audio": "leave it out",
    "moderation": "leave it out",
    "prediction": "leave it out",
    "reasoning_effort": "leave it out",
    "verbosity": "leave it out",
    "web_search_options": "leave it out",
    "refusal": "leave it out",
    "annotations": "leave it out",
    "tool_calls": "leave it out",
}

# A union's own error names only its first member.
_FORMS = {
    "prompt": "a string, a list of strings, a list of token ids or a list of lists of token ids, "
    f"and no id below 0; at most {MAX_PROMPTS} prompts",
    "content": f"a string or a list of parts of type text, at most {MAX_PARTS}",
    "stop": f"a string or a list of strings, at most {MAX_STOPS}",
}

_MAX_NAME_CHARS = 64

_Request = TypeVar("_Request", bound=BaseModel)


def parse(kind: type[_Request], body: bytes) -> _Request:
    """The request in ``body``, which is JSON.

    Args:
        kind: what it has to be. If that ignores what it does not know, there may be any number of parameters.

    Raises:
        ApiError: 400 with the field that is at fault: no JSON, a wrong type, a value out of range, an
            option that is unknown or not supported.
    """
    # In two steps: an error has no copy of its own then of a document that may have a million values.
    try:
        document = from_json(body)
    except ValueError as error:
        raise invalid(f"The body is not JSON: {error}", code="invalid_json") from None
    takes_any = kind.model_config.get("extra") == "ignore"
    if isinstance(document, dict) and len(document) > MAX_PARAMETERS and not takes_any:
        raise invalid(
            f"The body has {len(document)} parameters; at most {MAX_PARAMETERS} are known"
        )
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise _api_error(error.errors(include_url=False, include_input=False)[0]) from None


def _api_error(problem: ErrorDetails) -> ApiError:
    kind = problem["type"]
    context = problem.get("ctx", {})
    if "param" in context:
        return invalid(problem["msg"], context["param"], context.get("code"))
    param, name = _path(problem["loc"])
    if param is None:
        return invalid("The body must be a JSON object")
    if kind == "extra_forbidden":
        unknown = str(problem["loc"][-1])[:_MAX_NAME_CHARS]
        param = unknown if len(problem["loc"]) == 1 else f"{param}.{unknown}"
        return invalid(f"Unknown parameter: {param}", param, "unknown_parameter")
    if kind == "missing":
        return invalid(f"Missing required parameter: {param}", param, "missing_required_parameter")
    if name in _UNSUPPORTED:
        param = param[: param.rindex(name) + len(name)]  # the option, not what is in it
        return invalid(
            f"{param} is not supported by this server: {_UNSUPPORTED[name]}",
            param,
            "unsupported_parameter",
        )
    if name in _FORMS:
        return invalid(f"{param} must be {_FORMS[name]}", param)
    return invalid(f"Invalid value for {param}: {problem['msg']}", param)


def _path(location: tuple[int | str, ...]) -> tuple[str | None, str]:
    """``("messages", 2, "content", "str")`` as ``messages[2].content``, and the last field's name."""
    path, name = None, ""
    for item in location:
        if isinstance(item, int):
            path = f"{path}[{item}]"
        elif path is None or (item in Message.model_fields and path.startswith("messages[")):
            path = item if path is None else f"{path}.{item}"
            name = item
        elif item in StreamOptions.model_fields:
            path, name = f"{path}.{item}", item
        else:
            break  # the branch of a union
    return path, name


def _mistake(param: str, message: str) -> PydanticCustomError:
    # Braces in the text would be taken for placeholders.
    return PydanticCustomError("invalid_request", "{text}", {"param": param, "text": message})


def _unsupported(param: str, advice: str) -> PydanticCustomError:
    return PydanticCustomError(
        "invalid_request",
        "{text}",
        {
            "param": param,
            "text": f"{param} is not supported by this server: {advice}",
            "code": "unsupported_parameter",
        },
    )
