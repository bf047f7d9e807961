"""Messages cut into frames and put together again; many messages share one stream. Sans I/O.

A frame is `length: u32, message id: u64, remaining: u32` and `length` bytes; `remaining` counts the bytes of the same
message that are still to come, so the first frame of an id tells the size of the whole message. Frames of different
messages may alternate, so a large one never holds up a small one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from petals_tune.errors import ProtocolError

HEADER = struct.Struct(">IQI")
MAX_FRAME_BYTES = 256 * 1024  # bulk speed is flat from here up (measured on loopback: design)


def cut(message_id: int, body: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """`body` as frames: pairs of (header, payload)."""
    view = memoryview(body)
    for start in range(0, max(len(view), 1), MAX_FRAME_BYTES):
        payload = view[start : start + MAX_FRAME_BYTES]
        yield HEADER.pack(len(payload), message_id, len(view) - start - len(payload)), payload


def read_header(header: bytes) -> tuple[int, int, int]:
    """(length, message id, remaining) of a frame; the length is checked before anybody reads that much."""
    length, message_id, remaining = HEADER.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise ProtocolError(f"a frame of {length} bytes; at most {MAX_FRAME_BYTES} are allowed")
    return length, message_id, remaining


class Assembler:
    """Puts the frames of one stream together. Memory is bounded by `max_message_bytes` and `max_open_bytes`."""

    def __init__(self, *, max_message_bytes: int, max_open_bytes: int):
        self._max_message_bytes = max_message_bytes
        self._max_open_bytes = max_open_bytes
        self._open: dict[int, tuple[bytearray, int]] = {}
        self._open_bytes = 0

    def feed(self, message_id: int, payload: bytes, remaining: int) -> bytes | None:
        """The whole message once its last frame is here, else None. Raises ProtocolError on a frame out of place."""
        if message_id not in self._open:
            total = len(payload) + remaining
            if total > self._max_message_bytes:
                raise ProtocolError(f"a message of {total} bytes; at most {self._max_message_bytes} are allowed")
            if not remaining:
                return payload
            if self._open_bytes + total > self._max_open_bytes:
                raise ProtocolError(f"more than {self._max_open_bytes} bytes of unfinished messages on one stream")
            self._open[message_id] = (bytearray(), total)
            self._open_bytes += total
        body, total = self._open[message_id]
        if not payload or len(body) + len(payload) + remaining != total:
            raise ProtocolError(f"a frame of message {message_id} does not continue the one before")
        body += payload
        if remaining:
            return None
        del self._open[message_id]
        self._open_bytes -= total
        return body  # type: ignore[return-value]  # a bytearray reads like bytes; a copy of it would cost as much again
