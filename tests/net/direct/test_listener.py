"""The port for direct connections, and those who connect to it without being expected."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator

import pytest

from petals_tune.errors import ConfigError, ConnectionLost, ServerBusy
from petals_tune.net.direct import listener as listening
from petals_tune.net.direct.connection import DirectConnection
from petals_tune.net.direct.listener import Expected, Listener
from petals_tune.net.direct.records import new_key
from petals_tune.net.transport import Connection
from tests.net.direct.pairs import RawEnd
from tests.raising import raises

HERE = "127.0.0.1"
TICKET, OTHER = bytes(range(16)), bytes(16)
IN, OUT = new_key(), new_key()
LONG_S = 10.0


@pytest.fixture
async def served() -> list[Connection]:
    return []


@pytest.fixture
async def listener(served: list[Connection]) -> AsyncIterator[Listener]:
    """Expects peer "guest" with TICKET, and echoes what it sends."""
    listener = await Listener.start([HERE], 0)
    listener.expect(TICKET, expected(served))
    yield listener
    listener.close()


def expected(served: list[Connection], peer: str = "guest") -> Expected:
    async def echo(connection: Connection) -> None:
        served.append(connection)
        try:
            while True:
                await connection.write(await connection.read_exactly(1))
        except ConnectionLost:
            connection.close()

    return Expected(peer=peer, remote_address="/ip4/127.0.0.1/tcp/5", sends=OUT, receives=IN, serve=echo)


async def connect(listener: Listener, *first: bytes) -> RawEnd:
    """A TCP connection of anybody, who sends something `first`."""
    loop = asyncio.get_running_loop()
    _, end = await loop.create_connection(RawEnd, HERE, listener.port)
    for each in first:
        end.transport.write(each)
    return end


async def guest(listener: Listener, ticket: bytes = TICKET, *, key: bytes = IN) -> DirectConnection:
    """The connection of the one who is expected. Raises ConnectionLost where it is not greeted."""
    connection = DirectConnection("host", sends=key, receives=OUT)
    transport, _ = await asyncio.get_running_loop().create_connection(lambda: connection, HERE, listener.port)
    transport.write(ticket)
    await connection.write(ticket)
    async with asyncio.timeout(LONG_S):
        assert await connection.read_exactly(len(ticket)) == ticket
    return connection


async def works(connection: DirectConnection) -> bool:
    await connection.write(b"x")
    return await connection.read_exactly(1) == b"x"


async def test_who_is_expected_is_served_as_the_peer_that_asked(listener, served):
    connection = await guest(listener)
    assert await works(connection)
    assert [(each.peer, each.remote_address, each.direct) for each in served] == [
        ("guest", "/ip4/127.0.0.1/tcp/5", True)
    ]
    connection.close()


@pytest.mark.parametrize(
    "first",
    [OTHER, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01" + bytes(200), TICKET + bytes(300_000)],
    ids=["another ticket", "http", "tls", "the ticket and garbage"],
)
async def test_anything_else_is_hung_up_on_unanswered(listener, served, first):
    end = await connect(listener, first)
    await asyncio.wait_for(end.ended.wait(), LONG_S)
    assert end.received == b""
    assert served == []


@pytest.mark.parametrize(
    "first", [b"", TICKET[:5], TICKET, TICKET + b"\0\0"], ids=["nothing", "half", "ticket", "more"]
)
async def test_who_falls_silent_is_hung_up_on(listener, served, monkeypatch, first):
    monkeypatch.setattr(listening, "GREETING_S", 0.05)
    end = await connect(listener, first)
    await asyncio.wait_for(end.ended.wait(), LONG_S)
    assert end.received == b""
    assert served == []
    assert not listener._newcomers


async def test_a_ticket_is_good_once(listener, served):
    first = await guest(listener)
    with raises(ConnectionLost, peer="host"):
        await guest(listener)
    assert await works(first)
    assert len(served) == 1


async def test_a_ticket_without_the_key_is_worth_nothing(listener, served):
    """Somebody on the line reads the ticket, and is faster."""
    with raises(ConnectionLost, peer="host"):
        await guest(listener, key=new_key())
    assert served == []


async def test_a_ticket_expires(listener, served, monkeypatch):
    monkeypatch.setattr(listening, "TICKET_S", 0.01)
    listener.expect(OTHER, expected(served))
    while OTHER in listener._expected:
        await asyncio.sleep(0.01)
    with raises(ConnectionLost, peer="host"):
        await guest(listener, OTHER)
    assert listener._tickets == {"guest": 1}, "of the other ticket"


async def test_a_flood_of_strangers_takes_few_connections_and_who_is_expected_comes_in(listener, served, monkeypatch):
    monkeypatch.setattr(listening, "MAX_NEWCOMERS", 4)
    before = len(os.listdir("/proc/self/fd"))
    flood = [await connect(listener) for _ in range(20)]
    connection = await guest(listener)
    assert await works(connection)
    assert len(listener._newcomers) <= 4
    for end in flood[:15]:
        await asyncio.wait_for(end.ended.wait(), LONG_S)
    for end in flood:
        end.transport.abort()
    connection.abort()
    while listener._newcomers or listener._serving:
        await asyncio.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_tickets_are_limited_for_each_peer_and_in_all(listener, served, monkeypatch):
    monkeypatch.setattr(listening, "MAX_TICKETS_PER_PEER", 2)
    monkeypatch.setattr(listening, "MAX_TICKETS", 3)
    with raises(ServerBusy):
        listener.expect(TICKET, expected(served, "another, who guessed it"))
    listener.expect(b"2" * 16, expected(served))
    with raises(ServerBusy):
        listener.expect(b"3" * 16, expected(served))
    listener.expect(b"3" * 16, expected(served, "second"))
    with raises(ServerBusy):
        listener.expect(b"4" * 16, expected(served, "third"))
    await guest(listener)
    listener.expect(b"4" * 16, expected(served, "third"))


async def test_what_is_served_ends_with_the_port(listener, served):
    connection = await guest(listener)
    silent = await connect(listener)
    while not listener._newcomers:
        await asyncio.sleep(0.01)
    listener.close()
    with raises(ConnectionLost, peer="host"):
        await asyncio.wait_for(connection.read_exactly(1), LONG_S)
    await asyncio.wait_for(silent.ended.wait(), LONG_S)
    with pytest.raises(OSError, match=r"[Cc]onnect"):
        await connect(listener)
    while listener._serving:
        await asyncio.sleep(0.01)
    assert not listener._expected


async def test_one_port_of_several_hosts_and_one_that_is_taken():
    both = await Listener.start([HERE, "127.0.0.2"], 0)
    ports = {server.sockets[0].getsockname() for server in both._servers}
    assert ports == {(HERE, both.port), ("127.0.0.2", both.port)}
    with raises(ConfigError, key="swarm.direct_port", seen=both.port):
        await Listener.start([HERE], both.port)
    both.close()
    with raises(ConfigError, key="swarm.direct_port"):
        await Listener.start(["192.0.2.1"], 0)
    socket.create_server((HERE, both.port)).close()
