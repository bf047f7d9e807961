"""Real DHT nodes on 127.0.0.1: a server that announces, and a client that looks."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import pytest_asyncio
from hivemind.dht.node import DHTNode
from hivemind.utils.timed_storage import get_dht_time

from petals_tune.swarm.directory import Directory
from petals_tune.swarm.p2p import start_dht, start_p2p
from petals_tune.wire.records import ServerRecord, dht_key, encode_record
from petals_tune.wire.span import BlockSpan


def record(peer: str, start: int = 0, stop: int = 4) -> ServerRecord:
    return ServerRecord(
        peer=peer,
        addresses=(f"/ip4/127.0.0.1/tcp/1/p2p/{peer}",),
        model="digest",
        model_name="tiny",
        blocks=BlockSpan(start, stop),
        total_blocks=8,
        quantization="none",
        dtype="float32",
    )


@pytest_asyncio.fixture
async def nodes() -> AsyncIterator[tuple[DHTNode, DHTNode]]:
    """A server's node and a client's."""
    server_p2p = await start_p2p()
    try:
        server = await start_dht(server_p2p, (), client_mode=False)
        peers = [str(address) for address in await server_p2p.get_visible_maddrs()]
        client_p2p = await start_p2p(peers, listens=False)
        try:
            client = await start_dht(client_p2p, peers, client_mode=True)
            yield server, client
            await client.shutdown()
            await server.shutdown()
        finally:
            await client_p2p.shutdown()
    finally:
        await server_p2p.shutdown()


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await holds():
            await asyncio.sleep(0.05)


async def test_what_servers_announce_is_seen_in_the_order_of_the_blocks_until_they_withdraw(nodes):
    server, client = nodes
    directory, view = Directory(server), Directory(client)
    assert (await view.snapshot()).servers == ()
    for announced in (record("c", 4, 8), record("a"), record("b")):
        await directory.announce(announced, lasts_s=60)
    assert [seen.peer for seen in (await view.snapshot()).servers] == ["a", "b", "c"]
    assert (await view.snapshot()).servers[0] == record("a")
    await directory.withdraw(record("b"))
    assert [seen.peer for seen in (await view.snapshot()).servers] == ["a", "c"]


async def test_a_withdrawal_outlives_the_announcement_and_a_new_one_follows_it(nodes):
    server, client = nodes
    directory, view = Directory(server), Directory(client)
    await directory.announce(record("a"), lasts_s=600)
    await directory.withdraw(record("a"))
    found = await client.get(dht_key("servers"), latest=True)
    assert found.value["a"].expiration_time > get_dht_time() + 600
    await directory.announce(record("a"), lasts_s=60)  # a restart under the same key
    assert (await view.snapshot()).servers == ()


async def test_an_announcement_that_is_not_renewed_ends_by_itself(nodes):
    server, client = nodes
    await Directory(server).announce(record("a"), lasts_s=1)

    async def gone() -> bool:
        return (await Directory(client).snapshot()).servers == ()

    await eventually(gone)


async def test_a_renewal_replaces_the_record(nodes):
    server, client = nodes
    directory = Directory(server)
    await directory.announce(record("a"), lasts_s=60)
    await asyncio.sleep(0)
    await directory.announce(record("a", 2, 6), lasts_s=60)
    assert [seen.blocks for seen in (await Directory(client).snapshot()).servers] == [BlockSpan(2, 6)]


async def test_records_that_are_malformed_or_speak_for_another_peer_are_left_out(nodes):
    server, client = nodes
    key, until = dht_key("servers"), get_dht_time() + 60
    await Directory(server).announce(record("honest"), lasts_s=60)
    foreign = {
        "thief": encode_record(record("honest", 0, 8)),
        "bytes": b"\xc1",
        "text": b"\x81\xa4peer\xa1\x80",
        "number": 7,
        "none": None,
        "old": msgspec.msgpack.encode({"peer": "old"}),
    }
    for peer, value in foreign.items():
        assert await server.store(key, value, until, subkey=peer)
    assert len((await client.get(key, latest=True)).value) == 1 + len(foreign), "they are there to be left out"
    assert (await Directory(client).snapshot()).servers == (record("honest"),)


async def test_a_value_where_records_should_be_is_an_empty_swarm(nodes):
    server, client = nodes
    assert await server.store(dht_key("servers"), b"no dictionary", get_dht_time() + 60)
    assert (await Directory(client).snapshot()).servers == ()


async def test_swarms_of_other_names_do_not_see_each_other(nodes):
    server, client = nodes
    await Directory(server, "one").announce(record("a"), lasts_s=60)
    assert (await Directory(client, "other").snapshot()).servers == ()
    assert (await Directory(client, "one").snapshot()).servers == (record("a"),)
