"""A transport that opens direct connections where it can, and streams of the p2p daemon where it cannot.

The daemons' stream between two peers is encrypted, and its ends have proved their identities. On one, the dialling peer
asks for a direct connection, and each end tells the other the key with which it will send. Then it connects to the port
that was answered, at the IP address at which the daemon is connected to that peer and at no other. So a direct
connection has the same two ends as the stream, and goes nowhere that the daemon has not been.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Protocol

import msgspec

from petals_tune.errors import AccessDenied, ConnectionLost, ProtocolError, ServerBusy
from petals_tune.net.address_policy import AddressPolicy
from petals_tune.net.direct.connection import DirectConnection
from petals_tune.net.direct.listener import TICKET_BYTES, Expected, Listener
from petals_tune.net.direct.records import KEY_BYTES, new_key
from petals_tune.net.members import Members
from petals_tune.net.own_lag import patience
from petals_tune.net.question import read_message, write_message
from petals_tune.net.transport import Connection, Serve, Transport
from petals_tune.wire.tokens import TokenBytes

logger = logging.getLogger(__name__)

PROTOCOL = "/petals_tune/direct/1"
DIAL_S = 2.0  # for a direct connection, from the question to the greeting; then the daemon's stream is opened
ANSWER_S = 5.0  # for a question and its answer
AT_ONCE = 64  # questions that are answered at the same time
AVOID_S = 120.0  # a peer with which there was no direct connection, or a broken one, is reached by the daemon so long
MAX_AVOIDED = 1024  # peers that are remembered for that

Key = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Ticket = Annotated[bytes, msgspec.Meta(min_length=TICKET_BYTES, max_length=TICKET_BYTES)]


class Question(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where can I open a direct connection for `protocol`? I will show `ticket`, and send with `key`.

    The ticket is drawn by the one who sends it, unencrypted, to the port in the answer: a peer that names the port of
    some other service does not choose a byte of what this one is sent.
    """

    protocol: Annotated[str, msgspec.Meta(max_length=64)]
    ticket: Ticket
    key: Key
    token: TokenBytes | None = None  # of a member of a private swarm


class Answer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """At `port` of the address where you see me. I will send with `key`."""

    port: Annotated[int, msgspec.Meta(ge=1, lt=2**16)]
    key: Key


class Daemon(Transport, Protocol):
    """What is needed of the transport whose streams direct connections are agreed on."""

    policy: AddressPolicy

    async def reach(self, peer: str, addresses: Sequence[str]) -> None:
        """Connect to `peer` at one of `addresses`, as the policy allows. Raises ConnectionLost."""

    async def host(self, peer: str) -> str | None:
        """The IP address at which `peer` is connected; None where it is not, or through a relay."""


@dataclass(frozen=True, kw_only=True)
class DirectOptions:
    """Where a peer accepts direct connections; one that does not listen opens them alone."""

    port: int = 0  # 0: any that is free
    announced_port: int | None = None  # that others dial, where a router forwards it to `port`


class DirectTransport:
    """Direct connections, and the daemon's streams behind the same methods."""

    def __init__(
        self,
        daemon: Daemon,
        members: Members | None = None,
        listener: Listener | None = None,
        *,
        announced_port: int | None = None,
    ):
        """In a private swarm, `members` alone are answered. Without a `listener`, connections are opened alone."""
        self.daemon = daemon
        self._members, self._listener, self._announced_port = members, listener, announced_port
        self._serves: dict[str, Serve] = {}  # by protocol
        self._under_way = 0
        self._avoided: dict[str, float] = {}  # peers, until time.monotonic()

    async def dial(self, peer: str, addresses: Sequence[str], protocol: str) -> Connection:
        """As `Transport.dial`: a direct connection where one can be opened."""
        if addresses:
            await self.daemon.reach(peer, addresses)
        if self._avoided.get(peer, 0.0) <= time.monotonic():
            try:
                async with patience(DIAL_S):
                    return await self._dial(peer, protocol)
            except (AccessDenied, ConnectionLost, ProtocolError, OSError) as error:  # a time-out is one
                logger.info("no direct connection to peer %s: %s", peer, str(error) or "it took too long")
                self._avoid(peer)
        return await self.daemon.dial(peer, (), protocol)

    async def accept(self, protocol: str, serve: Serve) -> None:
        """As `Transport.accept`, of both kinds of connection."""
        await self.daemon.accept(protocol, serve)
        if self._listener is not None:
            if not self._serves:
                await self.daemon.accept(PROTOCOL, self._answer)
            self._serves[protocol] = serve

    async def _dial(self, peer: str, protocol: str) -> DirectConnection:
        """Open a direct connection. Raises AccessDenied, ConnectionLost, ProtocolError, OSError."""
        if (host := await self.daemon.host(peer)) is None:
            raise ConnectionLost("it is reached through a relay", peer=peer)
        question = Question(
            protocol=protocol,
            ticket=secrets.token_bytes(TICKET_BYTES),
            key=new_key(),
            token=None if self._members is None else self._members.own_token(),
        )
        answer = await self._ask(peer, question)
        address = f"/ip{6 if ':' in host else 4}/{host}/tcp/{answer.port}"
        if (why := self.daemon.policy.refusal(address)) is not None:
            raise ConnectionLost(f"{address} is {why}", peer=peer)
        connection = DirectConnection(peer, sends=question.key, receives=answer.key, remote_address=address)
        transport, _ = await asyncio.get_running_loop().create_connection(lambda: connection, host, answer.port)
        try:
            transport.write(question.ticket)
            await connection.write(question.ticket)
            if await connection.read_exactly(TICKET_BYTES) != question.ticket:
                raise ProtocolError("a greeting that is none", what="hello")
        except BaseException:
            connection.abort()
            raise
        connection.on_cut = partial(self._avoid, peer)
        return connection

    async def _ask(self, peer: str, question: Question) -> Answer:
        stream = await self.daemon.dial(peer, (), PROTOCOL)
        try:
            await write_message(stream, question)
            return await read_message(stream, Answer)
        finally:
            stream.close()

    async def _answer(self, stream: Connection) -> None:
        """Read one question, answer it, and close."""
        assert self._listener is not None
        self._under_way += 1
        try:
            async with asyncio.timeout(ANSWER_S):
                if self._under_way > AT_ONCE:
                    raise ServerBusy(f"more than {AT_ONCE} peers ask for direct connections")
                question = await read_message(stream, Question)
                if self._members is not None:
                    self._members.admit(question.token, stream.peer)
                if (serve := self._serves.get(question.protocol)) is None:
                    raise ProtocolError(f"{question.protocol!r} is not accepted here", what="message")
                key = new_key()
                expected = Expected(
                    peer=stream.peer,
                    remote_address=stream.remote_address,
                    sends=key,
                    receives=question.key,
                    serve=serve,
                )
                self._listener.expect(question.ticket, expected)
                await write_message(stream, Answer(port=self._announced_port or self._listener.port, key=key))
        except (AccessDenied, ConnectionLost, ProtocolError, ServerBusy, TimeoutError) as error:
            logger.info("peer %s gets no direct connection: %s", stream.peer, str(error) or "it was too slow")
        finally:
            self._under_way -= 1
            stream.close()

    def _avoid(self, peer: str) -> None:
        now_s = time.monotonic()
        self._avoided = {each: until_s for each, until_s in self._avoided.items() if until_s > now_s}
        if len(self._avoided) < MAX_AVOIDED:
            self._avoided[peer] = now_s + AVOID_S
