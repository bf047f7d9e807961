"""A peer that nobody can dial, as others reach it: through one that relays, which keeps a place for it.

What is relayed stays encrypted between the two ends. The protocol is libp2p's; its own client for it waits minutes
before it asks, and leaves out relays with private addresses, so the question is asked here.
Source: libp2p specs, circuit relay v2.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError

from petals_tune.errors import ProtocolError, ServerError, ServerUnreachable
from petals_tune.net.hivemind_p2p import CIRCUIT, dialled, start_p2p, stop_p2p
from petals_tune.wire.frames import BROKEN

logger = logging.getLogger(__name__)

ASK_S = 5.0
RENEW_S = 20.0  # a place is kept for an hour, as long as the connection to the relay lasts
LEAST_BYTES = 2**26  # a relay that lets less through, a connection, is of no use: libp2p's default is 128 KiB
STARTS = 10  # of a daemon that shall relay
_HOP = "/libp2p/circuit/relay/0.2.0/hop"
_RESERVE = bytes([2, 0x08, 0])  # a length, and HopMessage {type: RESERVE}
_OK = 100
_MAX_REPLY_BYTES = 4096


async def start_relay(start: Callable[[], Awaitable[P2P]]) -> P2P:
    """A daemon that `start` starts with `relays=True`, and that lets enough through.

    hivemind's daemon starts two relay services at the same time, and the one that comes last counts: its own, with
    4 GiB or 30 minutes a connection, or libp2p's default with 128 KiB. With two Go threads a third of the daemons came
    up with the wrong one, with one thread few. A second daemon tries it, and is called first: so no firewall and no
    router's address is in between.
    """
    guest = await start_p2p(listens=True)
    try:
        (own,) = await guest.get_visible_maddrs()
        for _ in range(STARTS):
            relay = await start()
            try:
                await relay._client.connect(guest.peer_id, [dialled(str(own))])
                await _ask(guest, relay.peer_id)
                return relay
            except BaseException as error:
                await stop_p2p(relay)
                if not isinstance(error, ServerUnreachable):
                    raise
    finally:
        await stop_p2p(guest)
    raise ServerError(f"the p2p daemon did not begin to relay, in {STARTS} starts: leave swarm.relay=true out")


@dataclass
class Relayed:
    """A place at one of `relays`, addresses of peers. It is asked for again when it is lost, there or at another."""

    p2p: P2P
    relays: Sequence[str]
    relay: str  # the one that keeps a place

    @classmethod
    async def find(cls, p2p: P2P, relays: Sequence[str]) -> Relayed:
        """Raises ServerUnreachable where none of `relays` keeps a place."""
        refusals = []
        for relay in relays:
            try:
                await reserve(p2p, relay)
            except ServerUnreachable as error:
                refusals.append(f"{relay}: {error}")
            else:
                return cls(p2p, relays, relay)
        raise ServerUnreachable(
            "others cannot dial this server, and none of swarm.initial_peers relays: " + "; ".join(refusals) + "\n"
            "  forward a port to this machine (swarm.host_maddrs, swarm.announce_maddrs), or have one of them started "
            "with swarm.relay=true"
        )

    @property
    def address(self) -> str:
        """Where others reach this peer."""
        return f"{self.relay}{CIRCUIT}/p2p/{self.p2p.peer_id}"

    async def keep(self) -> None:
        """Ask again and again, for ever."""
        while True:
            await asyncio.sleep(RENEW_S)
            for relay in dict.fromkeys((self.relay, *self.relays)):
                with suppress(ServerUnreachable):
                    await reserve(self.p2p, relay)
                    if relay != self.relay:
                        logger.warning("others reach this server through %s now", relay)
                    self.relay = relay
                    break
            else:
                logger.warning("no relay keeps a place for this server: nobody can reach it")


async def reserve(p2p: P2P, relay: str) -> None:
    """Have the peer at the address `relay` keep a place for us. Raises ServerUnreachable."""
    peer = PeerID.from_base58(relay.rpartition("/p2p/")[2])
    try:
        async with asyncio.timeout(ASK_S):
            await p2p._client.connect(peer, [dialled(relay)])
    except (TimeoutError, P2PDaemonError, *BROKEN) as error:
        raise ServerUnreachable(str(error) or "it does not answer") from None
    await _ask(p2p, peer)


async def _ask(p2p: P2P, relay: PeerID) -> None:
    """Ask a peer with which there is a connection for a place. Raises ServerUnreachable."""
    try:
        async with asyncio.timeout(ASK_S):
            _, reader, writer = await p2p.call_binary_stream_handler(relay, _HOP)
            try:
                writer.write(_RESERVE)
                await writer.drain()
                reply = await _read_reply(reader)
            finally:
                writer.close()
    except (TimeoutError, P2PDaemonError, ProtocolError, *BROKEN) as error:
        raise ServerUnreachable(f"it does not relay ({error or 'no answer'})") from None
    if (status := reply.get(5)) != _OK:
        raise ServerUnreachable(f"it refuses (status {status!r} of libp2p's circuit relay)")
    limit = reply.get(4)
    most_bytes = _fields(limit).get(2) if isinstance(limit, bytes) else None
    if isinstance(most_bytes, int) and 0 < most_bytes < LEAST_BYTES:
        raise ServerUnreachable(f"it lets no more than {most_bytes} bytes through")


async def _read_reply(reader: asyncio.StreamReader) -> dict[int, int | bytes]:
    """A HopMessage by field number: 5 is the status, 4 the limit of what is relayed."""
    length = (await reader.readexactly(1))[0]
    if length >= 0x80:  # a varint: seven bits a byte, the low ones first
        length += (await reader.readexactly(1))[0] - 1 << 7
    if length > _MAX_REPLY_BYTES:
        raise ProtocolError(f"a relay's reply of more than {_MAX_REPLY_BYTES} bytes")
    return _fields(await reader.readexactly(length))


def _fields(message: bytes) -> dict[int, int | bytes]:
    """The fields of a Protocol Buffers message by number."""
    parsed = Empty()
    try:
        parsed.ParseFromString(message)
    except DecodeError as error:
        raise ProtocolError(f"a relay's reply: {error}") from None
    return {field.field_number: field.data for field in UnknownFieldSet(parsed)}
