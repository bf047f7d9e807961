"""Messages on a connection: the writer of both sides, and the client's end, with many requests at a time."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Sequence
from typing import Any, TypeVar

from petals_tune.errors import (
    AccessDenied,
    ConnectionLost,
    PetalsTuneError,
    ProtocolError,
    ServerError,
    ServerTimeout,
    ServerUnreachable,
    UntrustedServer,
)
from petals_tune.net.members import Members
from petals_tune.net.stats import SwarmStats
from petals_tune.net.transport import Connection, Transport
from petals_tune.wire import frames
from petals_tune.wire.codec import INLINE_BYTES, Part, decode, encode
from petals_tune.wire.messages import (
    ChainedReply,
    CloseSession,
    Forwarded,
    Hello,
    Message,
    Ping,
    Refusal,
    Release,
    SessionOpened,
    Welcome,
    tensors_of,
)
from petals_tune.wire.records import PROTOCOL
from petals_tune.wire.span import BlockSpan
from petals_tune.wire.tensors import encoded_bytes
from petals_tune.wire.tokens import Token

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
SILENCE_S = 6.0  # a server whose event loop sends nothing for so long is stopped or gone
ENOUGH_PINGS = 3  # that it has to leave unanswered meanwhile
MAX_MESSAGE_BYTES = 2**31
CHECK_S = 1.0  # between two checks whether the server is still a member of a private swarm
TOKENS_S = 30.0  # between two exchanges of tokens on an open stream of a private swarm
HELLO_S = 10.0  # for the answer to ours
OVERHEAD_BYTES = 2**16  # of a message beside its tensors

T = TypeVar("T")


class MessageWriter:
    """Writes messages frame by frame: they alternate on the connection, and a slow reader stops their writers."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self._lock = asyncio.Lock()
        self._running: set[asyncio.Task[Any]] = set()  # asyncio keeps no strong reference to a task
        self.blocked_since_s: float | None = None  # time.monotonic() since when the reader takes nothing

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
        return await asyncio.shield(self._keep(asyncio.create_task(self._write(message_id, parts))))

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
                self.blocked_since_s = time.monotonic()
                try:
                    await self.connection.write(header, payload)
                finally:
                    self.blocked_since_s = None
            sent += len(header) + len(payload)
        return sent


