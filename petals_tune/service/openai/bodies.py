"""Bodies of requests, as OpenAI documents them. What would change an answer and is not honoured is refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from petals_tune.errors import ConfigError

Stop = str | Annotated[list[str], msgspec.Meta(max_length=16)] | None  # OpenAI takes 4, other servers more
# Values of fields that change nothing: what clients send by default, or for the provider's own bookkeeping.
_IGNORED = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("prompt_cache_retention", "prompt_cache_options"),
    }
)
# Fields that are refused for any value but these, which ask for what is done anyway.
_USUAL: dict[str, tuple[Any, ...]] = {"modalities": (["text"],), "best_of": (1,), "verbosity": ("medium",)}


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    include_usage: bool = False


class JSONSchema(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    schema: dict[str, Any] = {}
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


class NamedFunction(msgspec.Struct, frozen=True, kw_only=True):
    name: str


class NamedTool(msgspec.Struct, frozen=True, kw_only=True):
    """Of `tool_choice`: the tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class Function(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the model may call."""

    type: Literal["function"]
    function: Function


class _Sampled(msgspec.Struct, frozen=True, kw_only=True):
    """What chats and completions have in common."""

    model: str
    n: Annotated[int, msgspec.Meta(ge=1, le=128)] | None = None
    stop: Stop = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None  # beyond OpenAI's, as other servers have it
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def stops(self) -> Sequence[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def biases(self) -> dict[int, float]:
        """Raises ConfigError for what is no token."""
        try:
            return {int(token): bias for token, bias in (self.logit_bias or {}).items()}
        except ValueError:
            raise ConfigError("logit_bias: its names are token ids", key="logit_bias", seen=self.logit_bias) from None


class ChatBody(_Sampled, frozen=True, kw_only=True):
    """Of POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None


class CompletionBody(_Sampled, frozen=True, kw_only=True):
    """Of POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None


class EmbeddingBody(msgspec.Struct, frozen=True, kw_only=True):
    """Of POST /v1/embeddings."""

    model: str
    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None


Body = ChatBody | CompletionBody | EmbeddingBody


def read(kind: type[Any], body: bytes) -> Any:
    """Decode the `body` of a request. Raises ConfigError that names the field."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"the body of the request is not a JSON object: {error}", key="body") from None
    known = {field.name for field in msgspec.structs.fields(kind)}
    for name, value in fields.items():
        if name not in known | _IGNORED and value not in (None, False, [], {}, *_USUAL.get(name, ())):
            raise ConfigError(f"{name} is not honoured here: leave it out", key=name, seen=value)
    try:
        return msgspec.convert({name: fields[name] for name in known & fields.keys()}, kind)
    except msgspec.ValidationError as error:
        text = str(error)
        _, _, where = text.partition("at `$.")
        raise ConfigError(text, key=where.rstrip("`") or "body") from None
