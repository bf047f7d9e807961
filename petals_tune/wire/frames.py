"""Framing: messages are cut into frames, so that many share one stream. No I/O here.

A frame is `length: u32, message id: u64, remaining: u64` and `length` bytes; `remaining` counts the bytes of the same
message that are still to come, so the first frame of an id gives the size of the whole message. Frames of different
messages may alternate, so that a large message never delays a small one.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from petals_tune.errors import ProtocolError

HEADER = struct.Struct(">IQQ")
MAX_FRAME_BYTES = 256 * 1024  # on loopback, larger frames are not faster
MAX_OPEN_MESSAGES = 128  # unfinished ones on a stream; each takes memory, however small it is


def cut(message_id: int, *parts: bytes | memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Cut a message, which is all `parts` one after the other, into frames. Yields pairs of (header, payload)."""
    remaining = sum(map(len, parts))
    if not remaining:
        yield HEADER.pack(0, message_id, 0), memoryview(b"")
    for part in parts:
        view = memoryview(part)
        for start in range(0, len(view), MAX_FRAME_BYTES):
            payload = view[start : start + MAX_FRAME_BYTES]
            remaining -= len(payload)
            yield HEADER.pack(len(payload), message_id, remaining), payload


def read_header(header: bytes) -> tuple[int, int, int]:
    """Return (length, message id, remaining) of a frame. Raises ProtocolError for a length over the limit."""
    length, message_id, remaining = HEADER.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise ProtocolError(f"a frame of {length} bytes; at most {MAX_FRAME_BYTES} are allowed", what="frame")
    return length, message_id, remaining


@dataclass(frozen=True)
class Dropped:
    """A message for which there was no room: its bytes were read and not kept."""

    total: int


class _Message:
    """An unfinished message: what came of it."""

    __slots__ = ("began_s", "body", "came", "due", "total")

    def __init__(self, total: int, now_s: float, body: bytearray | None):
        self.total = self.due = total  # due: bytes still to come
        self.came = 0
        self.began_s = now_s
        self.body = body  # None: it is dropped


class Assembler:
    """Reassembles the messages of one stream. Memory is bounded by `max_message_bytes` and `max_open_bytes`.

    A message takes the memory of the bytes that have come of it, whatever size it claims.
    """

    def __init__(
        self,
        *,
        max_message_bytes: int,
        max_open_bytes: int,
        admit: Callable[[int], bool] = lambda total: True,
        reserve: Callable[[int], bool] = lambda size: True,
        release: Callable[[int], None] = lambda size: None,
    ):
        """`admit(total)` is asked at a message's first frame: whether there is room for all of it now.

        `reserve(size)` is called with the bytes of each frame that is kept; where it returns False, the message is
        dropped, and `release(size)` is called with what had come of it. What is reserved of a message that `feed`
        returns is the caller's.
        """
        self._max_message_bytes = max_message_bytes
        self._max_open_bytes = max_open_bytes
        self._admit, self._reserve, self._release = admit, reserve, release
        self._open: dict[int, _Message] = {}
        self.open_bytes = 0  # of unfinished messages that are kept

    def __len__(self) -> int:
        """Number of unfinished messages."""
        return len(self._open)

    def feed(self, message_id: int, payload: bytes, remaining: int, now_s: float = 0.0) -> bytes | Dropped | None:
        """Add a frame; return the message when this was its last. Raises ProtocolError for a frame out of order."""
        message = self._open.get(message_id)
        if message is None:
            message = self._begin(len(payload) + remaining, now_s)
            if not remaining:
                kept = message.body is not None and self._reserve(len(payload))
                return payload if kept else Dropped(len(payload))
            self._open[message_id] = message
        if not payload or len(payload) + remaining != message.due:
            raise ProtocolError(f"a frame of message {message_id} does not continue the one before", what="frame")
        message.due = remaining
        message.came += len(payload)
        if message.body is not None:
            self._keep(message, message.body, payload)
        if remaining:
            return None
        del self._open[message_id]
        if message.body is None:
            return Dropped(message.total)
        self.open_bytes -= message.total
        return message.body  # type: ignore[return-value]  # a bytearray reads like bytes; a copy would cost as much again

    def slowest(self, now_s: float, *, after_s: float) -> float:
        """Return the bytes/s of the message that comes slowest, of those that began more than `after_s` ago.

        Infinity where there is none.
        """
        ages_s = ((message, now_s - message.began_s) for message in self._open.values())
        return min((message.came / age_s for message, age_s in ages_s if age_s > after_s), default=math.inf)

    def oldest_s(self, now_s: float) -> float:
        """Return the seconds since the oldest unfinished message began; 0 where there is none."""
        return max((now_s - message.began_s for message in self._open.values()), default=0.0)

    def clear(self) -> None:
        """Drop all unfinished messages."""
        self._release(self.open_bytes)
        self._open.clear()
        self.open_bytes = 0

    def _begin(self, total: int, now_s: float) -> _Message:
        """Return a new message, to be dropped where there is no room. Raises ProtocolError where it breaks a limit."""
        if total > self._max_message_bytes:
            raise ProtocolError(
                f"a message of {total} bytes; at most {self._max_message_bytes} are allowed", what="message"
            )
        if len(self._open) >= MAX_OPEN_MESSAGES:
            raise ProtocolError(f"more than {MAX_OPEN_MESSAGES} unfinished messages on one stream", what="message")
        return _Message(total, now_s, bytearray() if self._admit(total) else None)

    def _keep(self, message: _Message, body: bytearray, payload: bytes) -> None:
        """Add `payload` to the `body` of a message, which is dropped where there is no room for it."""
        if self.open_bytes + len(payload) > self._max_open_bytes:
            text = f"more than {self._max_open_bytes} bytes of unfinished messages on one stream"
            raise ProtocolError(text, what="message")
        if self._reserve(len(payload)):
            self.open_bytes += len(payload)
            body += payload
        else:
            message.body = None
            self.open_bytes -= len(body)
            self._release(len(body))
