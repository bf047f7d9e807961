"""Messages as bytes: MessagePack with the schema of messages.py, by msgspec. A tensor is an extension type inside.

One message is one piece of bytes. Decoding checks every field, and is what a peer's bytes go through first.
"""

from __future__ import annotations

import math
import secrets
import struct
import threading
from typing import Any, Union

import msgspec
import torch

from petals_tune.errors import ProtocolError
from petals_tune.wire import tensors
from petals_tune.wire.messages import Hello, Message
from petals_tune.wire.records import PROTOCOL

# Up to here an event loop may encode and decode messages itself: the slowest ones, adapters of many parts, take 25 ms.
INLINE_BYTES = 2**16
MAX_HELLO_BYTES = 4096  # of the first message of a stream, whose sender is not known yet
_MAX_TEXT = 300  # of msgspec's error, which may repeat a stranger's bytes
_TENSOR = 1  # the extension type
_EXTENSION = struct.Struct(">BIb")  # MessagePack's ext 32
_MARK = secrets.token_bytes(16)  # in the place of a tensor while a message is encoded; nobody else knows it
_MARKED = b"\xd8" + bytes([_TENSOR]) + _MARK  # as MessagePack has it

Part = bytes | memoryview


def encode(message: Message) -> bytes:
    return b"".join(encode_parts(message))


def encode_parts(message: Message) -> list[Part]:
    """Encode a message as parts, which one after the other are its bytes. Values of tensors stay where they are.

    So they must not change until the parts were sent.
    """
    found: list[tuple[bytes, Part]] = []

    def encode_tensor(value: Any) -> msgspec.msgpack.Ext:
        if not isinstance(value, torch.Tensor):
            raise NotImplementedError(f"{type(value).__name__} cannot be encoded")
        found.append(tensors.to_parts(value))
        return msgspec.msgpack.Ext(_TENSOR, _MARK)

    first, *others = msgspec.msgpack.Encoder(enc_hook=encode_tensor).encode(message).split(_MARKED)
    parts: list[Part] = [first]
    for (header, values), after in zip(found, others, strict=True):
        parts += [_EXTENSION.pack(0xC9, len(header) + len(values), _TENSOR) + header, values, after]
    return parts


def decode(body: bytes, *, max_bytes: int | None = None) -> Message:
    """Decode any message. Raises ProtocolError; MemoryError before its tensors take more than `max_bytes`."""
    _allowed.bytes = math.inf if max_bytes is None else max_bytes
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


def _decode_tensor(code: int, data: memoryview) -> torch.Tensor:
    if code != _TENSOR:
        raise ProtocolError(f"unknown extension type {code}", what="message")
    _allowed.bytes -= tensors.decoded_bytes(data)
    if _allowed.bytes < 0:
        raise MemoryError
    return tensors.from_bytes(data)


class _Allowed(threading.local):
    """What tensors of the message that this thread decodes may still take, in bytes."""

    bytes: float = math.inf


_allowed = _Allowed()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(
    Union[tuple(Message.__subclasses__())],  # noqa: UP007  # made of a list
    ext_hook=_decode_tensor,
)
_hello_decoder = msgspec.msgpack.Decoder(Hello)
