"""Circuit relay: a peer that nobody can dial is reached through one that relays, where it has a reservation.

What is relayed stays encrypted between the two ends. The protocol is libp2p's; its own client waits minutes before it
asks for a reservation, and leaves out relays with private addresses, so the request is sent here.
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

from petals_tune.errors import ConnectionLost, ProtocolError, ServerError, ServerUnreachable
from petals_tune.net.address_policy import CIRCUIT
from petals_tune.net.hivemind_p2p import HivemindTransport, peer_of
from petals_tune.net.transport import Connection

logger = logging.getLogger(__name__)

ASK_S = 5.0
RENEW_S = 20.0  # a reservation is good for an hour, as long as the connection to the relay lasts
LEAST_BYTES = 2**26  # a relay that lets less through, a connection, is of no use: libp2p's default is 128 KiB
STARTS = 10  # of a daemon that shall relay
_HOP = "/libp2p/circuit/relay/0.2.0/hop"
_RESERVE = bytes([2, 0x08, 0])  # a length, and HopMessage {type: RESERVE}
_OK = 100
_MAX_REPLY_BYTES = 4096


async def start_relay(start: Callable[[], Awaitable[HivemindTransport]]) -> HivemindTransport:
    """Start a daemon by `start`, which calls `HivemindTransport.start(relays=True)`, until it relays enough bytes.

    hivemind's daemon starts two relay services at the same time, and the one that comes last counts: its own, with
    4 GiB or 30 minutes a connection, or libp2p's default with 128 KiB. With two Go threads a third of the daemons came
    up with the wrong one, with one thread few. A second daemon tries it. The relay dials it, not the other way round:
    so no firewall and no router's address is in between.
    """
    guest = await HivemindTransport.start()
    try:
        (own,) = await guest.addresses()
        for _ in range(STARTS):
            relay = await start()
            try:
                await relay.connect(own)
                await _request(guest, relay.id)
                return relay
            except BaseException as error:
                await relay.stop()
                if not isinstance(error, ServerUnreachable):
                    raise
    finally:
        await guest.stop()
    raise ServerError(f"the p2p daemon did not begin to relay, in {STARTS} starts: leave swarm.relay=true out")


@dataclass
class Reservation:
    """A reservation at one of `relays`, addresses of peers. One that is lost is made anew, there or at another."""

    transport: HivemindTransport
    relays: Sequence[str]
    relay: str  # the one where it is

    @classmethod
    async def make(cls, transport: HivemindTransport, relays: Sequence[str]) -> Reservation:
        """Raises ServerUnreachable where none of `relays` grants one."""
        refusals = []
        for relay in relays:
            try:
                await reserve(transport, relay)
            except ServerUnreachable as error:
                refusals.append(f"{relay}: {error}")
            else:
                return cls(transport, relays, relay)
        raise ServerUnreachable(
            "others cannot dial this server, and none of swarm.initial_peers relays: " + "; ".join(refusals) + "\n"
            "  forward a port to this machine (swarm.host_maddrs, swarm.announce_maddrs), or have one of them started "
            "with swarm.relay=true"
        )

    @property
    def address(self) -> str:
        """Where others reach this peer."""
        return f"{self.relay}{CIRCUIT}/p2p/{self.transport.id}"

    async def renew(self) -> None:
        """Renew it again and again, for ever."""
        while True:
            await asyncio.sleep(RENEW_S)
            for relay in dict.fromkeys((self.relay, *self.relays)):
                with suppress(ServerUnreachable):
                    await reserve(self.transport, relay)
                    if relay != self.relay:
                        logger.warning("others reach this server through %s now", relay)
                    self.relay = relay
                    break
            else:
                logger.warning("no relay has a reservation for this server: nobody can reach it")


async def reserve(transport: HivemindTransport, relay: str) -> None:
    """Make a reservation with the peer at the address `relay`. Raises ServerUnreachable."""
    try:
        async with asyncio.timeout(ASK_S):
            await transport.connect(relay)
    except (ConnectionLost, TimeoutError) as error:
        raise ServerUnreachable(str(error) or "it does not answer", peer=peer_of(relay)) from None
    await _request(transport, peer_of(relay))


async def _request(transport: HivemindTransport, relay: str) -> None:
    """Request a reservation of a peer with which there is a connection. Raises ServerUnreachable."""
    try:
        async with asyncio.timeout(ASK_S):
            connection = await transport.dial(relay, (), _HOP)
            try:
                await connection.write(_RESERVE)
                reply = await _read_reply(connection)
            finally:
                connection.close()
        limit = reply.get(4)
        most_bytes = _fields(limit).get(2) if isinstance(limit, bytes) else None
    except (ConnectionLost, ProtocolError, TimeoutError) as error:
        raise ServerUnreachable(f"it does not relay ({str(error) or 'no answer'})", peer=relay) from None
    if (status := reply.get(5)) != _OK:
        raise ServerUnreachable(f"it refuses (status {status!r} of libp2p's circuit relay)", peer=relay)
    if isinstance(most_bytes, int) and 0 < most_bytes < LEAST_BYTES:
        raise ServerUnreachable(f"it lets no more than {most_bytes} bytes through", peer=relay)


async def _read_reply(connection: Connection) -> dict[int, int | bytes]:
    """A HopMessage by field number: 5 is the status, 4 the limit of what is relayed."""
    length = (await connection.read_exactly(1))[0]
    if length >= 0x80:  # a varint: seven bits a byte, the low ones first
        length += (await connection.read_exactly(1))[0] - 1 << 7
    if length > _MAX_REPLY_BYTES:
        raise ProtocolError(f"a relay's reply of more than {_MAX_REPLY_BYTES} bytes")
    return _fields(await connection.read_exactly(length))


def _fields(message: bytes) -> dict[int, int | bytes]:
    """The fields of a Protocol Buffers message by number."""
    parsed = Empty()
    try:
        parsed.ParseFromString(message)
    except DecodeError as error:
        raise ProtocolError(f"a relay's reply: {error}") from None
    return {field.field_number: field.data for field in UnknownFieldSet(parsed)}
