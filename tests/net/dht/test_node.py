"""Finding and storing over many real nodes, of which some are gone."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import pytest_asyncio
from hivemind.dht.routing import DHTID
from hivemind.p2p import PeerID

from petals_tune.errors import ConnectionLost
from petals_tune.net.dht.directory import DhtDirectory
from petals_tune.net.dht.keys import INDEX, Spot, key_at
from petals_tune.net.dht.node import NEAREST, PATIENCE_S, REPLICAS, Search
from petals_tune.net.dht.protocol import node_id_of
from tests.net.dht.nodes import announced, key_of, node, record, signed
from tests.raising import raises

pytestmark = pytest.mark.asyncio(loop_scope="module")
NODES = REPLICAS + 2


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def nodes() -> AsyncIterator[list[DhtDirectory]]:
    async with AsyncExitStack() as stack:
        first, peers = await stack.enter_async_context(node(name="0"))
        others = [(await stack.enter_async_context(node(peers, name=str(n))))[0] for n in range(1, NODES)]
        yield [first, *others]


def key(name: str, spot: Spot) -> DHTID:
    found = key_at(record(name), spot)
    assert found is not None
    return DHTID.from_bytes(found)


def holders(nodes: list[DhtDirectory], where: DHTID) -> list[DhtDirectory]:
    return [each for each in nodes if each.node.protocol.store.get(where.to_bytes(), time.time())]


async def test_the_nearest_nodes_store_it_and_any_node_finds_it_there(nodes):
    spots = {spot: key("0", spot) for spot in (Spot(0, 0), Spot(0, 2), INDEX)}
    counts = await nodes[0].node.store(signed("0"), spots, timeout_s=10)
    assert counts == dict.fromkeys(spots, (REPLICAS, REPLICAS))
    for where in spots.values():
        by_distance = sorted(nodes, key=lambda each: where.xor_distance(each.node.protocol.node_id))
        assert set(holders(nodes, where)) == set(by_distance[:REPLICAS])
        for each in nodes:
            search = (await each.node.find([where], enough=2, timeout_s=10))[where]
            assert [found.record for found in search.found.values()] == [record("0")]


async def test_what_nobody_has_is_asked_of_the_nearest_alone(nodes):
    where = DHTID.generate("nothing is here")
    search = (await nodes[1].node.find([where], enough=2, timeout_s=10))[where]
    assert search.found == {}
    by_distance = sorted((each.node.protocol.node_id for each in nodes if each is not nodes[1]), key=where.xor_distance)
    assert search.answered >= set(by_distance[:NEAREST])


async def test_nodes_that_are_gone_are_replaced_by_the_next_nearest(nodes):
    async with AsyncExitStack() as stack:
        first, peers = await stack.enter_async_context(node(name="0 b"))
        leaving = AsyncExitStack()
        for number in range(6):
            await (leaving if number < 3 else stack).enter_async_context(node(peers, name=f"{number + 1} b"))
        spots = {Spot(0, 0): key("0 b", Spot(0, 0))}
        assert await first.node.store(signed("0 b"), spots, timeout_s=10) == {Spot(0, 0): (7, 7)}, "all there are"
        await leaving.aclose()
        for _ in range(4):  # each time those that did not answer are forgotten
            counts = await first.node.store(signed("0 b"), spots, timeout_s=10)
        assert counts == {Spot(0, 0): (4, 4)}, "four nodes are left"


async def test_a_node_that_is_nearer_than_those_that_are_known_is_noticed_when_it_is_met(nodes):
    """Strangers that come to hide a key are found out at the next announcement, not two minutes later."""
    where = key("8", Spot(0, 9))
    await nodes[8].node.store(signed("8"), {Spot(0, 9): where}, timeout_s=10)
    assert nodes[8].node._is_fresh(where)
    strangers = (PeerID.from_base58(key_of(f"nearer {number}").peer) for number in range(200))
    stranger = min(strangers, key=lambda peer: where.xor_distance(node_id_of(peer)))
    nodes[8].node.protocol.routing_table.add_or_update_node(node_id_of(stranger), stranger)
    assert not nodes[8].node._is_fresh(where)
    await nodes[8].node.protocol.update_routing_table(None, stranger, responded=False)
    assert nodes[8].node._is_fresh(where)


async def test_nodes_around_that_are_gone_are_forgotten(nodes):
    async with node(name="0 c") as (first, peers):
        async with node(peers, name="1 c"):
            assert first.node.others == 1
        await first.node.look_around()
        assert first.node.others == 0


async def test_who_asks_one_node_gets_what_that_one_has(nodes):
    where = key("5", Spot(0, 4))
    await nodes[5].node.store(signed("5"), {Spot(0, 4): where}, timeout_s=10)
    for each in nodes[:3]:
        found = await nodes[4].node.read_at([key_of(str(nodes.index(each))).peer], [where])
        has = bool(each.node.protocol.store.get(where.to_bytes(), time.time()))
        own = nodes[4].node.protocol.store.get(where.to_bytes(), time.time())
        assert [one.record for one in found[where]] == [record("5")] * (len(own) + has)


async def test_a_network_without_anybody_is_not_joined(nodes):
    peer = key_of("nobody").peer
    with raises(ConnectionLost):
        await nodes[0].node._bootstrap([PeerID.from_base58(peer)])


def search_of(distances: list[int], *, enough: int | None = 2) -> Search:
    return Search(DHTID(0), enough, {DHTID(each): f"peer {each}" for each in distances})


async def test_a_search_for_nodes_asks_the_nearest_first_and_few_at_a_time():
    search, chance = search_of([9, 1, 5, 3, 7], enough=None), random.Random(0)
    assert search.next(chance) == [1, 3, 5]
    search.asked |= {DHTID(1), DHTID(3), DHTID(5)}
    search.waiting |= {DHTID(1), DHTID(3), DHTID(5)}
    assert search.next(chance) == []
    search.waiting.clear()
    search.answered.add(DHTID(1))  # 3 and 5 were silent
    assert search.next(chance) == [7, 9]


async def test_a_search_for_announcements_asks_any_of_those_that_should_hold_them():
    distances = [*range(1, 2 * REPLICAS)]
    asked = [search_of(distances).next(random.Random(seed)) for seed in range(100)]
    assert {len(each) for each in asked} == {2}, "as many as are enough"
    assert {node for each in asked for node in each} == {*range(1, REPLICAS + 1)}
    search = search_of(distances)
    search.asked |= {DHTID(each) for each in range(2, REPLICAS + 1)}
    search.answered |= search.asked
    assert search.next(random.Random(0)) == [1], "the others that are near were asked"


async def test_a_search_ends_with_enough_holders_and_keeps_the_latest_of_each_peer():
    search, chance = search_of([1, 2, 3]), random.Random(0)
    old, new = announced("a"), announced("a", issued_s=1010)
    for found in ([new], [], [old]):
        assert search.next(chance)
        search.add(found)
    assert search.next(chance) == []
    assert search.found == {new.peer: new}


async def test_a_search_waits_a_second_for_others_once_something_was_found(monkeypatch):
    """A node may name eight that do not exist, each of which would be waited for."""
    now_s = 100.0
    monkeypatch.setattr("petals_tune.net.dht.node.awake_s", lambda: now_s)
    search, nodes_only = search_of([1, 2, 3]), search_of([1, 2, 3], enough=None)
    search.ends_s = nodes_only.ends_s = now_s + 4
    search.add([announced("a")])
    nodes_only.add([announced("a")])
    assert (search.ends_s, nodes_only.ends_s) == (now_s + PATIENCE_S, now_s + 4)
    assert len(search.next(random.Random(0))) == 2
    now_s += PATIENCE_S
    assert search.next(random.Random(0)) == []
    assert nodes_only.next(random.Random(0)) != []


async def test_a_node_that_is_silent_is_passed_over_though_nobody_waited_for_it(nodes, monkeypatch):
    """The search is over before the answer is due."""
    monkeypatch.setattr("petals_tune.net.dht.node.PATIENCE_S", 0.0)
    where = key("6", Spot(0, 7))
    await nodes[6].node.store(signed("6"), {Spot(0, 7): where}, timeout_s=10)
    strangers = (PeerID.from_base58(key_of(f"nobody {number}").peer) for number in range(200))
    stranger = min(strangers, key=lambda peer: where.xor_distance(node_id_of(peer)))
    reader, is_over = nodes[7].node, asyncio.Event()
    call_find = reader.protocol.call_find

    async def held_find(peer: PeerID, *args: Any, **given: Any) -> Any:
        if peer != stranger:
            return await call_find(peer, *args, **given)
        await is_over.wait()
        return None

    class NearestFirst(random.Random):
        def sample(self, population: Any, k: int, **_: Any) -> Any:
            return list(population)[:k]

    monkeypatch.setattr(reader, "_chance", NearestFirst())
    monkeypatch.setattr(reader.protocol, "call_find", held_find)
    holder = next(each.node.protocol.p2p.peer_id for each in holders(nodes, where) if each is not nodes[7])
    monkeypatch.setattr(reader, "_known_near", lambda key: {node_id_of(peer): peer for peer in (stranger, holder)})
    search = (await reader.find([where], enough=2, timeout_s=10))[where]
    assert search.found.keys() == {key_of("6").peer}
    assert node_id_of(stranger) in search.waiting
    assert stranger not in reader._silent
    is_over.set()
    async with asyncio.timeout(30):
        while stranger not in reader._silent:
            await asyncio.sleep(0.05)


async def test_node_ids_are_spread():
    ids = sorted(node_id_of(PeerID.from_base58(key_of(str(number)).peer)) for number in range(64))
    assert len({each >> 157 for each in ids}) == 8
