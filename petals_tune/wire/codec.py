"""Messages as bytes: MessagePack with the schema of messages.py, by msgspec. A tensor is an extension type inside.

One message is one piece of bytes. Decoding checks every field, and is what a peer's bytes go through first.
"""

from __future__ import annotations

from typing import Any, Union

import msgspec
import torch

from petals_tune.errors import ProtocolError
from petals_tune.wire.messages import Hello, Message
from petals_tune.wire.records import PROTOCOL
from petals_tune.wire.tensors import from_bytes, to_bytes

MAX_HELLO_BYTES = 4096  # of the first message of a stream, whose sender is not known yet
_MAX_TEXT = 300  # of msgspec's error, which may repeat a stranger's bytes
_TENSOR = 1  # the extension type


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(body: bytes) -> Message:
    """Decode any message. Raises ProtocolError."""
    return _decode(_decoder, body, "message")


def decode_hello(body: bytes) -> Hello:
    """Decode the first message of a stream, which must be a small Hello. Raises ProtocolError."""
    if len(body) > MAX_HELLO_BYTES:
        raise ProtocolError(f"a Hello of {len(body)} bytes; at most {MAX_HELLO_BYTES} are allowed", what="hello")
    return _decode(_hello_decoder, body, "hello")


def _decode(decoder: msgspec.msgpack.Decoder[Any], body: bytes, what: str) -> Any:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a message of {PROTOCOL}: {str(error)[:_MAX_TEXT]}", what=what) from None


def _encode_tensor(value: Any) -> msgspec.msgpack.Ext:
    if isinstance(value, torch.Tensor):
        return msgspec.msgpack.Ext(_TENSOR, to_bytes(value))
    raise NotImplementedError(f"{type(value).__name__} cannot be encoded")


def _decode_tensor(code: int, data: memoryview) -> torch.Tensor:
    if code != _TENSOR:
        raise ProtocolError(f"unknown extension type {code}", what="message")
    return from_bytes(data)


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_tensor)
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(
    Union[tuple(Message.__subclasses__())],  # noqa: UP007  # made of a list
    ext_hook=_decode_tensor,
)
_hello_decoder = msgspec.msgpack.Decoder(Hello)
