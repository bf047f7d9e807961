"""Real DHT nodes on 127.0.0.1: a server that announces, and a client that looks."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import pytest
import pytest_asyncio
from hivemind.dht.node import DHTNode
from hivemind.utils.timed_storage import get_dht_time

from petals_tune.swarm.directory import Directory
from petals_tune.swarm.p2p import start_dht, start_p2p, stop_p2p
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


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """Of a swarm that this test has for itself."""
    return request.node.name


@pytest_asyncio.fixture(scope="module", loop_scope="module")
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
            await stop_p2p(client_p2p)
    finally:
        await stop_p2p(server_p2p)


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await holds():
            await asyncio.sleep(0.05)


async def test_what_servers_announce_is_seen_in_the_order_of_the_blocks_until_they_withdraw(nodes, name):
    server, client = nodes
    directory, view = Directory(server, name), Directory(client, name)
    assert (await view.snapshot()).servers == ()
    for announced in (record("c", 4, 8), record("a"), record("b")):
        await directory.announce(announced, lasts_s=60)
    assert [seen.peer for seen in (await view.snapshot()).servers] == ["a", "b", "c"]
    assert (await view.snapshot()).servers[0] == record("a")
    await directory.withdraw(record("b"))
    assert [seen.peer for seen in (await view.snapshot()).servers] == ["a", "c"]


async def test_a_server_that_loads_is_seen_by_other_servers_and_sent_no_clients(nodes, name):
    server, client = nodes
    joining = msgspec.structs.replace(record("a"), state="joining")
    directory, view = Directory(server, name), Directory(client, name)
    await directory.announce(joining, lasts_s=60)
    seen = await view.snapshot()
    assert (seen.servers, seen.joining) == ((), (joining,))
    await directory.announce(record("a"), lasts_s=60)
    seen = await view.snapshot()
    assert (seen.servers, seen.joining) == ((record("a"),), ())


async def test_a_server_that_starts_again_under_its_address_is_seen(nodes, name):
    server, client = nodes
    before = Directory(server, name)
    await before.announce(record("a"), lasts_s=60)
    await before.withdraw(record("a"))
    assert (await Directory(client, name).snapshot()).servers == ()
    await Directory(server, name).announce(
        record("a", 2, 6), lasts_s=60 + 3
    )  # as if 3 s later: no server starts faster
    assert (await Directory(client, name).snapshot()).servers == (record("a", 2, 6),)


async def test_an_announcement_that_the_dht_does_not_take_is_not_lost_without_a_word(nodes, name, caplog):
    server, _ = nodes
    await Directory(server, name).announce(record("a"), lasts_s=-60)  # as from a machine whose clock is behind
    assert "did not take this server's announcement" in caplog.text


async def test_an_announcement_that_is_not_renewed_ends_by_itself(nodes, name):
    server, client = nodes
    await Directory(server, name).announce(record("a"), lasts_s=1)

    async def gone() -> bool:
        return (await Directory(client, name).snapshot()).servers == ()

    await eventually(gone)


async def test_a_renewal_replaces_the_record(nodes, name):
    server, client = nodes
    directory = Directory(server, name)
    await directory.announce(record("a"), lasts_s=60)
    await directory.announce(record("a", 2, 6), lasts_s=60)
    assert [seen.blocks for seen in (await Directory(client, name).snapshot()).servers] == [BlockSpan(2, 6)]


async def test_records_that_are_malformed_or_speak_for_another_peer_are_left_out(nodes, name):
    server, client = nodes
    key, until = dht_key(name), get_dht_time() + 60
    await Directory(server, name).announce(record("honest"), lasts_s=60)
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
    assert (await Directory(client, name).snapshot()).servers == (record("honest"),)


async def test_a_value_where_records_should_be_is_an_empty_swarm(nodes, name):
    server, client = nodes
    assert await server.store(dht_key(name), b"no dictionary", get_dht_time() + 60)
    assert (await Directory(client, name).snapshot()).servers == ()


async def test_swarms_of_other_names_do_not_see_each_other(nodes):
    server, client = nodes
    await Directory(server, "one").announce(record("a"), lasts_s=60)
    assert (await Directory(client, "other").snapshot()).servers == ()
    assert (await Directory(client, "one").snapshot()).servers == (record("a"),)
