"""A client's stream as the server reads it: a greeting, then messages, none of which can take more than its limits."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from petals_tune.errors import ProtocolError
from petals_tune.net.stream import MessageWriter
from petals_tune.net.transport import Connection
from petals_tune.wire import frames
from petals_tune.wire.codec import MAX_HELLO_BYTES, decode_hello
from petals_tune.wire.frames import Assembler, Dropped
from petals_tune.wire.messages import Hello
from servers.requests.admission import Gate, Guest

logger = logging.getLogger(__name__)

GREETING_S = 10.0  # a stream on which nobody said Hello for so long is closed
STALL_S = 60.0  # one in the middle of a message, of either direction, on which nothing moves
IDLE_S = 60.0  # one on which nothing happens may have to go for another, where there is no room for more
_WATCH_S = 1.0


class ClientStream(MessageWriter):
    """One stream of one client, and what it has under way."""

    def __init__(self, connection: Connection, guest: Guest):
        super().__init__(connection)
        self.client, self.guest = connection.peer, guest
        self.message_id = 0  # of the frame that was read last
        self.check_still_in: Callable[[], None] = lambda: None  # raises AccessDenied; of a member of a private swarm
        self.tasks: dict[int, asyncio.Task[None]] = {}  # requests that are not answered yet
        self._taken_bytes = 0
        limits = guest.limits
        self._assembler = Assembler(
            max_message_bytes=limits.max_message_bytes,
            max_open_bytes=limits.max_receiving_bytes,
            admit=self._take,
        )
        self._heard_s = time.monotonic()
        self._greeted = self._inside_frame = False

    async def hello(self) -> Hello:
        """The first message. Raises ProtocolError where it is anything but a small Hello."""
        length, self.message_id, remaining = frames.read_header(await self.connection.read_exactly(frames.HEADER.size))
        if remaining or length > MAX_HELLO_BYTES:
            raise ProtocolError(f"the first message is a Hello of at most {MAX_HELLO_BYTES} bytes")
        hello = decode_hello(await self.connection.read_exactly(length))
        self._greeted = True
        return hello

    async def next_message(self) -> tuple[int, bytes | Dropped]:
        """(id, body) of the next whole message, at the client's pace or, where it asks too often, at ours.

        Raises ProtocolError for frames that break the rules, AccessDenied once the client's token is no longer good.
        """
        while True:
            header = await self.connection.read_exactly(frames.HEADER.size)
            self._heard_s, self._inside_frame = time.monotonic(), True
            length, self.message_id, remaining = frames.read_header(header)
            self.check_still_in()
            payload = await self.connection.read_exactly(length)
            self._heard_s, self._inside_frame = time.monotonic(), False
            body = self._assembler.feed(self.message_id, payload, remaining)
            if body is not None:
                if pause_s := self.guest.pause_s(self._heard_s):
                    await asyncio.sleep(pause_s)
                return self.message_id, body

    def begin(self, message_id: int) -> None:
        """One more request to answer. Raises ServerBusy; ProtocolError where its id is that of another one."""
        if message_id in self.tasks:
            raise ProtocolError(f"a second request with the id {message_id} before the first one was answered")
        self.guest.begin()

    def started(self, message_id: int, task: asyncio.Task[None], size: int) -> None:
        """`task` answers a request of `size` bytes; until it is done they count."""
        self.tasks[message_id] = task

        def ended(task: asyncio.Task[None]) -> None:
            del self.tasks[message_id]
            self.guest.end()
            self.give_back(size)
            if not task.cancelled() and (error := task.exception()) is not None:
                # It will never be answered: say so by ending the stream.
                logger.error("a bug while serving a request; its stream is closed", exc_info=error)
                self.connection.close()

        task.add_done_callback(ended)

    def give_back(self, size: int) -> None:
        """The memory of a request is free again."""
        size = min(size, self._taken_bytes)  # all of it was given back when the stream ended
        self._taken_bytes -= size
        self.guest.give_back(size)

    def end(self) -> None:
        """Close, and let go of everything."""
        for task in self.tasks.values():
            task.cancel()
        self.give_back(self._taken_bytes)
        self.connection.close()

    def is_stuck(self, now_s: float) -> bool:
        """Whether the client stands in the middle of something and does not move on."""
        if not self._greeted:
            return now_s - self._heard_s > GREETING_S
        if self.blocked_since_s is not None and now_s - self.blocked_since_s > STALL_S:
            return True
        return (self._inside_frame or len(self._assembler) > 0) and now_s - self._heard_s > STALL_S

    def idle_s(self, now_s: float) -> float:
        """Seconds since anything happened; 0 where something is under way."""
        return 0.0 if self.tasks or self._inside_frame or len(self._assembler) else now_s - self._heard_s

    def _take(self, size: int) -> bool:
        taken = self.guest.take(size)
        self._taken_bytes += size if taken else 0
        return taken


class OpenStreams:
    """All streams of a server; a watch ends those that are stuck."""

    def __init__(self, gate: Gate):
        self._gate = gate
        self._open: set[ClientStream] = set()
        self._watching: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, connection: Connection) -> ClientStream:
        """A new stream. Where there are too many, the one that idles longest has to go. Raises ServerBusy."""
        if self._gate.is_full:
            self._end_idle(time.monotonic())
        stream = ClientStream(connection, self._gate.enter(connection.peer))
        self._open.add(stream)
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())
        return stream

    def leave(self, stream: ClientStream) -> None:
        """Idempotent."""
        if stream in self._open:
            self._open.remove(stream)
            stream.end()
            self._gate.leave(stream.client)

    def finish(self) -> None:
        """Send what was written on all streams, and their end; whoever reads it closes them."""
        for stream in self._open:
            stream.connection.finish()

    def close(self) -> None:
        """Close all streams; those who read them notice."""
        for stream in self._open:
            stream.connection.close()

    def _end_idle(self, now_s: float) -> None:
        longest = max(self._open, key=lambda stream: stream.idle_s(now_s))
        if longest.idle_s(now_s) > IDLE_S:
            self.leave(longest)

    async def _watch(self) -> None:
        while self._open:
            await asyncio.sleep(_WATCH_S)
            now_s = time.monotonic()
            for stream in [stream for stream in self._open if stream.is_stuck(now_s)]:
                logger.info("stream of client %s closed: nothing moves on it", stream.client)
                stream.connection.abort()
