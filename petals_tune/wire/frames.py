"""Framing: messages are cut into frames, so that many share one stream. No I/O here.

A frame is `length: u32, message id: u64, remaining: u32` and `length` bytes; `remaining` counts the bytes of the same
message that are still to come, so the first frame of an id gives the size of the whole message. Frames of different
messages may alternate, so that a large message never delays a small one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from petals_tune.errors import ProtocolError

HEADER = struct.Struct(">IQI")
MAX_FRAME_BYTES = 256 * 1024  # on loopback, larger frames are not faster
MAX_OPEN_MESSAGES = 128  # unfinished ones on a stream; each takes memory, however small it is


def cut(message_id: int, body: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Cut `body` into frames. Yields pairs of (header, payload)."""
    view = memoryview(body)
    for start in range(0, max(len(view), 1), MAX_FRAME_BYTES):
        payload = view[start : start + MAX_FRAME_BYTES]
        yield HEADER.pack(len(payload), message_id, len(view) - start - len(payload)), payload


def read_header(header: bytes) -> tuple[int, int, int]:
    """Return (length, message id, remaining) of a frame. Raises ProtocolError for a length over the limit."""
    length, message_id, remaining = HEADER.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise ProtocolError(f"a frame of {length} bytes; at most {MAX_FRAME_BYTES} are allowed", what="frame")
    return length, message_id, remaining


@dataclass(frozen=True)
class Dropped:
    """A message that was not admitted: its bytes were read and not kept."""

    total: int


class Assembler:
    """Reassembles the messages of one stream. Memory is bounded by `max_message_bytes` and `max_open_bytes`."""

    def __init__(
        self, *, max_message_bytes: int, max_open_bytes: int, admit: Callable[[int], bool] = lambda total: True
    ):
        """`admit(total)` is called at the first frame of each message: whether there is room for its `total` bytes."""
        self._max_message_bytes = max_message_bytes
        self._max_open_bytes = max_open_bytes
        self._admit = admit
        self._open: dict[int, tuple[bytearray | None, int, int]] = {}  # body, bytes still to come, total
        self.open_bytes = 0  # of admitted unfinished messages, by the sizes that they claim

    def __len__(self) -> int:
        """Number of unfinished messages."""
        return len(self._open)

    def feed(self, message_id: int, payload: bytes, remaining: int) -> bytes | Dropped | None:
        """Add a frame; return the message when this was its last. Raises ProtocolError for a frame out of order."""
        if message_id not in self._open:
            admitted = self._begin(len(payload) + remaining)
            if not remaining:
                return payload if admitted else Dropped(len(payload))
            self._open[message_id] = (
                bytearray() if admitted else None,
                len(payload) + remaining,
                len(payload) + remaining,
            )
            self.open_bytes += len(payload) + remaining if admitted else 0
        body, due, total = self._open[message_id]
        if not payload or len(payload) + remaining != due:
            raise ProtocolError(f"a frame of message {message_id} does not continue the one before", what="frame")
        if body is not None:
            body += payload
        if remaining:
            self._open[message_id] = (body, remaining, total)
            return None
        del self._open[message_id]
        if body is None:
            return Dropped(total)
        self.open_bytes -= total
        return body  # type: ignore[return-value]  # a bytearray reads like bytes; a copy of it would cost as much again

    def _begin(self, total: int) -> bool:
        """Return whether a new message is kept. Raises ProtocolError where it breaks a limit of this stream."""
        if total > self._max_message_bytes:
            raise ProtocolError(
                f"a message of {total} bytes; at most {self._max_message_bytes} are allowed", what="message"
            )
        if len(self._open) >= MAX_OPEN_MESSAGES:
            raise ProtocolError(f"more than {MAX_OPEN_MESSAGES} unfinished messages on one stream", what="message")
        if self.open_bytes + total > self._max_open_bytes:
            raise ProtocolError(
                f"more than {self._max_open_bytes} bytes of unfinished messages on one stream", what="message"
            )
        return self._admit(total)
