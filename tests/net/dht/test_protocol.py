"""What a node takes from strangers and believes of their answers, over real daemons."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgpack
import msgspec
import pytest
import pytest_asyncio
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer

from petals_tune.net.dht.directory import DhtDirectory
from petals_tune.net.dht.keys import INDEX, Shard, Spot
from petals_tune.net.dht.protocol import (
    MAX_KEYS,
    MAX_SPOTS,
    NEIGHBOURS,
    SAMPLE,
    AnnouncementProtocol,
    Found,
    node_id_of,
)
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan
from tests.net.dht.nodes import addresses, key_of, node, record, signed

pytestmark = pytest.mark.asyncio(loop_scope="module")
ROOT = Spot(0, 0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def nodes() -> AsyncIterator[tuple[DhtDirectory, DhtDirectory]]:
    """A server's node, and that of a client which is called "thief"."""
    async with node(name="a") as (server, peers), node(peers, client=True, name="thief") as (client, _):
        yield server, client


async def ask(thief: DhtDirectory, server: DhtDirectory, request: Any) -> Any:
    """Send `request` as it is; None where it is answered with an error."""
    stub = thief.node.protocol.get_stub(server.node.protocol.p2p.peer_id)
    method = stub.rpc_store if isinstance(request, dht_pb2.StoreRequest) else stub.rpc_find
    return await method(request, timeout=10)


async def stored(server: DhtDirectory, model: str) -> tuple[ServerRecord, ...]:
    return (await server.snapshot(model, BlockSpan(0, 24))).servers


async def eventually_stored(server: DhtDirectory, model: str) -> tuple[ServerRecord, ...]:
    async with asyncio.timeout(30):
        while not (found := await stored(server, model)):
            await asyncio.sleep(0.05)
    return found


async def test_each_announcement_of_a_request_is_checked_by_itself(nodes, model):
    server, thief = nodes
    good = signed("thief", model=model)
    values = [signed("b", by="thief", model=model), b"\xc1", good, good, good + b"x"]
    request = dht_pb2.StoreRequest(subkeys=[ROOT.encode(), ROOT.encode(), ROOT.encode(), b"", ROOT.encode()])
    request.values.extend(values)
    answer = await ask(thief, server, request)
    assert list(answer.store_ok) == [False, False, True, False, False]
    assert await stored(server, model) == (record("thief", model=model),)


async def test_who_speaks_for_another_is_believed_once_the_other_was_reached(nodes, model):
    server, thief = nodes
    async with node(await addresses(server), name="real") as (_, at):
        real = signed("real", model=model, addresses=tuple(at))
        invented = signed("invented", model=model)
        request = dht_pb2.StoreRequest(subkeys=[ROOT.encode()] * 2, values=[real, invented])
        assert list((await ask(thief, server, request)).store_ok) == [False, False], "not at once"
        assert [each.peer for each in await eventually_stored(server, model)] == [key_of("real").peer]
        async with asyncio.timeout(30):
            while server.node.protocol._to_reach:  # the other one is being dialled
                await asyncio.sleep(0.05)
        assert [each.peer for each in await stored(server, model)] == [key_of("real").peer]


async def test_a_node_that_joins_is_handed_what_it_should_store(nodes, model):
    """Its first node ends, and the newcomer has what was stored there."""
    async with node(name="first") as (_, peers), node(peers, name="server") as (server, addresses):
        there = record("server", model=model, addresses=tuple(addresses))
        await server.announce(there, lasts_s=60)
        async with node(peers, name="newcomer") as (newcomer, _):
            key = Shard(model, 0).key
            async with asyncio.timeout(30):
                while not newcomer.node.protocol.store.get(key, time.time()):
                    await asyncio.sleep(0.05)
            (found,) = newcomer.node.protocol.store.get(key, time.time())
            assert found.record == there


