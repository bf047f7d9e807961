"""Server side of a client's stream: reads the Hello and then messages, within the client's quota."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from petals_tune.errors import AccessDenied, ConnectionLost, PetalsTuneError, ProtocolError, ServerError
from petals_tune.net.transport import Connection
from petals_tune.net.writer import MessageWriter
from petals_tune.wire import frames
from petals_tune.wire.codec import MAX_HELLO_BYTES, Part, decode_hello
from petals_tune.wire.frames import Assembler, Dropped
from petals_tune.wire.messages import Hello, Refusal
from servers.requests.admission import Admission, ClientQuota, Reservation

logger = logging.getLogger(__name__)

GREETING_S = 10.0  # a stream without a Hello for so long is closed
STALL_S = 60.0  # a stream is closed where a message, of either direction, makes no progress for so long
# ... and where a message has come more slowly, in the mean since it began, STALL_S or longer ago. A client on a line of
# 256 kbit/s that sends 32 requests at a time, frame by frame in turns, sends each at 1,000 bytes/s.
LEAST_BYTES_PER_S = 512.0
FLUSH_S = 10.0  # the end of a stream waits so long for its client to read what was written
IDLE_S = 60.0  # a stream that is idle for longer is closed to make room for a new one
EXPELLED_S = 5.0  # a client that is no member any more has so long to read why its stream ends
TURN_S = 0.001  # a stream whose next messages are here already lets the others go on after so long
_WAITED_S = 0.0001  # a read that took longer has waited, and the others went on
_WATCH_S = 1.0


class ClientStream(MessageWriter):
    """One stream of one client, and its requests in flight."""

    def __init__(self, connection: Connection, quota: ClientQuota):
        super().__init__(connection)
        self.client, self.quota = connection.peer, quota
        self.message_id = 0  # of the last frame that was read
        self.check_still_in: Callable[[], None] = lambda: None  # raises AccessDenied; set in a private swarm
        self.tasks: dict[int, asyncio.Task[None]] = {}  # requests in flight, by message id
        limits = quota.limits
        self._assembler = Assembler(
            max_message_bytes=limits.max_message_bytes,
            max_open_bytes=limits.max_receiving_bytes,
            admit=quota.fits,
            reserve=quota.reserve,
            release=quota.release,
        )
        self._leaving: dict[int, float] = {}  # replies that wait to be read, by message id: since when
        self._heard_s = self._turn_s = time.monotonic()
        self._greeted = self._inside_frame = False
        self._expelled_s: float | None = None

    async def hello(self) -> Hello:
        """Read the first message. Raises ProtocolError where it is anything but a small Hello."""
        length, self.message_id, remaining = frames.read_header(await self.connection.read_exactly(frames.HEADER.size))
        if remaining or length > MAX_HELLO_BYTES:
            raise ProtocolError(f"the first message is a Hello of at most {MAX_HELLO_BYTES} bytes", what="hello")
        hello = decode_hello(await self.connection.read_exactly(length))
        self._greeted = True
        return hello

    async def next_message(self) -> tuple[int, bytes | Dropped, Reservation]:
        """Read the next whole message, no faster than the client's max_requests_per_s: its id, body and memory.

        Raises ProtocolError for frames that break the rules, AccessDenied once the client's token is no longer good.
        """
        while True:
            await self._take_turns()
            asked_s = time.monotonic()
            header = await self.connection.read_exactly(frames.HEADER.size)
            self._heard_s, self._inside_frame = time.monotonic(), True
            if self._heard_s - asked_s > _WAITED_S:
                self._turn_s = self._heard_s
            length, self.message_id, remaining = frames.read_header(header)
            self.check_still_in()
            payload = await self.connection.read_exactly(length)
            self._heard_s, self._inside_frame = time.monotonic(), False
            if not remaining and (delay_s := self.quota.delay_s(self._heard_s)):
                await asyncio.sleep(delay_s)
            body = self._assembler.feed(self.message_id, payload, remaining, self._heard_s)
            if body is not None:
                kept_bytes = 0 if isinstance(body, Dropped) else len(body)
                return self.message_id, body, Reservation(self.quota, kept_bytes)

    async def _take_turns(self) -> None:
        """Let other streams go on: reading what has arrived already never waits."""
        if time.monotonic() - self._turn_s > TURN_S:
            await asyncio.sleep(0)
            self._turn_s = time.monotonic()

    def start_request(self, message_id: int) -> None:
        """Count one more request in flight. Raises ServerBusy; ProtocolError where another one has its id."""
        if message_id in self.tasks:
            text = f"a second request with the id {message_id} before the first one was answered"
            raise ProtocolError(text, what="message")
        self.quota.start_request()

    def track(self, message_id: int, task: asyncio.Task[None], room: Reservation) -> None:
        """Count a request as in flight, and its memory as `room`, until `task`, which answers it, is done."""
        self.tasks[message_id] = task

        def finish(task: asyncio.Task[None]) -> None:
            del self.tasks[message_id]
            self.quota.finish_request()
            room.release()
            if not task.cancelled() and (error := task.exception()) is not None:
                # The client would wait for an answer that never comes.
                logger.error("a bug while serving a request; its stream is closed", exc_info=error)
                self.connection.close()

        task.add_done_callback(finish)

    async def reply(self, message_id: int, parts: Sequence[Part]) -> None:
        """Write an encoded reply. It has to be read within max_request_s. Raises ConnectionLost."""
        self._leaving[message_id] = time.monotonic()
        try:
            await self.write_parts(message_id, parts)
        finally:
            del self._leaving[message_id]

    async def refuse(self, error: PetalsTuneError) -> None:
        """Tell the client why its stream ends."""
        if isinstance(error, AccessDenied) and error.reason == "list":  # no fault of the client, who may go elsewhere
            error = ServerError("this server lets nobody in: it cannot read its list of revoked names")
        with suppress(ConnectionLost):
            await self.write(self.message_id, Refusal.of(error))

    def expel_former_member(self, now_s: float) -> None:
        """End the stream, `EXPELLED_S` from now at the latest, where the client's token is no longer good."""
        try:
            self.check_still_in()
        except AccessDenied as error:
            if self._expelled_s is None:
                logger.info("stream of client %s closed: %s", self.client, error)
                self._expelled_s = now_s
                self._keep(asyncio.create_task(self.refuse(error))).add_done_callback(lambda _: self.close_connection())

    def end(self) -> None:
        """Close the stream, cancel its requests and drop what has come of others."""
        for task in self.tasks.values():
            task.cancel()
        self._assembler.clear()
        self.close_connection()
        # What was written and never read would stay in memory, with the socket.
        asyncio.get_running_loop().call_later(FLUSH_S, self.connection.abort)

    def is_stuck(self, now_s: float) -> bool:
        """Whether a Hello, a message, the reading of a reply or the end of the stream is overdue."""
        if self._expelled_s is not None and now_s - self._expelled_s > EXPELLED_S:
            return True
        if not self._greeted:
            return now_s - self._heard_s > GREETING_S
        if self.blocked_since_s is not None and now_s - self.blocked_since_s > STALL_S:
            return True
        if (self._inside_frame or len(self._assembler) > 0) and now_s - self._heard_s > STALL_S:
            return True
        if self._assembler.slowest(now_s, after_s=STALL_S) < LEAST_BYTES_PER_S:
            return True
        waits_s = max(self._assembler.oldest_s(now_s), now_s - min(self._leaving.values(), default=now_s))
        return waits_s > self.quota.limits.max_request_s

    def idle_s(self, now_s: float) -> float:
        """Seconds since the last frame; 0 while a message or a request is in flight."""
        return 0.0 if self.tasks or self._inside_frame or len(self._assembler) else now_s - self._heard_s


