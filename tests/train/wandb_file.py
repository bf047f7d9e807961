"""What an offline W&B run wrote, read with W&B's own messages.

The file is a LevelDB log (blocks of 32 KiB, records cut into chunks) of protobuf `Record`s; wandb 0.31 reads it in its
Go core alone, so that its 20 lines of framing are here.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK_BYTES, _FILE_HEADER_BYTES = 32768, 7
_HEADER = struct.Struct("<IHB")  # checksum, length, whole or which part


def records(path: Path) -> Iterator[Any]:
    data = path.read_bytes()
    assert data.startswith(b":W&B")
    position, whole = _FILE_HEADER_BYTES, b""
    while position + _HEADER.size <= len(data):
        left = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left < _HEADER.size:
            position += left
            continue
        _, length, part = _HEADER.unpack_from(data, position)
        position += _HEADER.size
        whole += data[position : position + length]
        position += length
        if part in (1, 4):  # the only one, or the last one
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def is_whole(path: Path) -> bool:
    """Whether the run's end is written."""
    return any(record.WhichOneof("record_type") == "exit" for record in records(path))


def history(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics."""
    return [_values(record.history.item) for record in records(path) if record.WhichOneof("record_type") == "history"]


def config(path: Path) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind in ("run", "config"):
            merged |= _values((record.run.config if kind == "run" else record.config).update)
    return merged


def _values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
