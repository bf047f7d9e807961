"""The writing of messages on a connection, by clients and servers alike."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from petals_tune.net.transport import Connection
from petals_tune.wire import frames
from petals_tune.wire.codec import INLINE_BYTES, Part, encode
from petals_tune.wire.messages import Message, tensors_of
from petals_tune.wire.tensors import encoded_bytes

T = TypeVar("T")


class MessageWriter:
    """Writes messages frame by frame: they alternate on the connection, and a slow reader stops their writers."""

    def __init__(self, connection: Connection, clock: Callable[[], float] = time.monotonic):
        self.connection = connection
        self._lock, self._clock = asyncio.Lock(), clock
        self._running: set[asyncio.Task[Any]] = set()  # asyncio keeps no strong reference to a task
        self.blocked_since_s: float | None = None  # on the `clock`: since when the reader takes nothing

    async def write(self, message_id: int, message: Message) -> int:
        """Write `message`; returns its bytes, frames included. Raises ConnectionLost.

        A message that was begun is written to its end, even where the caller is cancelled: the reader would keep memory
        for the rest of it.
        """
        inline = sum(map(encoded_bytes, tensors_of(message))) <= INLINE_BYTES
        return await self.write_parts(
            message_id, [encode(message) if inline else await asyncio.to_thread(encode, message)]
        )

    async def write_parts(self, message_id: int, parts: Sequence[Part]) -> int:
        """Write an encoded message, as `write` does."""
        if sum(map(len, parts)) <= frames.MAX_FRAME_BYTES:
            return await self._write(message_id, [b"".join(parts)])
        task = self._keep(asyncio.create_task(self._write(message_id, parts)))
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # the caller may have been cancelled
        return await asyncio.shield(task)

    def _keep(self, task: asyncio.Task[T]) -> asyncio.Task[T]:
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    def close_connection(self) -> None:
        """Close the connection; at once where the reader takes nothing, since its writers would wait for ever."""
        if self.blocked_since_s is None:
            self.connection.close()
        else:
            self.connection.abort()

    async def _write(self, message_id: int, parts: Sequence[Part]) -> int:
        sent = 0
        for header, payload in frames.cut(message_id, *parts):
            async with self._lock:
                self.blocked_since_s = self._clock()
                try:
                    await self.connection.write(header, payload)
                finally:
                    self.blocked_since_s = None
            sent += len(header) + len(payload)
        return sent