class OpenStreams:
    """All open streams of a server; those that are stuck, and those of former members, are closed."""

    def __init__(self, admission: Admission, each_second: Callable[[float], None]):
        """`each_second` is called with the time each second while streams are open, and once when all have ended."""
        self._admission, self._each_second = admission, each_second
        self._open: set[ClientStream] = set()
        self._watching: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, connection: Connection) -> ClientStream:
        """Admit a new stream, closing the one that is idle longest where there are too many. Raises ServerBusy."""
        if self._admission.is_full:
            self._close_idle(time.monotonic())
        stream = ClientStream(connection, self._admission.open_stream(connection.peer))
        self._open.add(stream)
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())
        return stream

    def leave(self, stream: ClientStream) -> None:
        """End a stream. Idempotent."""
        if stream in self._open:
            self._open.remove(stream)
            stream.end()
            self._admission.close_stream(stream.client)

    @property
    def connections(self) -> list[Connection]:
        return [stream.connection for stream in self._open]

    def _close_idle(self, now_s: float) -> None:
        longest = max(self._open, key=lambda stream: stream.idle_s(now_s))
        if longest.idle_s(now_s) > IDLE_S:
            self.leave(longest)

    async def _watch(self) -> None:
        was_open = True
        while was_open:
            await asyncio.sleep(_WATCH_S)
            now_s, was_open = time.monotonic(), len(self._open) > 0
            self._each_second(now_s)
            for stream in self._open:
                stream.expel_former_member(now_s)
            for stream in [stream for stream in self._open if stream.is_stuck(now_s)]:
                logger.info("stream of client %s closed: it made no progress", stream.client)
                stream.connection.abort()
