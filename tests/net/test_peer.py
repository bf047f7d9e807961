"""Real p2p daemons and DHT nodes on 127.0.0.1."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from petals_tune.net import hivemind_p2p as p2p
from petals_tune.net.circuit_relay import Relayed
from petals_tune.net.directory import Directory
from petals_tune.net.peer import Joined, joined
from petals_tune.swarm.client import SwarmClient
from petals_tune.swarm.retry import RetryPolicy
from tests.servers.peers import SPAN, record_of


async def announce(server: Joined) -> None:
    record = msgspec.structs.replace(record_of(server.peer), addresses=server.addresses)
    await Directory(server.node).announce(record, lasts_s=60)


async def until_known(server: Joined, *, to: Joined) -> None:
    """Returns once the DHT shows `to` the server, which renews its announcement meanwhile."""
    async with asyncio.timeout(30):
        while [record.peer for record in (await Directory(to.node).snapshot()).servers] != [server.peer]:
            await announce(server)
            await asyncio.sleep(0.2)


async def test_a_swarm_whose_first_node_was_restarted_comes_together_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The node knows nobody then, and who did not get an answer from it has forgotten it."""
    monkeypatch.setattr(p2p, "GREET_S", 0.3)
    identity_path = str(tmp_path / "node.identity")
    async with AsyncExitStack() as stack:
        first = AsyncExitStack()
        node = await first.enter_async_context(joined([], host_maddrs=[p2p.LOOPBACK], identity_path=identity_path))
        peers = node.addresses
        server = await stack.enter_async_context(joined(peers, host_maddrs=[p2p.LOOPBACK]))
        await announce(server)
        client = await SwarmClient.join(peers, model="digest", blocks=SPAN, policy=RetryPolicy())
        stack.push_async_callback(client.close)
        await first.aclose()
        await client.refresh()
        async with asyncio.timeout(30):
            while node.p2p.peer_id in server.node.protocol.routing_table:
                await announce(server)
                await asyncio.sleep(0.1)

        again = joined([], host_maddrs=[peers[0].partition("/p2p/")[0]], identity_path=identity_path)
        node = await stack.enter_async_context(again)
        await until_known(server, to=node)
        newcomer = await stack.enter_async_context(joined(peers, listens=False))
        await until_known(server, to=newcomer)
        async with asyncio.timeout(30):
            while node.p2p.peer_id not in client._node.protocol.routing_table:
                await asyncio.sleep(0.1)


def test_the_addresses_of_a_relayed_peer_follow_its_relay():
    p2p = SimpleNamespace(peer_id="me")
    place = Relayed(p2p, ["/ip4/10.0.0.1/tcp/1/p2p/one", "/ip4/10.0.0.2/tcp/1/p2p/two"], "/ip4/10.0.0.1/tcp/1/p2p/one")  # type: ignore[arg-type]
    own = ("/ip4/127.0.0.1/tcp/5/p2p/me", "/ip4/10.0.0.9/tcp/5/p2p/me")
    here = Joined(p2p=p2p, node=None, members=None, own_addresses=own, relayed=place)  # type: ignore[arg-type]
    assert here.addresses == (own[1], "/ip4/10.0.0.1/tcp/1/p2p/one/p2p-circuit/p2p/me")
    place.relay = place.relays[1]
    assert here.addresses == (own[1], "/ip4/10.0.0.2/tcp/1/p2p/two/p2p-circuit/p2p/me")
