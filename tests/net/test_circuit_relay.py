"""Real p2p daemons on 127.0.0.1; the one that is reached through a relay listens nowhere."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from functools import partial

import pytest

from petals_tune.errors import ConnectionLost, ProtocolError, ServerError, ServerUnreachable
from petals_tune.net import circuit_relay, hivemind_p2p
from petals_tune.net.circuit_relay import Reservation, reserve, start_relay
from petals_tune.net.hivemind_p2p import HivemindTransport
from petals_tune.net.transport import Connection, StreamConnection
from petals_tune.wire.signing import SigningKey
from tests.raising import raises

ECHO = "/echo"
PART = 2**16
PAYLOAD = bytes(2**20)  # eight times what libp2p's default relay lets through


@pytest.fixture
async def start(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable]:
    """Starts a daemon as if its swarm were on several machines: it may dial through relays."""
    monkeypatch.setattr(hivemind_p2p, "on_this_machine", lambda _: False)
    async with AsyncExitStack() as stack:

        async def started(*peers: str, relays: bool = False, **options) -> HivemindTransport:
            one = partial(HivemindTransport.start, peers, relays=relays, **options)
            transport = await (start_relay(one) if relays else one())
            stack.push_async_callback(transport.stop)
            return transport

        yield started


async def echo(connection: Connection) -> None:
    try:
        while True:
            await connection.write(await connection.read_exactly(PART))
    except ConnectionLost:
        connection.close()


async def echoed(client: HivemindTransport, server: HivemindTransport, address: str) -> bytes:
    """What comes back of PAYLOAD."""
    connection = await client.dial(server.id, [address], ECHO)
    sending = asyncio.create_task(_send(connection))
    received = await asyncio.wait_for(connection.read_exactly(len(PAYLOAD)), 20)
    await sending
    connection.close()
    return received


async def _send(connection: Connection) -> None:
    for start in range(0, len(PAYLOAD), PART):
        await connection.write(PAYLOAD[start : start + PART])


async def test_a_peer_that_listens_nowhere_is_reached_through_a_relay(start):
    relay = await start(relays=True)
    server = await start(*await relay.addresses(), listens=False)
    await server.accept(ECHO, echo)
    place = await Reservation.make(server, await relay.addresses())
    assert await echoed(await start(*await relay.addresses(), listens=False), server, place.address) == PAYLOAD


async def test_a_daemon_that_came_up_with_the_small_relay_is_started_again(start):
    """libp2p's default service is what a daemon has that may merely dial through relays."""
    begun = []

    async def start_wrong_first() -> HivemindTransport:
        begun.append(await HivemindTransport.start(relays=len(begun) > 1))
        return begun[-1]

    relay = await start_relay(start_wrong_first)
    try:
        assert len(begun) > 2
        assert [daemon.alive for daemon in begun] == [False] * (len(begun) - 1) + [True]
        await reserve(await start(listens=False), (await relay.addresses())[0])
    finally:
        await relay.stop()


async def test_a_daemon_that_never_relays_enough_is_given_up(monkeypatch):
    monkeypatch.setattr(circuit_relay, "STARTS", 2)
    begun = []

    async def start_wrong() -> HivemindTransport:
        begun.append(await HivemindTransport.start())
        return begun[-1]

    with raises(ServerError):
        await start_relay(start_wrong)
    assert [daemon.alive for daemon in begun] == [False, False]


async def test_where_nobody_relays_it_says_what_to_do(start):
    """A daemon that may dial through relays is one by libp2p's default, and ends connections soon."""
    other = await start()
    server = await start(listens=False)
    with raises(ServerUnreachable) as caught:
        await Reservation.make(server, await other.addresses())
    await other.stop()
    assert "no more than 131072 bytes" in str(caught.value)
    with raises(ServerUnreachable):
        await Reservation.make(server, [f"/ip4/127.0.0.1/tcp/1/p2p/{other.id}"])


async def test_a_place_is_asked_for_again_after_the_relay_was_restarted(start, monkeypatch, caplog):
    monkeypatch.setattr(circuit_relay, "RENEW_S", 0.1)
    identity = SigningKey.new()
    relay = await start(relays=True, identity=identity)
    (address,) = await relay.addresses()
    server = await start(listens=False)
    await server.accept(ECHO, echo)
    place = await Reservation.make(server, [address])
    keeping = asyncio.create_task(place.renew())
    try:
        await relay.stop()
        while "nobody can reach it" not in caplog.text:
            await asyncio.sleep(0.05)
        await start(relays=True, identity=identity, host_maddrs=[address.partition("/p2p/")[0]])
        client = await start(address, listens=False)
        async with asyncio.timeout(30):
            while True:
                try:
                    assert await echoed(client, server, place.address) == PAYLOAD
                    break
                except ConnectionLost:  # no place yet
                    await asyncio.sleep(0.2)
    finally:
        keeping.cancel()


async def test_another_relay_takes_over(start, monkeypatch):
    monkeypatch.setattr(circuit_relay, "RENEW_S", 0.1)
    first, second = await start(relays=True), await start(relays=True)
    relays = [*await first.addresses(), *await second.addresses()]
    server = await start(listens=False)
    place = await Reservation.make(server, relays)
    assert place.relay == relays[0]
    keeping = asyncio.create_task(place.renew())
    try:
        await first.stop()
        async with asyncio.timeout(30):
            while place.relay != relays[1]:
                await asyncio.sleep(0.05)
        assert place.address.startswith(relays[1])
    finally:
        keeping.cancel()


@pytest.mark.parametrize("reply", [b"\x85\x85\x85", b"\xff\x7f", b"\x02\x28", b"\x02\xff\xff"])
async def test_a_reply_that_is_none_is_refused(reply):
    reader = asyncio.StreamReader()
    reader.feed_data(reply)
    reader.feed_eof()
    with pytest.raises((ProtocolError, ConnectionLost)):
        await circuit_relay._read_reply(StreamConnection("relay", reader, writer=None))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "reply",
    [
        bytes([0x28, 100, 0x22, 1, 0xFF]),  # status 100 (OK), and a limit that is no message
        bytes([0x28, 100, 0x22, 3, 0x10, 0xFF, 0xFF]),  # a limit whose number does not end
        bytes([0x2A, 1, 100]),  # a status that is bytes
    ],
)
async def test_a_relay_with_a_malformed_answer_is_left_for_another_one(start, monkeypatch, reply):
    """An attack: the keeper of the reservation must outlive whatever a relay says."""
    monkeypatch.setattr(circuit_relay, "RENEW_S", 0.05)
    relay, liar = await start(relays=True), await start()
    asked = []

    async def answer(connection: Connection) -> None:
        asked.append(await connection.read_exactly(3))
        await connection.write(bytes([len(reply)]), reply)
        connection.close()

    await liar.accept(circuit_relay._HOP, answer)
    server = await start(listens=False)
    addresses = [*await liar.addresses(), *await relay.addresses()]
    with raises(ServerUnreachable, peer=liar.id):
        await reserve(server, addresses[0])
    place = Reservation(server, addresses, addresses[0])
    keeping = asyncio.create_task(place.renew())
    try:
        async with asyncio.timeout(30):
            while place.relay != addresses[1]:
                await asyncio.sleep(0.05)
        assert len(asked) > 1
        assert not keeping.done()
    finally:
        keeping.cancel()
