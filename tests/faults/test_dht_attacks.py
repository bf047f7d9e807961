"""Attacks on the DHT that once blinded every reader, over real daemons: poison, dictionaries without an end, floods."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer

from petals_tune.net.dht.directory import DhtDirectory
from petals_tune.net.dht.keys import SHARD_RECORDS, Shard, Spot
from petals_tune.net.dht.protocol import MAX_SPOTS, MAX_TO_REACH, node_id_of
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan
from tests.fuzz.dht import malicious_node
from tests.net.dht.nodes import key_of, node, record, signed

pytestmark = pytest.mark.asyncio(loop_scope="module")
WHOLE = BlockSpan(0, 24)
ROOT = Spot(0, 0)


@dataclass
class Network:
    """A server, a client that has read before, and a thief."""

    server: DhtDirectory
    client: DhtDirectory
    thief: DhtDirectory
    peers: list[str]
    honest: ServerRecord

    async def everybody_sees(self) -> bool:
        """Whether the server itself, the old client and a new one see the honest server."""
        async with node(self.peers, client=True) as (newcomer, _), asyncio.timeout(30):
            readers = (self.server, self.client, newcomer)
            seen = [(await reader.snapshot("m", WHOLE)).servers for reader in readers]
        return all(self.honest in servers for servers in seen)

    async def store(self, values: list[bytes]) -> list[bool]:
        stub = self.thief.node.protocol.get_stub(self.server.node.protocol.p2p.peer_id)
        taken: list[bool] = []
        for start in range(0, len(values), MAX_SPOTS):
            part = values[start : start + MAX_SPOTS]
            request = dht_pb2.StoreRequest(subkeys=[ROOT.encode()] * len(part), values=part)
            taken += (await stub.rpc_store(request, timeout=30)).store_ok
        return taken


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def network() -> AsyncIterator[Network]:
    async with AsyncExitStack() as stack:
        server, peers = await stack.enter_async_context(node(name="server"))
        client, _ = await stack.enter_async_context(node(peers, client=True))
        thief, _ = await stack.enter_async_context(node(peers, client=True, name="thief"))
        honest = record("server", 0, 24, model="m")
        await server.announce(honest, lasts_s=500)
        yield Network(server, client, thief, peers, honest)


async def test_a_record_that_is_signed_and_no_message_blinds_nobody(network):
    """One byte under a right signature: each search for the key raised, and whoever waited for it waited for ever."""
    now_s = time.time()
    inner = [msgspec.msgpack.encode([now_s, now_s + 60, each, b""]) for each in (b"\xc1", b"", b"\xc0")]
    values = [msgspec.msgpack.encode([each, key_of("thief").sign("announcement", each)]) for each in inner]
    assert await network.store(values) == [False] * 3
    assert await network.everybody_sees()


async def test_a_dictionary_without_an_end_blinds_nobody_while_its_node_lives_and_after(network):
    """An empty one that ends at infinity was the latest of all, and stayed so after its node was gone."""
    value = MSGPackSerializer.dumps(DictionaryDHTValue())

    def answer(request: Any) -> dht_pb2.FindResponse:
        result = dht_pb2.FindResult(type=dht_pb2.FOUND_DICTIONARY, value=value, expiration_time=float("inf"))
        return dht_pb2.FindResponse(results=[result] * len(request.keys))

    async with malicious_node(network.peers) as (malicious, _):
        malicious.answer = answer
        for directory in (network.server, network.client):
            directory.node.protocol.routing_table.add_or_update_node(node_id_of(malicious.peer), malicious.peer)
        assert await network.everybody_sees()
        assert len(malicious.fetched) >= 2, "it was asked"
    assert await network.everybody_sees()


async def test_a_flood_of_records_leaves_newcomers_a_view(network):
    """1,200 large records in a second: the answer grew beyond what the library carries, and newcomers saw nobody."""
    flood = [signed(f"flood {number}", model="m", public_name="x" * 64) for number in range(1200)]
    assert await network.store(flood) == [False] * 1200, "their owners are looked for first"
    protocol = network.server.node.protocol
    assert 0 < len(protocol._to_reach) <= MAX_TO_REACH
    now_s, key = time.time(), Shard("m", 0).key
    for data in flood:  # as if all these could have been reached
        protocol.store.put(ROOT, protocol.opener.open(data, now_s), "127.0.0.0/24", now_s)
    assert len(protocol.store.get(key, now_s)) == SHARD_RECORDS
    assert await network.everybody_sees()
