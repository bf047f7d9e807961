"""The client's end of a connection to a server, with many requests at a time."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from petals_tune.errors import (
    AccessDenied,
    BadReply,
    ConnectionLost,
    PetalsTuneError,
    ProtocolError,
    ServerError,
    ServerTimeout,
    ServerUnreachable,
    UntrustedServer,
)
from petals_tune.net.members import Members
from petals_tune.net.own_lag import awake_s, patience
from petals_tune.net.stats import SwarmStats
from petals_tune.net.transport import Connection, Transport
from petals_tune.net.writer import MessageWriter
from petals_tune.wire import frames
from petals_tune.wire.codec import decode
from petals_tune.wire.messages import (
    Hello,
    Message,
    Ping,
    Refusal,
    Welcome,
    freeing,
)
from petals_tune.wire.records import PROTOCOL
from petals_tune.wire.span import BlockSpan
from petals_tune.wire.tokens import Token

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
SILENCE_S = 6.0  # a server whose event loop sends nothing for so long is stopped or gone
ENOUGH_PINGS = 3  # that it has to leave unanswered meanwhile
MAX_MESSAGE_BYTES = 2**33  # that we send in one message, whatever the server would take
MAX_IN_FLIGHT = 64  # requests, whatever the server would take: each is kept, encoded, until it was sent
SMALL_REPLY_BYTES = 2**16  # enough for every reply without tensors
MAX_GIVEN_UP = 64  # requests without a waiter whose replies are still read, since they may name what the server keeps
MAX_UNASKED = 32  # messages under ids of which none was asked, until the server is left
CHECK_S = 1.0  # between two checks whether the server is still a member of a private swarm
TOKENS_S = 30.0  # between two exchanges of tokens on an open stream of a private swarm
HELLO_S = 10.0  # for the answer to ours
OVERHEAD_BYTES = 2**16  # of a message beside its tensors


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A reply that is due."""

    reply: asyncio.Future[Message]
    most_bytes: int


