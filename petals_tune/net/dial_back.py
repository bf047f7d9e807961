"""Whether others can dial this peer: those who are in the swarm already try, with a connection of its own.

To call back on the connection that the newcomer opened, as the DHT does, says nothing: that one passes any firewall.
Source: libp2p specs, AutoNAT v1, whose rule against abuse holds here too: only the IP address from which the question
came is dialled.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Sequence
from itertools import compress
from typing import Annotated, TypeVar

import msgspec
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError
from hivemind.utils.multiaddr import Multiaddr

from petals_tune.errors import AccessDenied, ProtocolError, ServerBusy
from petals_tune.net.members import Members
from petals_tune.wire.frames import BROKEN
from petals_tune.wire.tokens import TokenBytes

logger = logging.getLogger(__name__)

PROTOCOL = "/petals_tune/dial_back/1"
DIAL_S = 3.0
ANSWER_S = 2 * DIAL_S  # for a whole question and answer
MAX_BYTES = 8192  # of a question or an answer
AT_ONCE = 8  # questions that are answered at the same time
_GREETING = b"\x13/multistream/1.0.0\n"  # what a libp2p peer says first on a TCP connection
_LENGTH = struct.Struct(">I")

Address = Annotated[str, msgspec.Meta(max_length=256)]
Addresses = Annotated[tuple[Address, ...], msgspec.Meta(max_length=16)]


class Question(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Can you dial me at one of these?"""

    addresses: Addresses
    token: TokenBytes | None = None  # of a member of a private swarm


class Answer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Those that were dialled, and those of them at which a libp2p peer answered."""

    dialled: Addresses
    reached: Addresses


Said = TypeVar("Said", Question, Answer)


class DialBack:
    """Answers the questions of others. In a private swarm, those of its `members`."""

    def __init__(self, members: Members | None):
        self._members = members
        self._under_way = 0

    async def serve(self, info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read one question, answer it, and close."""
        self._under_way += 1
        try:
            async with asyncio.timeout(ANSWER_S):
                if self._under_way > AT_ONCE:
                    raise ServerBusy(f"more than {AT_ONCE} peers ask to be dialled")
                question = await _read(reader, Question)
                if self._members is not None:
                    self._members.admit(question.token, str(info.peer_id))
                await _write(writer, await answer(question.addresses, host=_host(str(info.addr))))
        except (AccessDenied, ProtocolError, ServerBusy, TimeoutError, *BROKEN) as error:
            logger.info("peer %s asked to be dialled: %s", info.peer_id, error or "it was too slow")
        finally:
            self._under_way -= 1
            writer.close()


async def dialled_back(
    p2p: P2P, peers: Sequence[str], addresses: Sequence[str], members: Members | None, *, given: bool = False
) -> bool | None:
    """Whether one of `peers` reaches this one at one of its `addresses`; None where none of them can say.

    Addresses that somebody has `given` may be of a router whose other side `peers` do not see: then they dial nothing.
    """
    question = Question(addresses=tuple(addresses), token=None if members is None else members.own_token())
    said = [each for each in await asyncio.gather(*(_asked(p2p, peer, question) for peer in peers)) if each]
    if any(each.reached for each in said):
        return True
    if not said or (given and not any(each.dialled for each in said)):
        logger.warning("no peer of the swarm can say whether others can dial this one")
        return None
    return False


async def _asked(p2p: P2P, peer: str, question: Question) -> Answer | None:
    try:
        async with asyncio.timeout(ANSWER_S):
            peer_id = PeerID.from_base58(peer.rpartition("/p2p/")[2])
            _, reader, writer = await p2p.call_binary_stream_handler(peer_id, PROTOCOL)
            try:
                await _write(writer, question)
                return await _read(reader, Answer)
            finally:
                writer.close()
    except (P2PDaemonError, ProtocolError, TimeoutError, *BROKEN) as error:
        logger.info("peer %s does not say whether it can dial this one: %s", peer, error)
        return None


async def answer(addresses: Sequence[str], *, host: str | None) -> Answer:
    """Dial those of `addresses` that are of `host`."""
    dialled = tuple(address for address in addresses if host is not None and _host(address) == host)
    greet = await asyncio.gather(*(_greets(address) for address in dialled))
    return Answer(dialled=dialled, reached=tuple(compress(dialled, greet)))


async def _greets(address: str) -> bool:
    """Whether a libp2p peer listens there, by TCP."""
    try:
        async with asyncio.timeout(DIAL_S):
            reader, writer = await asyncio.open_connection(_host(address), _part(address, "tcp"))
            try:
                return await reader.readexactly(len(_GREETING)) == _GREETING
            finally:
                writer.close()
    except BROKEN:  # a time-out is one
        return False


def _host(address: str) -> str | None:
    """The IP address in a multiaddress; None where there is none."""
    return _part(address, "ip4") or _part(address, "ip6")


def _part(address: str, protocol: str) -> str | None:
    try:
        return str(Multiaddr(address)[protocol])
    except (LookupError, ValueError):
        return None


async def _write(writer: asyncio.StreamWriter, message: Question | Answer) -> None:
    body = msgspec.msgpack.encode(message)
    writer.write(_LENGTH.pack(len(body)) + body)
    await writer.drain()


async def _read(reader: asyncio.StreamReader, kind: type[Said]) -> Said:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > MAX_BYTES:
        raise ProtocolError(f"{length} bytes; at most {MAX_BYTES} are allowed")
    try:
        return msgspec.msgpack.decode(await reader.readexactly(length), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a message of {PROTOCOL}: {str(error)[:200]}") from None
