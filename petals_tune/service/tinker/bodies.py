"""Bodies of Tinker's requests, as its SDK 0.38 sends them in JSON."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec

from petals_tune.errors import ConfigError
from petals_tune.service.tinker.records import LoRA
from petals_tune.service.tinker.runs.run import AdamOptions

Ttl = Annotated[int, msgspec.Meta(ge=3600, le=10 * 366 * 24 * 3600)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1024)]
Top = Annotated[int, msgspec.Meta(ge=0, le=100)]
Body = TypeVar("Body")


class CreateSession(msgspec.Struct, kw_only=True):
    display_name: str | None = None
    user_metadata: dict[str, Any] | None = None


class OfSession(msgspec.Struct, kw_only=True):
    session_id: str


class OfRequest(msgspec.Struct, kw_only=True):
    request_id: str


class OfModel(msgspec.Struct, kw_only=True):
    model_id: str


class Numbered(msgspec.Struct, kw_only=True):
    """What all requests of a run have in common."""

    model_id: str
    seq_id: int


class CreateModel(msgspec.Struct, kw_only=True):
    session_id: str
    model_seq_id: int
    base_model: str
    lora_config: LoRA | None = None
    optimizer_config: dict[str, Any] | None = None
    user_metadata: dict[str, Any] | None = None


class LoadWeights(msgspec.Struct, kw_only=True):
    path: str
    optimizer: bool
    session_id: str | None = None
    model_seq_id: int | None = None
    base_model: str | None = None
    optimizer_config: dict[str, Any] | None = None
    user_metadata: dict[str, Any] | None = None


class OptimStep(msgspec.Struct, kw_only=True):
    adam_params: AdamOptions | None = None
    optimizer_params: dict[str, Any] | None = None


class SaveWeights(msgspec.Struct, kw_only=True):
    path: str | None = None
    sampling_session_seq_id: int | None = None
    kind: str = "snapshot"
    ttl_seconds: Ttl | None = None
    overwrite: bool = False
    user_metadata: dict[str, Any] | None = None
    age_encryption_recipients: list[str] | None = None


class WeightsInfo(msgspec.Struct, kw_only=True):
    tinker_path: str


class SetTtl(msgspec.Struct, kw_only=True):
    ttl_seconds: Ttl | None = None


class CreateSamplingSession(msgspec.Struct, kw_only=True):
    session_id: str
    model_path: str | None = None
    base_model: str | None = None


class OfSampler(msgspec.Struct, kw_only=True):
    sampling_session_id: str


class Chunk(msgspec.Struct, kw_only=True):
    """A part of a prompt: a text of tokens is understood here."""

    type: str = "encoded_text"
    tokens: list[int] = []


class Prompt(msgspec.Struct, kw_only=True):
    chunks: list[Chunk]


class SamplingParams(msgspec.Struct, kw_only=True):
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    seed: int | None = None
    stop: str | list[str | int] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    top_k: int = -1
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0


class Sample(msgspec.Struct, kw_only=True):
    prompt: Prompt
    sampling_params: SamplingParams = msgspec.field(default_factory=SamplingParams)
    sampling_session_id: str | None = None
    seq_id: int | None = None
    num_samples: Count = 1
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: Top = 0
    topk_sample_logprobs: Top = 0
    prompt_logprobs_last_n: Annotated[int, msgspec.Meta(ge=1)] | None = None
    target_prompt_logprobs: Any = None
    prompt_alt_tokens_k: int = 0
    record_stability_info: bool | None = None


def read(body: bytes, kind: type[Body]) -> Body:
    """Raises ConfigError for a body that is no JSON object of this kind, with the place of the mistake."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise ConfigError(f"the body of the request: {error}", key=_place(str(error))) from None


def _place(message: str) -> str:
    """Of "Expected `int` >= 1 - at `$.rank`": rank."""
    _, found, place = message.partition("at `$.")
    return place.rstrip("`") if found else "body"