@dataclass(frozen=True, kw_only=True)
class Upload:
    """An adapter on its way to the server. Requests that name it may follow once it was written."""

    done: asyncio.Task[Message]
    written: asyncio.Event

    async def wait_until_written(self) -> None:
        """Raises what the upload raised, where it failed before that."""
        waiting = asyncio.ensure_future(self.written.wait())
        try:
            await asyncio.wait({waiting, self.done}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if not self.written.is_set():
            await asyncio.shield(self.done)

    @property
    def failed(self) -> bool:
        return self.done.done() and (self.done.cancelled() or self.done.exception() is not None)


class ServerStream(MessageWriter):
    """The client's end of a connection to one server; replies are matched with their requests by id.

    Every pending request fails at once when the connection ends, the server falls silent, or is no member any more.
    Memory is taken for replies that were asked for, as large as they can be; all else is read and dropped. Time for
    which this process stood still is not counted against the server.
    """

    def __init__(self, connection: Connection, stats: SwarmStats):
        super().__init__(connection, clock=awake_s)
        self.peer = connection.peer
        self.adapters: dict[tuple[str, BlockSpan], Upload] = {}  # uploads on this stream, by version
        self.welcome: Welcome
        self.round_trip_s: float  # of the greeting
        self._stats = stats
        self._window = asyncio.Semaphore(1)  # requests in flight
        self._ids = itertools.count(1)
        self._pending: dict[int, Expected] = {}
        self._given_up: dict[int, int] = {}  # most bytes of replies that nobody waits for, by id, oldest first
        # Which sizes are allowed, `_admit` says.
        self._assembler = frames.Assembler(max_message_bytes=2**63, max_open_bytes=2**63, admit=self._admit)
        self._arriving = 0  # id of the frame that is read
        self._unasked = 0  # messages beyond those that were asked for
        self._heard_s = awake_s()
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

        Raises ServerError: ServerUnreachable, ServerTimeout, UntrustedServer, Refused. AccessDenied where our own token
        has expired.
        """
        try:
            async with patience(timeout_s):
                connection = await transport.dial(peer, addresses, PROTOCOL)
        except TimeoutError:
            raise ServerTimeout(f"server {peer} did not open a stream within {timeout_s:g} s", peer=peer) from None
        except ConnectionLost as error:
            raise ServerUnreachable(f"server {peer} cannot be reached: {error}", peer=peer) from None
        stats = stats or SwarmStats()
        stats.streams += 1
        stats.direct_streams += connection.direct
        stream = cls(connection, stats)
        try:
            await stream._greet(model, members, timeout_s)
        except BaseException:
            await stream.close()
            raise
        return stream

    async def _greet(self, model: str | None, members: Members | None, timeout_s: float) -> None:
        asked_s = awake_s()
        token = None if members is None else members.own_token()
        self.welcome = await self._say_hello(Hello(model=model, token=token), timeout_s)
        self.round_trip_s = awake_s() - asked_s
        if members is not None and token is not None:
            host = _check_host(members, self.welcome.token, self.peer)
            self._tasks.append(asyncio.create_task(self._watch_tokens(model, members, token, host)))
        self._window = asyncio.Semaphore(min(self.welcome.max_in_flight, MAX_IN_FLIGHT))

    async def _say_hello(self, hello: Hello, timeout_s: float) -> Welcome:
        welcome = await self._call(hello, timeout_s, SMALL_REPLY_BYTES)
        if not isinstance(welcome, Welcome):
            raise BadReply(f"server {self.peer} answered Hello with {type(welcome).__name__}", peer=self.peer)
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
        return max(min(self.welcome.max_message_bytes, MAX_MESSAGE_BYTES) - OVERHEAD_BYTES, 0)

    @property
    def alive(self) -> bool:
        return self._failure is None

    async def call(
        self,
        request: Message,
        *,
        timeout_s: float | None,
        most_bytes: int = SMALL_REPLY_BYTES,
        written: asyncio.Event | None = None,
    ) -> Message:
        """Send `request` and wait for its reply, which has `most_bytes`, for `timeout_s` at most.

        `written` is set once all of the request was written: what is sent after that is read after it.

        Raises ServerError; what the server refuses is a `Refused` or another class of it.
        """
        async with self._window:
            return await self._call(request, timeout_s, most_bytes, written)

    async def _call(
        self, request: Message, timeout_s: float | None, most_bytes: int, written: asyncio.Event | None = None
    ) -> Message:
        if self._failure is not None:
            raise self._failure
        message_id = next(self._ids)
        reply: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._pending[message_id] = Expected(reply=reply, most_bytes=most_bytes)
        asked_s = awake_s()
        self._heard_s = max(self._heard_s, asked_s - SILENCE_S / 2)  # an idle server owes no sign of life
        try:
            async with patience(timeout_s):
                await self._send(message_id, request)
                if written is not None:
                    written.set()
                answer = await reply
        except TimeoutError:
            raise ServerTimeout(f"server {self.peer} did not answer within {timeout_s:g} s", peer=self.peer) from None
        except asyncio.CancelledError:
            if reply.done() and not reply.cancelled() and reply.exception() is None:
                self._give_back(reply.result())  # it came in the very moment in which nobody waited for it any more
            raise
        finally:
            self._pending.pop(message_id, None)
            if reply.done() and not reply.cancelled():
                reply.exception()  # where sending failed first, nobody awaits it, and asyncio would complain
            else:
                self._give_up(message_id, most_bytes)
        if not isinstance(request, Ping):
            self._stats.answered(self.peer, awake_s() - asked_s)
        if isinstance(answer, Refusal):
            raise answer.to_error(self.peer)
        return answer

    def _give_up(self, message_id: int, most_bytes: int) -> None:
        """Wait for a reply no more. It is read all the same when it comes, unless there are many of them."""
        self._given_up[message_id] = most_bytes
        if len(self._given_up) > MAX_GIVEN_UP:
            del self._given_up[next(iter(self._given_up))]
            self._unasked -= 1  # it may still come

    async def send(self, message: Message) -> None:
        """Send a `message` that is not answered. Raises ServerError."""
        if self._failure is not None:
            raise self._failure
        self._unasked -= 1  # a server may answer it: to a Ping with a Pong, to a Delivery that it has no room
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
            self._stats.direct_bytes += sent_bytes * self.connection.direct
        if self._failure is not None:
            raise self._failure

    async def _read(self) -> None:
        try:
            while True:
                header = await self.connection.read_exactly(frames.HEADER.size)
                length, self._arriving, remaining = frames.read_header(header)
                payload = await self.connection.read_exactly(length)
                self._heard_s, self._unanswered_pings = awake_s(), 0
                self._stats.received_bytes += len(header) + length
                self._stats.direct_bytes += (len(header) + length) * self.connection.direct
                body = self._assembler.feed(self._arriving, payload, remaining)
                if body is not None and not isinstance(body, frames.Dropped):
                    self._take(self._arriving, decode(body))
                del payload, body  # while the next frame is awaited, which may be long
        except ProtocolError as error:
            self._lost(f"server {self.peer} breaks the protocol: {error}")
        except ConnectionLost as error:
            self._lost(f"server {self.peer} closed the stream: {error}")

    def _admit(self, total: int) -> bool:
        """Whether to keep a message of `total` bytes whose first frame came: only a reply that is due, and fits.

        Raises ProtocolError where the server sends what was not asked for, again and again.
        """
        expected = self._pending.get(self._arriving)
        if expected is not None and not expected.reply.done():
            if total <= expected.most_bytes:
                return True
            text = f"server {self.peer} answers with {total} bytes, where at most {expected.most_bytes} could be due"
            expected.reply.set_exception(BadReply(text, peer=self.peer))
        elif total <= self._given_up.get(self._arriving, -1):
            return True
        else:
            self._unasked += 1
            if self._unasked > MAX_UNASKED:
                raise ProtocolError(f"{self._unasked} messages that nobody asked for", what="message")
        return False

    def _take(self, message_id: int, reply: Message) -> None:
        """Pass on a reply, or give back what it says that the server keeps, where nobody waits for it any more."""
        expected = self._pending.get(message_id)
        self._given_up.pop(message_id, None)
        if expected is not None and not expected.reply.done():
            expected.reply.set_result(reply)
        else:
            self._give_back(reply)

    def _give_back(self, reply: Message) -> None:
        """Free what the server keeps for a reply that nobody wants."""
        if (giving_back := freeing(reply)) is not None:
            self._keep(asyncio.create_task(self.notify(giving_back)))

    async def _watch(self) -> None:
        """Notice a server that is stopped or unplugged: the event loop of a living one answers while it computes."""
        while self._failure is None:
            await asyncio.sleep(HEARTBEAT_S)
            now_s = awake_s()
            silence_s = now_s - self._heard_s
            if not self._pending or silence_s <= HEARTBEAT_S:
                continue
            blocked = self.blocked_since_s is not None  # it takes nothing, not even a Ping
            if self.blocked_since_s is not None:
                silence_s = min(silence_s, now_s - self.blocked_since_s)
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
                if not pending.reply.done():
                    pending.reply.set_exception(self._failure)
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
