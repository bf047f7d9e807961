"""Whether others can dial this peer: those who are in the swarm already try, with a connection of its own.

A call back on the connection that the newcomer opened, as the DHT makes it, proves nothing: that one passes any
firewall.
Source: libp2p specs, AutoNAT v1, whose rule against abuse holds here too: only the IP address from which the question
came is dialled.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from itertools import compress
from typing import Annotated

import msgspec

from petals_tune.errors import AccessDenied, ConnectionLost, ProtocolError, ServerBusy
from petals_tune.net.address_policy import AddressPolicy
from petals_tune.net.hivemind_p2p import host_of, part_of, peer_of
from petals_tune.net.members import Members
from petals_tune.net.question import read_message, write_message
from petals_tune.net.transport import Connection, StreamConnection, Transport
from petals_tune.wire.tokens import TokenBytes

logger = logging.getLogger(__name__)

PROTOCOL = "/petals_tune/dial_back/1"
DIAL_S = 3.0
ANSWER_S = 2 * DIAL_S  # for a whole question and answer
AT_ONCE = 8  # questions that are answered at the same time
_GREETING = b"\x13/multistream/1.0.0\n"  # the first bytes that a libp2p peer sends on a TCP connection

Address = Annotated[str, msgspec.Meta(max_length=256)]
Addresses = Annotated[tuple[Address, ...], msgspec.Meta(max_length=16)]


class Question(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Can you dial me at one of these?"""

    addresses: Addresses
    token: TokenBytes | None = None  # of a member of a private swarm


class Answer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Addresses that were dialled, and those of them at which a libp2p peer answered."""

    dialled: Addresses
    reached: Addresses


class DialBack:
    """Answers the questions of others. In a private swarm, those of its `members`."""

    def __init__(self, members: Members | None, policy: AddressPolicy):
        self._members, self._policy = members, policy
        self._under_way = 0

    async def serve(self, connection: Connection) -> None:
        """Read one question, answer it, and close."""
        self._under_way += 1
        try:
            async with asyncio.timeout(ANSWER_S):
                if self._under_way > AT_ONCE:
                    raise ServerBusy(f"more than {AT_ONCE} peers ask to be dialled")
                question = await read_message(connection, Question)
                if self._members is not None:
                    self._members.admit(question.token, connection.peer)
                allowed, _ = self._policy.dialled(connection.peer, question.addresses)
                await write_message(connection, await dial_all(allowed, host=host_of(connection.remote_address)))
        except (AccessDenied, ConnectionLost, ProtocolError, ServerBusy, TimeoutError) as error:
            logger.info("peer %s asked to be dialled: %s", connection.peer, str(error) or "it was too slow")
        finally:
            self._under_way -= 1
            connection.close()


async def is_dialable(
    transport: Transport,
    peers: Sequence[str],
    addresses: Sequence[str],
    members: Members | None,
    *,
    given: bool = False,
) -> bool | None:
    """Whether one of `peers` (multiaddresses) reaches this one at one of `addresses`; None where none of them knows.

    Addresses that somebody has `given` may be of a router whose other side `peers` do not see: then they dial nothing.
    """
    question = Question(addresses=tuple(addresses), token=None if members is None else members.own_token())
    asked = await asyncio.gather(*(_ask(transport, peer, question) for peer in peers))
    answers = [answer for answer in asked if answer is not None]
    if any(answer.reached for answer in answers):
        return True
    if not answers or (given and not any(answer.dialled for answer in answers)):
        logger.warning("no peer of the swarm can say whether others can dial this one")
        return None
    return False


async def _ask(transport: Transport, address: str, question: Question) -> Answer | None:
    try:
        async with asyncio.timeout(ANSWER_S):
            connection = await transport.dial(peer_of(address), [address], PROTOCOL)
            try:
                await write_message(connection, question)
                return await read_message(connection, Answer)
            finally:
                connection.close()
    except (ConnectionLost, ProtocolError, TimeoutError) as error:
        logger.info("peer %s does not say whether it can dial this one: %s", address, error)
        return None


async def dial_all(addresses: Sequence[str], *, host: str | None) -> Answer:
    """Dial those of `addresses` that are of `host`."""
    dialled = tuple(address for address in addresses if host is not None and host_of(address) == host)
    reached = await asyncio.gather(*(_is_libp2p(address) for address in dialled))
    return Answer(dialled=dialled, reached=tuple(compress(dialled, reached)))


async def _is_libp2p(address: str) -> bool:
    """Whether a libp2p peer listens there, by TCP."""
    try:
        async with asyncio.timeout(DIAL_S):
            streams = await asyncio.open_connection(host_of(address), part_of(address, "tcp"))
            connection = StreamConnection(address, *streams)
            try:
                return await connection.read_exactly(len(_GREETING)) == _GREETING
            finally:
                connection.close()
    except (ConnectionLost, OSError):  # a time-out is one
        return False
