"""One open stream per server with many requests on it, matched by id."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Sequence

from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError

from petals_tune.errors import (
    AccessDenied,
    PetalsTuneError,
    ProtocolError,
    ServerError,
    ServerTimeout,
    ServerUnreachable,
    UntrustedServer,
)
from petals_tune.net.hivemind_p2p import dialled
from petals_tune.net.members import Members
from petals_tune.net.stats import SwarmStats
from petals_tune.net.writer import MessageWriter
from petals_tune.wire import frames
from petals_tune.wire.codec import decode
from petals_tune.wire.frames import BROKEN
from petals_tune.wire.messages import PROTOCOL, Hello, Message, Ping, Refusal, Welcome
from petals_tune.wire.span import BlockSpan

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
SILENCE_S = 6.0  # a server whose event loop says nothing for so long is stopped or gone
MAX_MESSAGE_BYTES = 2**31


class ServerStream:
    """A stream to one server. Every pending request fails at once when the stream ends or falls silent."""

    def __init__(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stats: SwarmStats):
        self.peer = peer
        self.adapters: dict[tuple[str, BlockSpan], asyncio.Task[None]] = {}  # uploads on this stream, by version
        self._reader, self._writer, self._stats = reader, MessageWriter(writer), stats
        self._ids = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Message]] = {}
        self._heard_s = time.monotonic()
        self._failure: ServerError | None = None
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._watch())]
        self.welcome: Welcome
        self.round_trip_s: float  # of the greeting
        self._window: asyncio.Semaphore

    @classmethod
    async def open(
        cls,
        p2p: P2P,
        peer: str,
        addresses: Sequence[str],
        model: str | None,
        *,
        members: Members | None = None,
        timeout_s: float,
        stats: SwarmStats,
    ) -> ServerStream:
        """Connect and exchange greetings: the server shall hold `model` and, where we are `members`, be one too.

        Raises ServerUnreachable, ServerTimeout, UntrustedServer, or what the server refuses.
        """
        try:
            peer_id, places = PeerID.from_base58(peer), [dialled(address) for address in addresses]
        except ValueError as error:  # it may announce whatever it wants
            raise ServerUnreachable(f"server {peer} announces an address that is none: {error}") from None
        try:
            async with asyncio.timeout(timeout_s):
                await p2p._client.connect(peer_id, places)
                _, reader, writer = await p2p.call_binary_stream_handler(peer_id, PROTOCOL)
        except TimeoutError:
            raise ServerTimeout(f"server {peer} did not open a stream within {timeout_s:g} s") from None
        except (P2PDaemonError, *BROKEN) as error:
            raise ServerUnreachable(f"server {peer} cannot be reached: {error}") from None
        stream = cls(peer, reader, writer, stats)
        stream._window = asyncio.Semaphore(1)
        try:
            hello = Hello(model=model, token=None if members is None else members.own_token())
            asked_s = time.monotonic()
            welcome = await stream.call(hello, timeout_s=timeout_s)
            stream.round_trip_s = time.monotonic() - asked_s
            if not isinstance(welcome, Welcome):
                raise ServerError(f"server {peer} answered Hello with {type(welcome).__name__}")
            if members is not None:
                _check_host(members, welcome.token, peer)
        except PetalsTuneError:
            await stream.close()
            raise
        stream.welcome = welcome
        stream._window = asyncio.Semaphore(welcome.max_in_flight)
        return stream

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
        self._heard_s = max(self._heard_s, asked_s - SILENCE_S / 2)  # nobody spoke while nobody asked
        try:
            async with asyncio.timeout(timeout_s):
                await self._send(message_id, request)
                answer = await reply
        except TimeoutError:
            raise ServerTimeout(f"server {self.peer} did not answer within {timeout_s:g} s") from None
        finally:
            self._pending.pop(message_id, None)
            if reply.done() and not reply.cancelled():
                reply.exception()  # where sending failed first, nobody awaits it, and asyncio would complain
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
            sent_bytes = await self._writer.send(message_id, message)
        except BROKEN as error:
            self._fail(ServerUnreachable(f"the stream to server {self.peer} broke: {error!r}"))
        else:
            self._stats.sent_bytes += sent_bytes
        if self._failure is not None:
            raise self._failure

    async def _read(self) -> None:
        assembler = frames.Assembler(max_message_bytes=MAX_MESSAGE_BYTES, max_open_bytes=2 * MAX_MESSAGE_BYTES)
        try:
            while True:
                header = await self._reader.readexactly(frames.HEADER.size)
                length, message_id, remaining = frames.read_header(header)
                payload = await self._reader.readexactly(length)
                self._heard_s = time.monotonic()
                self._stats.received_bytes += len(header) + length
                body = assembler.feed(message_id, payload, remaining)
                assert not isinstance(body, frames.Dropped)  # all is admitted here
                pending = self._pending.get(message_id)
                if body is not None and pending is not None and not pending.done():
                    pending.set_result(decode(body))
        except ProtocolError as error:
            self._fail(ServerUnreachable(f"server {self.peer} breaks the protocol: {error}"))
        except BROKEN as error:
            self._fail(ServerUnreachable(f"server {self.peer} closed the stream: {error!r}"))

    async def _watch(self) -> None:
        """Notice a server that is stopped or unplugged: the event loop of a living one answers while it computes."""
        while self._failure is None:
            await asyncio.sleep(HEARTBEAT_S)
            silence_s = time.monotonic() - self._heard_s
            if not self._pending:
                continue
            if silence_s > SILENCE_S:
                self._fail(ServerUnreachable(f"server {self.peer} fell silent for {silence_s:.0f} s"))
            elif silence_s > HEARTBEAT_S:
                await self.notify(Ping())

    def _fail(self, error: ServerError) -> None:
        if self._failure is None:
            self._failure = error
            for pending in self._pending.values():
                if not pending.done():
                    pending.set_exception(error)
            self._writer.close()

    async def close(self) -> None:
        """End the stream; pending requests fail."""
        self._fail(ServerUnreachable(f"the stream to server {self.peer} was closed"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _check_host(members: Members, token: bytes | None, peer: str) -> None:
    """Raises UntrustedServer for a server of our private swarm that has no token for hosting in it."""
    try:
        members.admit(token, peer, hosts=True)
    except AccessDenied as error:
        raise UntrustedServer(f"server {peer} is not one of this private swarm: {error}") from None
