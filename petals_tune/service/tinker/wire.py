"""Tinker's messages of protobuf (the SDK's own tinker.proto), as this service uses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from google.protobuf.message import DecodeError
from tinker.proto import tinker_public_pb2 as proto

from petals_tune.errors import ConfigError
from petals_tune.losses.base import Inputs

MEDIA_TYPE = "application/x-protobuf"
_DTYPES = {proto.DTYPE_FLOAT32: np.float32, proto.DTYPE_INT64: np.int64, proto.DTYPE_INT32: np.int32}
_NO_TOKEN = (0, -99999.0)  # an empty place in a table of most likely tokens


@dataclass(frozen=True, kw_only=True)
class Datum:
    """One text: its tokens, what each of them is to predict, and what its loss needs besides. Shapes: S tokens."""

    ids: Sequence[int]  # (S,)
    targets: Sequence[int]  # (S,)
    inputs: Inputs


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    loss: str
    options: Mapping[str, float]
    data: Sequence[Datum]
    forward_only: bool


def parse_training_request(body: bytes) -> Any:
    """The ForwardBackwardRequest. Raises ConfigError for what is no such message."""
    message = proto.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise ConfigError(f"the body is no ForwardBackwardRequest: {error}", key="body") from None
    return message


def read_training_request(body: bytes) -> TrainingRequest:
    """Raises ConfigError for what is no such message, and for images, sound and sparse tensors."""
    message = parse_training_request(body)
    options: dict[str, float] = dict(message.loss_fn_config)
    for name, value in message.loss_fn_config_v2.items():
        if value.WhichOneof("value") == "text":
            raise ConfigError(f"loss_fn_config: {name} is a number here", key=name, seen=value.text)
        options[name] = value.number
    return TrainingRequest(
        loss=message.loss_fn,
        options=options,
        data=[_datum(each) for each in message.data],
        forward_only=message.forward_only,
    )


def _datum(message: Any) -> Datum:
    ids: list[int] = []
    for chunk in message.model_input:
        kind = next((name.name for name, _ in chunk.ListFields()), "nothing")
        if kind != "encoded_text":
            raise ConfigError(f"a text of tokens is understood, not {kind}", key="model_input", seen=kind)
        ids += np.frombuffer(chunk.encoded_text.tokens, np.int32).tolist()
    inputs = {name: _tensor(name, tensor) for name, tensor in message.loss_fn_inputs.items()}
    targets = inputs.pop("target_tokens", None)
    if targets is None:
        raise ConfigError("a datum needs 'target_tokens' beside its tokens", key="target_tokens")
    if targets.shape != (len(ids),) or not ids:
        raise ConfigError(
            f"target_tokens has one for each of the {len(ids)} tokens, not {tuple(targets.shape)}",
            key="target_tokens",
            seen=tuple(targets.shape),
        )
    return Datum(ids=ids, targets=targets.tolist(), inputs=inputs)


def _tensor(name: str, message: Any) -> torch.Tensor:
    if message.HasField("sparse_csr"):
        raise ConfigError(f"{name}: sparse tensors are not understood", key=name)
    if message.dtype not in _DTYPES:
        raise ConfigError(f"{name}: float32 and int64 are understood", key=name, seen=message.dtype)
    values = np.frombuffer(message.dense, _DTYPES[message.dtype]).copy()
    try:
        return torch.from_numpy(values).reshape(tuple(message.shape) or (-1,))
    except RuntimeError:
        raise ConfigError(f"{name}: {values.size} values for the shape {list(message.shape)}", key=name) from None


def training_output(logprobs: Sequence[torch.Tensor], metrics: Mapping[str, float]) -> bytes:
    """A ForwardBackwardOutput of the log-probabilities (S,) of each text's targets."""
    message = proto.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", metrics=metrics)
    record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(logprobs))
    arrays = [each.detach().float().numpy() for each in logprobs]
    ends = np.cumsum([0, *(array.nbytes for array in arrays)], dtype=np.int64)
    field = record.fields["logprobs"]
    field.data, field.offsets = b"".join(array.tobytes() for array in arrays), ends.tobytes()
    field.dtype = proto.DTYPE_FLOAT32
    return message.SerializeToString()


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """An answer of the model."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    top: Sequence[Sequence[tuple[int, float]]]  # for each token
    stopped: bool  # by a stop token or text, not by its length


def sample_output(
    sequences: Sequence[Sampled],
    *,
    prompt_logprobs: Sequence[float] | None,
    prompt_top: Sequence[Sequence[tuple[int, float]]] | None,
    top_prompt: int,
    top_sample: int,
) -> bytes:
    """A SampleResponse. The first position of a prompt has no log-probability: NaN, as the SDK wants it."""
    message = proto.SampleResponse()
    for sequence in sequences:
        added = message.sequences.add(
            stop_reason=proto.STOP_REASON_STOP if sequence.stopped else proto.STOP_REASON_LENGTH,
            tokens=np.asarray(sequence.tokens, np.int32).tobytes(),
            logprobs=np.asarray(sequence.logprobs, np.float32).tobytes(),
        )
        if top_sample:
            added.topk_sampled_logprobs.CopyFrom(_table(sequence.top, top_sample))
    if prompt_logprobs is not None:
        message.prompt_logprobs = np.asarray(prompt_logprobs, np.float32).tobytes()
    if prompt_top is not None and top_prompt:
        message.topk_prompt_logprobs.CopyFrom(_table(prompt_top, top_prompt))
    return message.SerializeToString()


def _table(rows: Sequence[Sequence[tuple[int, float]]], k: int) -> Any:
    filled = [[*row[:k], *[_NO_TOKEN] * (k - len(row))] for row in rows]
    tokens = np.asarray([[token for token, _ in row] for row in filled], np.int32)
    logprobs = np.asarray([[value for _, value in row] for row in filled], np.float32)
    return proto.TopkLogprobs(token_ids=tokens.tobytes(), logprobs=logprobs.tobytes(), k=k, length=len(rows))