async def test_a_node_has_the_id_of_its_peer_and_no_other(nodes):
    server, thief = nodes
    table = server.node.protocol.routing_table
    for node_id in (DHTID.generate("next to a key").to_bytes(), b"short", bytes(200)):
        await ask(thief, server, dht_pb2.FindRequest(keys=[bytes(20)], peer=dht_pb2.NodeInfo(node_id=node_id)))
    await asyncio.sleep(0.2)
    assert thief.node.protocol.p2p.peer_id not in table
    async with node(await addresses(server), name="honest") as (honest, _):
        peer = honest.node.protocol.p2p.peer_id
        async with asyncio.timeout(30):
            while peer not in table:
                await asyncio.sleep(0.05)
        assert table.get(peer_id=peer) == node_id_of(peer) == honest.node.protocol.node_id


async def test_nodes_that_another_one_names_wrongly_are_not_asked(nodes, monkeypatch):
    _, client = nodes
    right, wrong = (PeerID.from_base58(key_of(name).peer) for name in ("right", "wrong"))

    async def answer(self: Any, request: Any, context: Any) -> dht_pb2.FindResponse:
        ids = [node_id_of(right).to_bytes(), DHTID.generate("near").to_bytes(), b"", bytes(20)]
        result = dht_pb2.FindResult(nearest_node_ids=ids, nearest_peer_ids=[right.to_bytes(), wrong.to_bytes()] * 2)
        return dht_pb2.FindResponse(results=[result])

    async with malicious(monkeypatch, client, "rpc_find", answer) as peer:
        found = await client.node.protocol.call_find(peer, [DHTID(0)])
        assert found == {DHTID(0): Found([], {node_id_of(right): right}, 0)}


def malicious(monkeypatch: pytest.MonkeyPatch, client: DhtDirectory, name: str, answer: Any) -> Any:
    """A node that answers as the test says, and that `client` is connected to."""

    @asynccontextmanager
    async def started() -> AsyncIterator[PeerID]:
        with monkeypatch.context() as patch:
            patch.setattr(AnnouncementProtocol, name, answer)
            entered = node(name="malicious")
            directory, at = await entered.__aenter__()
        try:
            assert await client.node.protocol.reach(key_of("malicious").peer, at) is not None
            yield directory.node.protocol.p2p.peer_id
        finally:
            await entered.__aexit__(None, None, None)

    return started()


async def test_a_request_is_bounded(nodes, model):
    server, thief = nodes
    own = signed("thief", model=model)
    answer = await ask(thief, server, dht_pb2.StoreRequest(subkeys=[ROOT.encode()] * 500, values=[own]))
    assert len(answer.store_ok) == MAX_SPOTS
    answer = await ask(thief, server, dht_pb2.FindRequest(keys=[bytes(20)] * 500))
    assert len(answer.results) == MAX_KEYS
    assert all(len(result.nearest_peer_ids) <= NEIGHBOURS for result in answer.results)
    answer = await ask(thief, server, dht_pb2.FindRequest(keys=[b"", bytes(19), bytes(300)]))
    assert [result.type for result in answer.results] == [dht_pb2.NOT_FOUND] * 3


async def test_what_plain_hivemind_would_decode_is_not_decoded(nodes, model, monkeypatch):
    """MessagePack full of unknown extensions, and whole dictionaries: the loop stood still for seconds there."""
    server, thief = nodes
    dictionary = DictionaryDHTValue()
    dictionary.store(key_of("thief").peer, b"value", time.time() + 60)
    decoded: list[bytes] = []
    monkeypatch.setattr(MSGPackSerializer, "loads", decoded.append)
    for value in (msgpack.packb([msgpack.ExtType(1, b"x")] * 100_000), MSGPackSerializer.dumps(dictionary)):
        request = dht_pb2.StoreRequest(
            keys=[bytes(20)], subkeys=[b""], values=[value], expiration_time=[float("inf")], in_cache=[True]
        )
        assert list((await ask(thief, server, request)).store_ok) == [False]
    assert decoded == []


async def test_the_index_takes_a_model_of_any_name_and_no_blocks_elsewhere(nodes, model):
    server, thief = nodes
    spots = [INDEX, Spot(0, 3), Spot(1, 0)]
    answer = await thief.node.protocol.call_store(
        server.node.protocol.p2p.peer_id, [signed("thief", model=model)], spots
    )
    assert answer == [True, True, False]
    assert [each.model for each in await thief.models() if each.model == model] == [model]


