"""The writing end of a stream, as client and server have it."""

from __future__ import annotations

import asyncio
import time

from petals_tune.wire import frames
from petals_tune.wire.codec import encode
from petals_tune.wire.messages import Message


class MessageWriter:
    """Writes messages frame by frame: they alternate on the stream, and a slow reader stops their writers."""

    def __init__(self, writer: asyncio.StreamWriter):
        self._writer = writer
        self._lock = asyncio.Lock()
        self._finished = False
        self.blocked_since_s: float | None = None  # time.monotonic() since when the reader takes nothing

    async def send(self, message_id: int, message: Message) -> int:
        """Write `message`; returns its bytes, frames included. Raises one of BROKEN where the stream has ended."""
        sent = 0
        for header, payload in frames.cut(message_id, encode(message)):
            async with self._lock:
                if (
                    self._finished or self._writer.is_closing()
                ):  # uvloop raises a RuntimeError at a write, as it does at bugs
                    raise ConnectionResetError("the stream was closed")
                self._writer.writelines((header, payload))  # one system call
                self.blocked_since_s = time.monotonic()
                await self._writer.drain()
                self.blocked_since_s = None
            sent += len(header) + len(payload)
        return sent

    def finish(self) -> None:
        """Send what was written, then the end of the stream; the other side closes once it has read all that."""
        if not self._finished and not self._writer.is_closing():
            self._finished = True
            self._writer.write_eof()

    def close(self) -> None:
        self._writer.close()

    def abort(self) -> None:
        """Close without waiting for the reader to take what was written."""
        self._writer.transport.abort()
