"""Streams that several share: when one is opened, when it is opened anew, and what is left after the end."""

import asyncio

import msgspec
import pytest

from petals_tune.errors import ConnectionLost, ServerTimeout, ServerUnreachable
from petals_tune.net.in_process import InProcessNetwork
from petals_tune.net.pool import StreamPool
from petals_tune.net.stats import SwarmStats
from petals_tune.wire.messages import Hello, Ping, Pong
from tests.net.played_peer import LONG_S, PEER, RECORD, PlayedPeer, accepted
from tests.raising import raises

OTHER = msgspec.structs.replace(RECORD, peer="other")


class Swarm:
    """Servers that are played by the test, and a pool of streams to them."""

    def __init__(self, timeout_s: float = LONG_S):
        self.network, self.stats = InProcessNetwork(), SwarmStats()
        self.greeted_peers: list[PlayedPeer] = []
        self.pool = StreamPool(self.network.peer("client"), model="m", timeout_s=timeout_s, stats=self.stats)

    async def start(self) -> None:
        self.ends, self.others = await accepted(self.network), await accepted(self.network, OTHER.peer)

    async def greeted(self) -> PlayedPeer:
        peer = await self.ends.get()
        self.greeted_peers.append(peer)  # asyncio closes a connection that nobody refers to
        await peer.welcome()
        return peer


@pytest.fixture
async def swarm() -> Swarm:
    swarm = Swarm()
    await swarm.start()
    return swarm


async def test_all_who_ask_share_one_stream(swarm):
    asking = [asyncio.create_task(swarm.pool.get(RECORD)) for _ in range(3)]
    peer = await swarm.ends.get()
    assert swarm.pool.living(PEER) is None, "it is not greeted yet"
    number, hello = await peer.read()
    assert hello == Hello(model="m")
    await asyncio.sleep(0)
    assert swarm.ends.empty()
    await peer.send(Pong(), number)  # not what is due: all who wait share the error
    errors = await asyncio.gather(*asking, return_exceptions=True)
    assert len({id(error) for error in errors}) == 1

    again = [asyncio.create_task(swarm.pool.get(RECORD)) for _ in range(3)]
    peer = await swarm.greeted()
    first, *others = await asyncio.gather(*again)
    assert others == [first, first]
    assert swarm.pool.living(PEER) is first
    assert await swarm.pool.get(RECORD) is first
    assert swarm.ends.empty()
    calling = asyncio.create_task(first.call(Ping(), timeout_s=LONG_S))
    number, _ = await peer.read()
    await peer.send(Pong(), number)
    assert await calling == Pong()
    assert swarm.stats.calls == 2, "two Hellos; a Ping is no work"
    await swarm.pool.close()


async def test_a_stream_that_ended_is_opened_anew(swarm):
    opening = asyncio.create_task(swarm.pool.get(RECORD))
    peer = await swarm.greeted()
    first = await opening
    peer.connection.close()
    while first.alive:
        await asyncio.sleep(0)
    assert swarm.pool.living(PEER) is None
    opening = asyncio.create_task(swarm.pool.get(RECORD))
    await swarm.greeted()
    assert (await opening).alive
    await swarm.pool.close()


async def test_who_cannot_be_reached_is_tried_again_at_the_next_question(swarm):
    swarm.network.remove(PEER)
    for _ in range(2):
        with raises(ServerUnreachable, peer=PEER):
            await swarm.pool.get(RECORD)
    assert swarm.pool.living(PEER) is None
    swarm.ends = await accepted(swarm.network)
    opening = asyncio.create_task(swarm.pool.get(RECORD))
    await swarm.greeted()
    assert await opening is swarm.pool.living(PEER)
    await swarm.pool.close()


async def test_who_gives_up_waiting_does_not_end_the_opening_for_others(swarm):
    first, second = [asyncio.create_task(swarm.pool.get(RECORD)) for _ in range(2)]
    await asyncio.sleep(0)
    first.cancel()
    await swarm.greeted()
    assert (await second).alive
    await swarm.pool.close()


async def test_a_server_that_does_not_greet_in_time_is_given_up():
    swarm = Swarm(timeout_s=0.01)
    await swarm.start()
    with raises(ServerTimeout, peer=PEER):
        await swarm.pool.get(RECORD)


async def test_one_stream_is_closed_or_all_even_those_that_are_being_opened(swarm):
    openings = [asyncio.create_task(swarm.pool.get(record)) for record in (RECORD, OTHER)]
    peer, other = await swarm.greeted(), await swarm.others.get()
    await openings[0]
    assert swarm.pool.peers == {PEER, "other"}
    await swarm.pool.close(PEER)
    await swarm.pool.close("nobody")
    assert swarm.pool.peers == {"other"}
    await swarm.pool.close()
    assert swarm.pool.peers == frozenset()
    with raises(ServerUnreachable, peer="other"):  # whoever waited for it was not cancelled
        await openings[1]
    for end in (peer, other):
        with raises(ConnectionLost):
            while True:
                await end.read()