@pytest.mark.parametrize(
    "value",
    [
        b"\xc1",
        b"\x91\xc0",
        msgspec.msgpack.encode([b""] * 1000),
        msgspec.msgpack.encode({"a": 1}),
        msgpack.packb([msgpack.ExtType(1, b"x")] * 1000),
        bytes(2**18),
    ],
    ids=lambda value: f"{len(value)} bytes",
)
async def test_an_answer_that_is_malformed_is_empty_and_takes_no_other_with_it(nodes, model, monkeypatch, value):
    server, client = nodes
    await DhtDirectory(server.node, identity=key_of("a")).announce(record("a", model=model), lasts_s=60)

    async def answer(self: Any, request: Any, context: Any) -> dht_pb2.FindResponse:
        result = dht_pb2.FindResult(type=dht_pb2.FOUND_DICTIONARY, value=value, expiration_time=float("inf"))
        return dht_pb2.FindResponse(results=[result] * len(request.keys))

    async with malicious(monkeypatch, client, "rpc_find", answer) as peer:
        found = await client.node.protocol.call_find(peer, [DHTID.from_bytes(Shard(model, 0).key)])
        assert [shown.announcements for shown in found.values()] == [[]]
        client.node.protocol.routing_table.add_or_update_node(node_id_of(peer), peer)
        assert await stored(client, model) == (record("a", model=model),)
        await client.node.protocol.update_routing_table(None, peer, responded=False)


async def test_one_good_announcement_among_bad_ones_is_believed(nodes, model, monkeypatch):
    _, client = nodes
    good = signed("a", model=model)
    value = msgspec.msgpack.encode([b"\xc1", good[:-1], good, signed("b", by="c", model=model), b""])

    async def answer(self: Any, request: Any, context: Any) -> dht_pb2.FindResponse:
        return dht_pb2.FindResponse(results=[dht_pb2.FindResult(value=value)] * len(request.keys))

    async with malicious(monkeypatch, client, "rpc_find", answer) as peer:
        found = await client.node.protocol.call_find(peer, [DHTID(1)])
    assert [each.record for each in found[DHTID(1)].announcements] == [record("a", model=model)]


async def test_a_ping_that_is_answered_with_nonsense_counts_as_none(nodes, monkeypatch):
    """hivemind itself raises AssertionError there, in whoever joins or stays known."""
    _, client = nodes

    async def answer(self: Any, request: Any, context: Any) -> dht_pb2.PingResponse:
        return dht_pb2.PingResponse(peer=dht_pb2.NodeInfo(node_id=bytes([255]) * 40))

    async with malicious(monkeypatch, client, "rpc_ping", answer) as peer:
        assert await client.node.protocol.call_ping(peer) is None


async def test_of_many_announcements_a_node_shows_a_sample_and_says_how_many_it_has(nodes, model):
    server, client = nodes
    peer, key = server.node.protocol.p2p.peer_id, DHTID.from_bytes(Shard(model, 0).key)
    for number in range(20):
        assert server.node.protocol.put_own(ROOT, signed(f"{number} of many", model=model))
    shown = [(await client.node.protocol.call_find(peer, [key]))[key] for _ in range(2)]
    assert [(len(each.announcements), each.held) for each in shown] == [(SAMPLE, 20)] * 2
    assert {each.peer for each in shown[0].announcements} != {each.peer for each in shown[1].announcements}
    whole = (await client.node.protocol.call_find(peer, [key], whole=True))[key]
    assert (len({each.peer for each in whole.announcements}), whole.held) == (20, 20)
    none = (await client.node.protocol.call_find(peer, [key], nodes_only=True))[key]
    assert (none.announcements, none.held) == ([], 0)


@pytest.mark.parametrize("told", [float("nan"), float("inf"), -1.0, 1e300])
async def test_a_number_of_announcements_that_cannot_be_is_not_believed(nodes, model, monkeypatch, told):
    _, client = nodes

    async def answer(self: Any, request: Any, context: Any) -> dht_pb2.FindResponse:
        return dht_pb2.FindResponse(results=[dht_pb2.FindResult(expiration_time=told)] * len(request.keys))

    async with malicious(monkeypatch, client, "rpc_find", answer) as peer:
        assert (await client.node.protocol.call_find(peer, [DHTID(2)]))[DHTID(2)].held == 0