class ServerStream(MessageWriter):
    """The client's end of a connection to one server; replies are matched with their requests by id.

    Every pending request fails at once when the connection ends, the server falls silent, or is no member any more.
    """

    def __init__(self, connection: Connection, stats: SwarmStats):
        super().__init__(connection)
        self.peer = connection.peer
        self.adapters: dict[tuple[str, BlockSpan], asyncio.Task[Message]] = {}  # uploads on this stream, by version
        self.welcome: Welcome
        self.round_trip_s: float  # of the greeting
        self._stats = stats
        self._window = asyncio.Semaphore(1)  # requests in flight
        self._ids = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Message]] = {}
        self._heard_s = time.monotonic()
        self._unanswered_pings = 0
        self._failure: ServerError | None = None
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._watch())]

    @classmethod
    async def open(
        cls,
        transport: Transport,
        peer: str,
        addresses: Sequence[str],
        *,
        model: str | None,
        members: Members | None = None,
        timeout_s: float,
        stats: SwarmStats | None = None,
    ) -> ServerStream:
        """Dial server `peer` and greet it: it has to serve `model` (None: any) and, with `members`, be one of them.

        Raises ServerUnreachable, ServerTimeout, UntrustedServer, or what the server refuses.
        """
        try:
            async with asyncio.timeout(timeout_s):
                connection = await transport.dial(peer, addresses, PROTOCOL)
        except TimeoutError:
            raise ServerTimeout(f"server {peer} did not open a stream within {timeout_s:g} s", peer=peer) from None
        except ConnectionLost as error:
            raise ServerUnreachable(f"server {peer} cannot be reached: {error}", peer=peer) from None
        stream = cls(connection, stats or SwarmStats())
        try:
            await stream._greet(model, members, timeout_s)
        except BaseException:
            await stream.close()
            raise
        return stream

    async def _greet(self, model: str | None, members: Members | None, timeout_s: float) -> None:
        asked_s = time.monotonic()
        token = None if members is None else members.own_token()
        self.welcome = await self._say_hello(Hello(model=model, token=token), timeout_s)
        self.round_trip_s = time.monotonic() - asked_s
        if members is not None and token is not None:
            host = _check_host(members, self.welcome.token, self.peer)
            self._tasks.append(asyncio.create_task(self._watch_tokens(model, members, token, host)))
        self._window = asyncio.Semaphore(self.welcome.max_in_flight)

    async def _say_hello(self, hello: Hello, timeout_s: float) -> Welcome:
        welcome = await self._call(hello, timeout_s)
        if not isinstance(welcome, Welcome):
            raise ServerError(f"server {self.peer} answered Hello with {type(welcome).__name__}", peer=self.peer)
        return welcome

    async def _watch_tokens(self, model: str | None, members: Members, shown: bytes, host: Token) -> None:
        """End the stream once the server's token, `host`, has expired or its name is revoked.

        Tokens may be renewed while the stream is open: both sides show theirs again every `TOKENS_S`, and at once where
        ours, `shown`, was replaced.
        """
        exchanged_s = time.monotonic()
        while self._failure is None:
            await asyncio.sleep(CHECK_S)
            try:
                own = members.own_token()
                if own != shown or time.monotonic() - exchanged_s >= TOKENS_S:
                    shown, exchanged_s = own, time.monotonic()
                    welcome = await self._say_hello(Hello(model=model, token=own), HELLO_S)
                    host = _check_host(members, welcome.token, self.peer)
            except UntrustedServer as error:
                self._fail(error)
            except PetalsTuneError as error:  # ours has expired, and the server ends the stream; or it did not answer
                logger.debug("no tokens exchanged with server %s: %s", self.peer, error)
            try:
                members.check_still_in(host)
            except AccessDenied as error:
                self._fail(_untrusted(self.peer, error))

    @property
    def max_tensor_bytes(self) -> int:
        """Bytes of tensors that the server takes in one message."""
        return self.welcome.max_message_bytes - OVERHEAD_BYTES

    @property
    def alive(self) -> bool:
        return self._failure is None

    async def call(self, request: Message, *, timeout_s: float | None) -> Message:
        """Send `request` and wait for its reply, `timeout_s` at most.

        Raises ServerError, or what the server's refusal stands for.
        """
        async with self._window:
            return await self._call(request, timeout_s)

    async def _call(self, request: Message, timeout_s: float | None) -> Message:
        if self._failure is not None:
            raise self._failure
        message_id = next(self._ids)
        reply: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._pending[message_id] = reply
        asked_s = time.monotonic()
        self._heard_s = max(self._heard_s, asked_s - SILENCE_S / 2)  # an idle server owes no sign of life
        try:
            async with asyncio.timeout(timeout_s):
                await self._send(message_id, request)
                answer = await reply
        except TimeoutError:
            raise ServerTimeout(f"server {self.peer} did not answer within {timeout_s:g} s", peer=self.peer) from None
        finally:
            self._pending.pop(message_id, None)
            if reply.done() and not reply.cancelled():
                reply.exception()  # where sending failed first, nobody awaits it, and asyncio would complain
        if not isinstance(request, Ping):
            self._stats.answered(self.peer, time.monotonic() - asked_s)
        if isinstance(answer, Refusal):
            raise answer.to_error(self.peer)
        return answer

    async def send(self, message: Message) -> None:
        """Send a `message` that is not answered. Raises ServerError."""
        if self._failure is not None:
            raise self._failure
        await self._send(next(self._ids), message)

    async def notify(self, message: Message) -> None:
        """As `send`; a broken stream is no error here."""
        try:
            await self.send(message)
        except ServerError as error:
            logger.debug("not delivered to %s: %s", self.peer, error)

    async def _send(self, message_id: int, message: Message) -> None:
        try:
            sent_bytes = await self.write(message_id, message)
        except ConnectionLost as error:
            self._lost(f"the stream to server {self.peer} broke: {error}")
        else:
            self._stats.sent_bytes += sent_bytes
        if self._failure is not None:
            raise self._failure

    async def _read(self) -> None:
        assembler = frames.Assembler(max_message_bytes=MAX_MESSAGE_BYTES, max_open_bytes=2 * MAX_MESSAGE_BYTES)
        try:
            while True:
                header = await self.connection.read_exactly(frames.HEADER.size)
                length, message_id, remaining = frames.read_header(header)
                payload = await self.connection.read_exactly(length)
                self._heard_s, self._unanswered_pings = time.monotonic(), 0
                self._stats.received_bytes += len(header) + length
                body = assembler.feed(message_id, payload, remaining)
                assert not isinstance(body, frames.Dropped)  # all is admitted here
                if body is None:
                    continue
                reply, pending = decode(body), self._pending.get(message_id)
                if pending is not None and not pending.done():
                    pending.set_result(reply)
                elif (giving_back := _give_back(reply)) is not None:
                    self._keep(asyncio.create_task(self.notify(giving_back)))
        except ProtocolError as error:
            self._lost(f"server {self.peer} breaks the protocol: {error}")
        except ConnectionLost as error:
            self._lost(f"server {self.peer} closed the stream: {error}")

    async def _watch(self) -> None:
        """Notice a server that is stopped or unplugged: the event loop of a living one answers while it computes."""
        while self._failure is None:
            await asyncio.sleep(HEARTBEAT_S)
            now_s = time.monotonic()
            silence_s = now_s - self._heard_s
            if not self._pending or silence_s <= HEARTBEAT_S:
                continue
            blocked = self.blocked_since_s is not None  # it takes nothing, not even a Ping
            if self.blocked_since_s is not None:
                silence_s = min(silence_s, now_s - self.blocked_since_s)
            # It may be this process that stood still: then what the server said is still to be read.
            if silence_s > SILENCE_S and (blocked or self._unanswered_pings >= ENOUGH_PINGS):
                self._lost(f"server {self.peer} fell silent for {silence_s:.0f} s")
            elif not blocked:
                self._unanswered_pings += 1
                await self.notify(Ping())

    def _lost(self, why: str) -> None:
        self._fail(ServerUnreachable(why, peer=self.peer))

    def _fail(self, error: ServerError, *, flush: bool = False) -> None:
        """Fail all requests with `error`; with `flush`, what was written before is still sent."""
        if self._failure is None:
            self._failure = error
            for pending in self._pending.values():
                if not pending.done():
                    pending.set_exception(self._failure)
            if flush:
                self.close_connection()
            else:
                self.connection.abort()

    async def close(self) -> None:
        """End the stream; pending requests fail."""
        self._fail(ServerUnreachable(f"the stream to server {self.peer} was closed", peer=self.peer), flush=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _give_back(reply: Message) -> Message | None:
    """The message that frees what a server keeps for a `reply` that comes too late; None where it keeps nothing."""
    if isinstance(reply, ChainedReply):
        reply = reply.reply
    if isinstance(reply, SessionOpened):
        return CloseSession(session=reply.session)
    return Release(leases=[reply.lease]) if isinstance(reply, Forwarded) and reply.lease is not None else None


def _check_host(members: Members, token: bytes | None, peer: str) -> Token:
    """The token of a server of our private swarm. Raises UntrustedServer where it is none for hosting in it."""
    try:
        return members.admit(token, peer, hosts=True)
    except AccessDenied as error:
        if error.reason == "list":  # of ours: no server is at fault
            raise
        raise _untrusted(peer, error) from None


def _untrusted(peer: str, error: AccessDenied) -> UntrustedServer:
    return UntrustedServer(f"server {peer} is not one of this private swarm: {error}", peer=peer)
