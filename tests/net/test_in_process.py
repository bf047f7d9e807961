"""The network inside one process: who reaches whom, and what happens when a peer goes."""

import asyncio

import msgspec
import pytest

from petals_tune.errors import ConnectionLost
from petals_tune.net.in_process import InProcessDirectory, InProcessNetwork
from petals_tune.net.transport import Connection
from petals_tune.wire.span import BlockSpan
from tests.net.played_peer import RECORD
from tests.raising import raises

ECHO, OTHER = "/echo", "/other"


async def echo(connection: Connection) -> None:
    try:
        while True:
            await connection.write(await connection.read_exactly(1))
    except ConnectionLost:
        connection.close()


@pytest.fixture
async def network() -> InProcessNetwork:
    network = InProcessNetwork()
    await network.peer("b").transport.accept(ECHO, echo)
    return network


async def test_a_peer_is_dialled_by_its_id_and_learns_who_dialled(network):
    callers = []

    async def note(connection: Connection) -> None:
        callers.append(connection.peer)
        await echo(connection)

    await network.peer("b").transport.accept(OTHER, note)
    for name in ("a", "c"):
        connection = await network.peer(name).transport.dial("b", ["/ip4/10.0.0.5/tcp/1"], OTHER)
        assert connection.peer == "b"
        await connection.write(b"x")
        assert await connection.read_exactly(1) == b"x"
    assert callers == ["a", "c"]


@pytest.mark.parametrize(("peer", "protocol"), [("nobody", ECHO), ("b", OTHER), ("a", ECHO)])
async def test_who_is_not_there_or_does_not_know_the_protocol_cannot_be_dialled(network, peer, protocol):
    with raises(ConnectionLost, peer=peer):
        await network.peer("a").transport.dial(peer, (), protocol)


async def test_a_peer_that_is_removed_breaks_its_connections_of_both_directions_and_no_other(network):
    await network.peer("c").transport.accept(ECHO, echo)
    to_b = await network.peer("a").transport.dial("b", (), ECHO)
    from_b = await network.peer("b").transport.dial("c", (), ECHO)
    to_c = await network.peer("a").transport.dial("c", (), ECHO)
    network.remove("b")
    for connection, peer in ((to_b, "b"), (from_b, "c")):
        with raises(ConnectionLost, peer=peer):
            await connection.read_exactly(1)
    with raises(ConnectionLost, peer="b"):
        await network.peer("a").transport.dial("b", (), ECHO)
    await to_c.write(b"x")
    assert await to_c.read_exactly(1) == b"x"
    await network.peer("b").transport.accept(ECHO, echo)
    again = await network.peer("a").transport.dial("b", (), ECHO)
    await again.write(b"y")
    assert await again.read_exactly(1) == b"y"


async def test_a_network_that_is_closed_serves_nothing_any_more(network):
    await network.peer("a").transport.dial("b", (), ECHO)
    serving = list(network.find("b").serving)
    assert len(serving) == 1
    await network.close()
    assert all(task.done() for task in serving)


async def test_who_is_served_to_the_end_is_forgotten(network):
    connection = await network.peer("a").transport.dial("b", (), ECHO)
    (serving,) = network.find("b").serving
    connection.close()
    await serving
    await asyncio.sleep(0)
    assert not network.find("b").serving


WHOLE = BlockSpan(0, 4)


async def test_a_directory_shows_who_is_there_who_loads_and_who_left():
    directory = InProcessDirectory()
    assert (await directory.snapshot(RECORD.model, WHOLE)).servers == ()
    first, second, loads = (
        msgspec.structs.replace(RECORD, peer=peer, blocks=BlockSpan(start, 4), state=state)
        for peer, start, state in (("x", 0, "online"), ("w", 2, "online"), ("v", 1, "joining"))
    )
    for record in (second, loads, first):
        await directory.announce(record, lasts_s=60)
    await directory.announce(msgspec.structs.replace(RECORD, peer="expired"), lasts_s=0)
    snapshot = await directory.snapshot(RECORD.model, WHOLE)
    assert (snapshot.servers, snapshot.joining, snapshot.left) == ((first, second), (loads,), frozenset())
    await directory.withdraw(first)
    snapshot = await directory.snapshot(RECORD.model, WHOLE)
    assert (snapshot.servers, snapshot.left) == ((second,), {"x"})
    assert (await directory.snapshot(RECORD.model, BlockSpan(0, 1))).servers == ()
    assert (await directory.snapshot("another model", WHOLE)).servers == ()
    assert await directory.find("w", RECORD.model, WHOLE) == second
    assert await directory.find("x", RECORD.model, WHOLE) is None
    assert await directory.models() == (second, loads)
