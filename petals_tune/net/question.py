"""One question and one answer on a connection: small messages of a schema, each with its length before it."""

from __future__ import annotations

import struct
from typing import Any, TypeVar

import msgspec

from petals_tune.errors import ProtocolError
from petals_tune.net.transport import Connection

MAX_BYTES = 8192  # of a question or an answer
_LENGTH = struct.Struct(">I")
M = TypeVar("M")


async def write_message(connection: Connection, message: Any) -> None:
    """Write a msgspec Struct. Raises ConnectionLost."""
    body = msgspec.msgpack.encode(message)
    await connection.write(_LENGTH.pack(len(body)), body)


async def read_message(connection: Connection, kind: type[M]) -> M:
    """Read a message of class `kind`. Raises ConnectionLost; ProtocolError for anything else, and beyond MAX_BYTES."""
    (length,) = _LENGTH.unpack(await connection.read_exactly(_LENGTH.size))
    if length > MAX_BYTES:
        raise ProtocolError(f"{length} bytes; at most {MAX_BYTES} are allowed", what="message")
    try:
        return msgspec.msgpack.decode(await connection.read_exactly(length), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a {kind.__name__}: {str(error)[:200]}", what="message") from None
