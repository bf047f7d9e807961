"""Real p2p daemons on 127.0.0.1; the one that is reached through a relay listens nowhere."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from functools import partial

import pytest
from hivemind.p2p import P2P

from petals_tune.errors import ProtocolError, ServerError, ServerUnreachable
from petals_tune.net import circuit_relay as relayed
from petals_tune.net import hivemind_p2p as daemons
from petals_tune.net.circuit_relay import Relayed, reserve, start_relay
from petals_tune.net.hivemind_p2p import dialled, start_p2p, stop_p2p
from petals_tune.wire.signing import SigningKey

ECHO = "/echo"
PAYLOAD = bytes(2**20)  # eight times what libp2p's default relay lets through


@pytest.fixture
async def start(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable]:
    """Starts a daemon as if its swarm were on several machines: it may dial through relays."""
    monkeypatch.setattr(daemons, "on_this_machine", lambda _: False)
    async with AsyncExitStack() as stack:

        async def started(*peers: str, relays: bool = False, **options) -> P2P:
            one = partial(start_p2p, peers, relays=relays, **options)
            p2p = await (start_relay(one) if relays else one())
            stack.push_async_callback(_stop, p2p)
            return p2p

        yield started


async def _stop(p2p: P2P) -> None:
    if p2p._child is not None and p2p._child.returncode is None:
        await stop_p2p(p2p)


async def addresses(p2p: P2P) -> list[str]:
    return [str(address) for address in await p2p.get_visible_maddrs()]


async def echo(_: object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while part := await reader.read(2**16):
        writer.write(part)
        await writer.drain()
    writer.close()


async def echoed(client: P2P, server: P2P, address: str) -> bytes:
    """What comes back of PAYLOAD."""
    await client._client.connect(server.peer_id, [dialled(address)])
    _, reader, writer = await client.call_binary_stream_handler(server.peer_id, ECHO)
    sending = asyncio.create_task(_send(writer))
    received = await asyncio.wait_for(reader.readexactly(len(PAYLOAD)), 20)
    await sending
    writer.close()
    return received


async def _send(writer: asyncio.StreamWriter) -> None:
    for start in range(0, len(PAYLOAD), 2**16):
        writer.write(PAYLOAD[start : start + 2**16])
        await writer.drain()


async def test_a_peer_that_listens_nowhere_is_reached_through_a_relay(start):
    relay = await start(relays=True)
    server = await start(*await addresses(relay), listens=False)
    await server.add_binary_stream_handler(ECHO, echo)
    place = await Relayed.find(server, await addresses(relay))
    assert await echoed(await start(listens=False), server, place.address) == PAYLOAD


async def test_a_daemon_that_came_up_with_the_small_relay_is_started_again(start):
    """libp2p's default service is what a daemon has that may merely dial through relays."""
    begun = []

    async def start_wrong_first() -> P2P:
        begun.append(await start_p2p(relays=len(begun) > 1))
        return begun[-1]

    relay = await start_relay(start_wrong_first)
    try:
        assert len(begun) > 2
        assert [daemon._child.returncode is None for daemon in begun] == [False] * (len(begun) - 1) + [True]
        await reserve(await start(listens=False), (await addresses(relay))[0])
    finally:
        await stop_p2p(relay)


async def test_a_daemon_that_never_relays_enough_is_given_up(monkeypatch):
    monkeypatch.setattr(relayed, "STARTS", 2)
    begun = []

    async def start_wrong() -> P2P:
        begun.append(await start_p2p())
        return begun[-1]

    with pytest.raises(ServerError, match="did not begin to relay, in 2 starts"):
        await start_relay(start_wrong)
    assert [daemon._child.returncode is None for daemon in begun] == [False, False]


async def test_where_nobody_relays_it_says_what_to_do(start):
    """A daemon that may dial through relays is one by libp2p's default, and ends connections soon."""
    other = await start()
    server = await start(listens=False)
    with pytest.raises(ServerUnreachable, match=r"no more than 131072 bytes through\n  forward a port .*relay=true"):
        await Relayed.find(server, await addresses(other))
    await stop_p2p(other)
    with pytest.raises(ServerUnreachable, match=f"initial_peers relays: /ip4/127.0.0.1/tcp/1/p2p/{other.peer_id}: "):
        await Relayed.find(server, [f"/ip4/127.0.0.1/tcp/1/p2p/{other.peer_id}"])


async def test_a_place_is_asked_for_again_after_the_relay_was_restarted(start, monkeypatch, caplog):
    monkeypatch.setattr(relayed, "RENEW_S", 0.1)
    identity = SigningKey.new()
    relay = await start(relays=True, identity=identity)
    (address,) = await addresses(relay)
    server = await start(listens=False)
    await server.add_binary_stream_handler(ECHO, echo)
    place = await Relayed.find(server, [address])
    keeping = asyncio.create_task(place.keep())
    try:
        await stop_p2p(relay)
        while "nobody can reach it" not in caplog.text:
            await asyncio.sleep(0.05)
        await start(relays=True, identity=identity, host_maddrs=[address.partition("/p2p/")[0]])
        client = await start(listens=False)
        async with asyncio.timeout(30):
            while True:
                try:
                    assert await echoed(client, server, place.address) == PAYLOAD
                    break
                except relayed.P2PDaemonError:  # no place yet
                    await asyncio.sleep(0.2)
    finally:
        keeping.cancel()


async def test_another_relay_takes_over(start, monkeypatch):
    monkeypatch.setattr(relayed, "RENEW_S", 0.1)
    first, second = await start(relays=True), await start(relays=True)
    relays = [*await addresses(first), *await addresses(second)]
    server = await start(listens=False)
    place = await Relayed.find(server, relays)
    assert place.relay == relays[0]
    keeping = asyncio.create_task(place.keep())
    try:
        await stop_p2p(first)
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
    with pytest.raises((ProtocolError, asyncio.IncompleteReadError)):
        await relayed._read_reply(reader)
