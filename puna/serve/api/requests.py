"""What clients may ask: OpenAI's requests, as far as they are supported, and a clear answer to everything else."""

import json
from abc import ABC, abstractmethod
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal, Self

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from puna.engine.params import SamplingParams
from puna.llama.dialog import Message
from puna.llama.tools import ToolCall
from puna.serve.api.errors import ApiError

MAX_BODY_BYTES = 16 << 20

# Accepted and not used: they change nothing about the answer.
UNUSED = frozenset({
    "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier",
})  # fmt: skip

# Fields of OpenAI's API that are not supported, each with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "store": (False,),
}  # fmt: skip


class Body(BaseModel):
    """A JSON object of known fields; a field's description completes the sentence "it must be ..."."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    unused: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def read(cls, raw: Any, path: str = "") -> Self:
        """Raises ApiError, which names the field. null stands for a field that is not given."""
        if not isinstance(raw, dict):
            raise ApiError(f"{path or 'The body'} must be a JSON object", path or None, "invalid_type")
        given = {name: value for name, value in raw.items() if value is not None and name not in cls.unused}
        for name in given.keys() & cls.neutral.keys():
            if given.pop(name) not in cls.neutral[name]:
                raise _unsupported(f"{path}{name}")
        for name in given.keys() - cls.model_fields.keys():
            raise cls._unknown(name, path)
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise cls._error(error.errors(include_url=False)[0], given, path) from None

    @classmethod
    def _unknown(cls, name: str, path: str) -> ApiError:
        near = get_close_matches(name, [*cls.model_fields, *cls.unused], n=1)
        hint = f"did you mean {near[0]}?" if near else f"known fields: {', '.join(cls.model_fields)}"
        return ApiError(f"Unknown field {path}{name}; {hint}", path + name, "unknown_parameter")

    @classmethod
    def _error(cls, error: Any, given: dict[str, Any], path: str) -> ApiError:
        name = str(error["loc"][0])
        wanted = f"it must be {cls.model_fields[name].description}"
        if error["type"] == "missing":
            return ApiError(f"{path}{name} is missing; {wanted}", path + name, "missing_required_parameter")
        shown = json.dumps(given[name])
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return ApiError(f"{path}{name} is {shown}; {wanted}", path + name, "invalid_value")


class StreamOptions(Body):
    """How a stream ends."""

    include_usage: bool = Field(False, description="true or false")


Stop = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[int], Field(min_length=1)]


class Sampling(Body, ABC):
    """What both kinds of request have in common; defaults are OpenAI's."""

    unused: ClassVar = UNUSED
    neutral: ClassVar = NEUTRAL

    model: str = Field(description="the name of the model, as /v1/models lists it")
    temperature: float = Field(1.0, ge=0, le=2, description="a number from 0 (greedy) to 2")
    top_p: float = Field(1.0, ge=0, le=1, description="a number from 0 to 1")
    n: int = Field(1, ge=1, le=128, description="an integer from 1 to 128")
    seed: int | None = Field(None, description="an integer")
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] = Field(
        [], description="a string of at least one character, or a list of at most 16 of them"
    )
    stream: bool = Field(False, description="true or false")
    stream_options: dict[str, Any] | None = Field(None, description='an object such as {"include_usage": true}')

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return StreamOptions.read(self.stream_options or {}, "stream_options.").include_usage

    @property
    @abstractmethod
    def num_top(self) -> int | None:
        """Alternatives to report a token; None: no log-probabilities at all."""

    @property
    @abstractmethod
    def max_new(self) -> int | None:
        """Tokens to draw at most; None: up to the end of the context."""

    def check(self) -> None:
        """Rules between fields. Raises ApiError."""
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options is given but stream is not true", "stream_options", "invalid_value")
        _ = self.include_usage

    def params(self) -> SamplingParams:
        """The same for the engine."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        return SamplingParams(self.max_new, self.temperature, self.top_p, self.seed, stop, self.num_top or 0)


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    neutral: ClassVar = NEUTRAL | {"best_of": (1,), "suffix": ("",)}

    prompt: str | list[str] | Ids | list[Ids] = Field(
        description="a string, a list of strings, a list of token ids, or a list of such lists"
    )
    max_tokens: int = Field(16, ge=1, description="an integer of at least 1")
    logprobs: int | None = Field(None, ge=0, le=5, description="an integer from 0 to 5")
    echo: bool = Field(False, description="true or false")

    @property
    def num_top(self) -> int | None:
        return self.logprobs

    @property
    def max_new(self) -> int:
        return self.max_tokens

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One entry a prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if self.prompt and isinstance(self.prompt[0], int) else self.prompt  # type: ignore[return-value]

    def check(self) -> None:
        super().check()
        if not self.prompt and not isinstance(self.prompt, str):
            raise ApiError("prompt is an empty list; give at least one prompt", "prompt", "invalid_value")
        if self.echo and self.logprobs is not None:
            raise _unsupported("echo", " together with logprobs")


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"] = Field(description='"text", the only kind of content this model reads')
    text: str = Field(description="a string")


class FunctionCall(Body):
    """What a tool call asks for."""

    name: str = Field(min_length=1, description="the name of a function")
    arguments: str = Field(description="a string that holds a JSON object")


class CallPart(Body):
    """A tool call of an earlier answer."""

    unused: ClassVar = frozenset({"id", "index"})

    type: Literal["function"] = Field("function", description='"function", the only kind of tool')
    function: dict[str, Any] = Field(description="an object with a name and arguments")

    def call(self, path: str) -> ToolCall:
        """The same for the dialog."""
        asked = FunctionCall.read(self.function, f"{path}function.")
        try:
            arguments = json.loads(asked.arguments)
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            name = f"{path}function.arguments"
            raise ApiError(f"{name} is not a string that holds a JSON object", name, "invalid_value")
        return ToolCall(asked.name, arguments)


class FunctionPart(Body):
    """A function that the model may call."""

    neutral: ClassVar = {"strict": (False,)}

    name: str = Field(min_length=1, description="the name of a function")
    description: str = Field("", description="a string")
    parameters: dict[str, Any] = Field({}, description="a JSON schema")


class ToolPart(Body):
    """One of the tools of a request."""

    type: Literal["function"] = Field(description='"function", the only kind of tool')
    function: dict[str, Any] = Field(description="an object with name, description and parameters")


class ChatMessage(Body):
    """A message of the conversation."""

    neutral: ClassVar = {"name": (), "function_call": (), "refusal": (), "audio": (), "annotations": ([],)}
    unused: ClassVar = frozenset({"tool_call_id"})

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description='"system", "developer", "user", "assistant" or "tool"'
    )
    content: str | list[dict[str, Any]] | None = Field(None, description="a string, or a list of text parts")
    tool_calls: list[dict[str, Any]] = Field([], description="a list of tool calls")

    def message(self, path: str) -> Message:
        """The same for the dialog; text parts are joined, and a developer speaks as the system."""
        if self.content is None and not self.tool_calls:
            wanted = f"it must be {type(self).model_fields['content'].description}"
            raise ApiError(f"{path}content is missing; {wanted}", f"{path}content", "missing_required_parameter")
        text = self._join(self.content, path) if isinstance(self.content, list) else self.content or ""
        places = [f"{path}tool_calls[{i}]." for i in range(len(self.tool_calls))]
        calls = [CallPart.read(raw, at).call(at) for raw, at in zip(self.tool_calls, places, strict=True)]
        return Message("system" if self.role == "developer" else self.role, text, tuple(calls))

    @staticmethod
    def _join(parts: list[Any], path: str) -> str:
        return "".join(TextPart.read(part, f"{path}content[{i}].").text for i, part in enumerate(parts))


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    neutral: ClassVar = NEUTRAL | {
        "parallel_tool_calls": (True, False), "functions": ([],),
        "function_call": ("none", "auto"), "response_format": ({"type": "text"},), "modalities": (["text"],),
        "audio": (), "prediction": (), "reasoning_effort": (), "verbosity": (), "web_search_options": (),
    }  # fmt: skip

    messages: list[dict[str, Any]] = Field(min_length=1, description="a list of at least one message")
    tools: list[dict[str, Any]] = Field([], description="a list of functions that the model may call")
    tool_choice: Literal["none", "auto"] = Field("auto", description='"none" or "auto"')
    max_tokens: int | None = Field(None, ge=1, description="an integer of at least 1")
    max_completion_tokens: int | None = Field(None, ge=1, description="an integer of at least 1")
    logprobs: bool = Field(False, description="true or false")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="an integer from 0 to 20")

    @property
    def num_top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def max_new(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def dialog(self) -> list[Message]:
        """The messages. Raises ApiError, which names the one at fault."""
        at = [f"messages[{i}]." for i in range(len(self.messages))]
        return [ChatMessage.read(raw, path).message(path) for raw, path in zip(self.messages, at, strict=True)]

    @property
    def functions(self) -> tuple[dict[str, Any], ...]:
        """The functions that the model may call. Raises ApiError."""
        for i, raw in enumerate(self.tools):
            FunctionPart.read(ToolPart.read(raw, f"tools[{i}].").function, f"tools[{i}].function.")
        return () if self.tool_choice == "none" else tuple(self.tools)

    def check(self) -> None:
        super().check()
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ApiError("Give max_tokens or max_completion_tokens, not both", "max_tokens", "invalid_value")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError("top_logprobs is given but logprobs is not true", "top_logprobs", "invalid_value")


def _unsupported(name: str, when: str = "") -> ApiError:
    return ApiError(f"{name}{when} is not supported by this server; leave it out", name, "unsupported_parameter")


async def json_body(request: Request) -> Any:
    """The parsed body. JSON must be declared: a foreign web page cannot send that type without asking first."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise ApiError("Send the body as JSON with the header Content-Type: application/json", status=415)
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            raise ApiError(f"The body is larger than {MAX_BODY_BYTES >> 20} MiB", code="body_too_large", status=413)
    try:
        return json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise ApiError(f"The body is not JSON: {error}", code="invalid_json") from None
