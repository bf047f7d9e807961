"""Real p2p daemons on 127.0.0.1: one is asked to dial the others."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest

from petals_tune.errors import ConnectionLost
from petals_tune.net import dial_back
from petals_tune.net.address_policy import AddressPolicy, Scope
from petals_tune.net.dial_back import PROTOCOL, Answer, DialBack, dial_all, is_dialable
from petals_tune.net.hivemind_p2p import HivemindTransport, host_of
from petals_tune.net.members import Members
from petals_tune.wire.signing import SigningKey
from petals_tune.wire.tokens import issue
from tests.raising import raises

OWNER = SigningKey.new()
HERE = AddressPolicy(narrowest=Scope.LOOPBACK)


@pytest.fixture
async def start() -> AsyncIterator[Callable]:
    """Starts a daemon; one that is given `answers` lets others ask it."""
    async with AsyncExitStack() as stack:

        async def started(
            *peers: str, answers: DialBack | None = None, **options
        ) -> tuple[HivemindTransport, tuple[str, ...]]:
            transport = await HivemindTransport.start(peers, **options)
            stack.push_async_callback(transport.stop)
            if answers is not None:
                await transport.accept(PROTOCOL, answers.serve)
            return transport, await transport.addresses()

        yield started


@pytest.fixture
async def listener() -> AsyncIterator[Callable]:
    """Starts something that is no libp2p peer: it sends `greeting` to whoever connects. Counts them."""
    servers = []

    async def opened(host: str, greeting: bytes) -> tuple[int, list[None]]:
        visits: list[None] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            visits.append(None)
            writer.write(greeting)
            writer.close()

        servers.append(await asyncio.start_server(serve, host, 0))
        return servers[-1].sockets[0].getsockname()[1], visits

    yield opened
    for server in servers:
        server.close()


def member(identity: SigningKey) -> Members:
    token = issue(OWNER, name="ada", peer=identity.peer, hosts=True, expires_s=2**39)
    return Members(OWNER.public, identity, lambda _: token)


async def test_a_peer_says_whether_it_can_dial_another(start):
    _, known = await start(answers=DialBack(None, HERE))
    newcomer, own = await start(*known)
    assert await is_dialable(newcomer, known, own, None) is True
    closed = "/ip4/127.0.0.1/tcp/1/p2p/" + newcomer.id
    assert await is_dialable(newcomer, known, [closed], None) is False
    assert await is_dialable(newcomer, known, [closed, *own], None) is True


async def test_the_address_of_a_router_is_believed_where_nobody_sees_it(start):
    _, known = await start(answers=DialBack(None, HERE))
    newcomer, _ = await start(*known)
    router = ["/ip4/10.0.0.5/tcp/31337"]
    assert await is_dialable(newcomer, known, router, None) is False
    assert await is_dialable(newcomer, known, router, None, given=True) is None
    assert await is_dialable(newcomer, known, ["/ip4/127.0.0.1/tcp/1"], None, given=True) is False


async def test_one_that_knows_no_such_question_says_nothing(start):
    _, known = await start()
    newcomer, own = await start(*known)
    assert await is_dialable(newcomer, known, own, None) is None


async def test_a_private_swarm_dials_members_alone(start):
    host, guest, stranger = SigningKey.new(), SigningKey.new(), SigningKey.new()
    _, known = await start(answers=DialBack(member(host), HERE), identity=host)
    newcomer, own = await start(*known, identity=guest)
    assert await is_dialable(newcomer, known, own, member(guest)) is True
    other, own = await start(*known, identity=stranger)
    assert await is_dialable(other, known, own, None) is None
    assert await is_dialable(other, known, own, member(guest)) is None  # a token of somebody else


async def test_nothing_but_the_host_that_asked_is_dialled(listener):
    port, visits = await listener("127.0.0.2", dial_back._GREETING)
    there = f"/ip4/127.0.0.2/tcp/{port}"
    assert await dial_all([there], host="127.0.0.1") == Answer(dialled=(), reached=())
    assert visits == []
    other = "/ip4/127.0.0.2/udp/1"
    assert await dial_all([other, there, "rubbish"], host="127.0.0.2") == Answer(
        dialled=(other, there), reached=(there,)
    )
    assert len(visits) == 1


async def test_in_a_public_swarm_no_local_service_is_dialled_for_one_who_asks_from_here(start, listener):
    port, visits = await listener("127.0.0.1", dial_back._GREETING)
    _, known = await start(answers=DialBack(None, AddressPolicy()))
    newcomer, _ = await start(*known)
    assert await is_dialable(newcomer, known, [f"/ip4/127.0.0.1/tcp/{port}"], None) is False
    assert visits == []


def test_who_asks_through_a_relay_has_no_host_of_its_own():
    relayed = "/ip4/127.0.0.1/tcp/4001/p2p/12D3KooWGRUaaqTyQ3mjBWbfu8yVaaWHXtmtzBqbLa9kGDGnkZBi/p2p-circuit"
    assert host_of("/ip4/127.0.0.1/tcp/4001") == "127.0.0.1"
    assert host_of(relayed) is None


@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n", b"\x13/multistream"])
async def test_what_is_no_libp2p_peer_does_not_count(listener, greeting):
    port, visits = await listener("127.0.0.1", greeting)
    assert (await dial_all([f"/ip4/127.0.0.1/tcp/{port}"], host="127.0.0.1")).reached == ()
    assert len(visits) == 1


async def test_one_that_lets_in_and_says_nothing_does_not_hold_up(listener, monkeypatch):
    monkeypatch.setattr(dial_back, "DIAL_S", 0.1)
    silent = await asyncio.start_server(lambda *_: asyncio.sleep(60), "127.0.0.1", 0)
    async with silent:
        port = silent.sockets[0].getsockname()[1]
        assert (await dial_all([f"/ip4/127.0.0.1/tcp/{port}"], host="127.0.0.1")).reached == ()


@pytest.mark.parametrize(
    "question", [b"rubbish!", b"\xff\xff\xff\xff", b"\x00\x00\x00\x01\x80", b"\x00\x00\x00\x05\xff"]
)
async def test_rubbish_ends_the_stream_and_the_next_question_is_answered(start, question):
    host, known = await start(answers=DialBack(None, HERE))
    newcomer, own = await start(*known)
    connection = await newcomer.dial(host.id, (), PROTOCOL)
    await connection.write(question)
    connection.finish()
    with raises(ConnectionLost, peer=host.id):
        await asyncio.wait_for(connection.read_exactly(1), 10)
    assert await is_dialable(newcomer, known, own, None) is True


async def test_only_a_few_are_dialled_at_once(start, monkeypatch):
    monkeypatch.setattr(dial_back, "AT_ONCE", 1)
    answers = DialBack(None, HERE)
    host, known = await start(answers=answers)
    newcomer, own = await start(*known)
    connection = await newcomer.dial(host.id, (), PROTOCOL)
    while not answers._under_way:
        await asyncio.sleep(0.01)
    assert await is_dialable(newcomer, known, own, None) is None
    connection.close()
    while answers._under_way:
        await asyncio.sleep(0.01)
    assert await is_dialable(newcomer, known, own, None) is True
