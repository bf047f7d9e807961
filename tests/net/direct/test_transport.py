"""When a connection is direct, and when it is the daemon's stream: whichever it is, it works."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest

from petals_tune.errors import ConnectionLost
from petals_tune.net.address_policy import AddressPolicy
from petals_tune.net.direct import transport as direct
from petals_tune.net.direct.listener import Listener
from petals_tune.net.direct.records import new_key
from petals_tune.net.direct.transport import PROTOCOL, Answer, DirectTransport, Question
from petals_tune.net.hivemind_p2p import LOOPBACK
from petals_tune.net.in_process import InProcessNetwork
from petals_tune.net.members import Members
from petals_tune.net.peer import joined
from petals_tune.net.question import read_message, write_message
from petals_tune.net.transport import Connection
from petals_tune.wire.signing import SigningKey
from petals_tune.wire.tokens import issue
from tests.net.direct.daemons import PlayedDaemon
from tests.net.direct.pairs import RawEnd
from tests.raising import raises

ECHO = "/echo"
OWNER = SigningKey.new()
LONG_S = 10.0


class Peers:
    """Peer "guest", which dials, and others that it dials."""

    def __init__(self, stack: AsyncExitStack):
        self.network, self._stack = InProcessNetwork(), stack
        self.daemon = PlayedDaemon(self.network, "guest")
        self.guest = DirectTransport(self.daemon)
        self.accepted: list[Connection] = []

    async def host(self, peer: str = "host", *, listens: bool = True, **options: Any) -> Listener | None:
        """Start peer `peer`, which echoes."""
        listener = None
        if listens:
            listener = await Listener.start(["127.0.0.1"], 0)
            self._stack.callback(listener.close)
        await DirectTransport(PlayedDaemon(self.network, peer), listener=listener, **options).accept(ECHO, self.echo)
        return listener

    async def answering(self, answer: Callable[[Connection, Question], Awaitable[None]], peer: str = "host") -> None:
        """A peer that serves streams as any other one, and questions by `answer`."""

        async def serve(stream: Connection) -> None:
            await answer(stream, await read_message(stream, Question))

        await self.host(peer, listens=False)
        await self.network.peer(peer).transport.accept(PROTOCOL, serve)

    async def echo(self, connection: Connection) -> None:
        self.accepted.append(connection)
        try:
            while True:
                await connection.write(await connection.read_exactly(1))
        except ConnectionLost:
            connection.close()

    async def is_direct(self, peer: str = "host") -> bool:
        """Whether a new connection to `peer`, which has to work, is direct."""
        connection = await self.guest.dial(peer, ["/ip4/127.0.0.1/tcp/1"], ECHO)
        self._stack.callback(connection.abort)
        await connection.write(b"x")
        assert await asyncio.wait_for(connection.read_exactly(1), LONG_S) == b"x"
        assert connection.peer == peer
        return connection.direct

    @property
    def questions(self) -> int:
        """How often the guest has asked for a direct connection."""
        return sum(protocol == PROTOCOL for _, protocol in self.daemon.dialled)


@pytest.fixture
async def peers() -> AsyncIterator[Peers]:
    async with AsyncExitStack() as stack:
        peers = Peers(stack)
        yield peers
        await peers.network.close()


async def test_a_peer_that_can_be_dialled_is_and_both_ends_know_each_other(peers):
    await peers.host()
    assert await peers.is_direct()
    (accepted,) = peers.accepted
    assert (accepted.peer, accepted.direct) == ("guest", True)
    assert await peers.is_direct()


async def test_through_a_relay_all_is_the_daemons(peers):
    await peers.host()
    peers.daemon.seen_at = None
    assert not await peers.is_direct()
    assert peers.questions == 0


async def test_what_the_policy_refuses_is_not_dialled(peers):
    """An open swarm of public addresses, and a peer that the daemon sees on this machine."""
    listener = await peers.host()
    listener.enter = None  # whoever connects is an error
    peers.daemon.policy = AddressPolicy()
    assert not await peers.is_direct()


async def test_only_the_address_of_the_peer_is_dialled_whatever_it_answers(peers):
    await peers.host()  # at 127.0.0.1
    peers.daemon.seen_at = "127.0.0.2"
    assert not await peers.is_direct()
    assert not hasattr(Answer(port=1, key=new_key()), "host")


async def test_one_that_accepts_none_is_asked_once_in_a_while(peers, monkeypatch):
    await peers.host(listens=False)
    await peers.host("other")
    assert [await peers.is_direct() for _ in range(3)] == [False] * 3
    assert peers.questions == 1
    assert await peers.is_direct("other"), "that is another peer"
    await peers.host()
    assert not await peers.is_direct()
    now_s = direct.time.monotonic()
    monkeypatch.setattr(direct.time, "monotonic", lambda: now_s + direct.AVOID_S)
    assert await peers.is_direct()


async def test_peers_are_remembered_in_bounds(peers, monkeypatch):
    monkeypatch.setattr(direct, "MAX_AVOIDED", 2)
    for peer in ("a", "b", "c"):
        await peers.host(peer, listens=False)
        assert not await peers.is_direct(peer)
    assert len(peers.guest._avoided) == 2


async def foreign(behaviour: str) -> tuple[asyncio.Server, list[RawEnd]]:
    """A service of somebody else at 127.0.0.1."""
    ends: list[RawEnd] = []

    class Service(RawEnd):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            ends.append(self)
            if behaviour == "greets":
                self.transport.write(b"220 mail.example.org ESMTP\r\n" * 20)
            elif behaviour == "hangs up":
                self.transport.abort()

    return await asyncio.get_running_loop().create_server(Service, "127.0.0.1", 0), ends


@pytest.mark.parametrize("behaviour", ["greets", "hangs up", "says nothing"])
async def test_the_port_of_a_foreign_service_costs_a_moment_and_it_is_sent_no_byte_of_the_peers_choice(
    peers, monkeypatch, behaviour
):
    monkeypatch.setattr(direct, "DIAL_S", 0.1)
    service, ends = await foreign(behaviour)
    asked = []

    async def answer(stream: Connection, question: Question) -> None:
        asked.append(question)
        await write_message(stream, Answer(port=service.sockets[0].getsockname()[1], key=new_key()))

    await peers.answering(answer)
    assert not await peers.is_direct()
    await asyncio.wait_for(ends[0].ended.wait(), LONG_S)
    assert bytes(ends[0].received[:16]) in (b"", asked[0].ticket)
    assert len(ends[0].received) <= 16 + 4 + 16 + 16
    service.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"\x00\x00\x00\x05\xffabcd",
        b"\xff\xff\xff\xff",
        b"",
        *(
            len(body := msgspec.msgpack.encode(each)).to_bytes(4, "big") + body
            for each in (
                {"port": 0, "key": bytes(32)},
                {"port": 65536, "key": bytes(32)},
                {"port": 5, "key": bytes(31)},
                {"port": 5, "key": bytes(32), "host": "10.0.0.1"},
            )
        ),
    ],
)
async def test_an_answer_that_is_none(peers, answer):
    async def say(stream: Connection, question: Question) -> None:
        await stream.write(answer)
        stream.close()

    await peers.answering(say)
    assert not await peers.is_direct()


@pytest.mark.parametrize("where", ["answers nothing", "listens and does not accept"])
async def test_silence_costs_a_moment(peers, monkeypatch, where):
    monkeypatch.setattr(direct, "DIAL_S", 0.1)
    silent = socket.create_server(("127.0.0.1", 0))

    async def answer(stream: Connection, question: Question) -> None:
        if where != "answers nothing":
            await write_message(stream, Answer(port=silent.getsockname()[1], key=new_key()))

    await peers.answering(answer)
    assert not await peers.is_direct()
    silent.close()


async def test_another_key_than_the_one_that_was_answered(peers):
    """Somebody between the two peers, at the port that was answered."""
    listener = await peers.host("behind")

    async def answer(stream: Connection, question: Question) -> None:
        async def serve(connection: Connection) -> None:
            raise AssertionError("nobody is served")

        listener.expect(
            question.ticket,
            direct.Expected(peer="guest", remote_address="", sends=new_key(), receives=new_key(), serve=serve),
        )
        await write_message(stream, Answer(port=listener.port, key=new_key()))

    await peers.answering(answer)
    assert not await peers.is_direct()


async def test_where_nobody_is_reached_the_error_is_the_daemons(peers):
    await peers.host()
    peers.daemon.unreachable = True
    with raises(ConnectionLost, peer="host"):
        await peers.guest.dial("host", ["/ip4/127.0.0.1/tcp/1"], ECHO)
    assert peers.daemon.dialled == []
    peers.daemon.unreachable = False
    with raises(ConnectionLost, peer="host"):
        await peers.guest.dial("host", (), "/another")


async def test_after_a_cut_the_daemon_is_used_and_after_an_end_the_direct_way_again(peers):
    await peers.host()
    assert await peers.is_direct()
    peers.accepted[0].close()
    assert await peers.is_direct(), "the other end closed it as it may"
    connection = await peers.guest.dial("host", (), ECHO)
    await connection.write(b"x")
    await connection.read_exactly(1)
    reading = asyncio.create_task(connection.read_exactly(100))
    await asyncio.sleep(0)
    peers.accepted[-1]._transport.write(b"\0\0\0\x64 half of a")  # and no more of this record
    peers.accepted[-1].close()
    with raises(ConnectionLost, peer="host"):
        await asyncio.wait_for(reading, LONG_S)
    assert not await peers.is_direct()


async def test_a_forwarded_port_is_announced(peers):
    listener = await peers.host(announced_port=4)
    ports = []

    async def note(self: DirectTransport, peer: str, question: Question) -> Answer:
        ports.append((await ask(self, peer, question)).port)
        return Answer(port=listener.port, key=new_key())

    ask = DirectTransport._ask
    peers.guest._ask = note.__get__(peers.guest)
    await peers.is_direct()
    assert ports == [4]


async def test_too_many_questions_at_once_are_not_answered(peers, monkeypatch):
    monkeypatch.setattr(direct, "AT_ONCE", 1)
    await peers.host()
    waiting = await peers.daemon.dial("host", (), PROTOCOL)  # asks nothing
    await asyncio.sleep(0)
    assert not await peers.is_direct()
    waiting.close()


def member(identity: SigningKey) -> Members:
    token = issue(OWNER, name="ada", peer=identity.peer, hosts=True, expires_s=2**39)
    return Members(OWNER.public, identity, lambda _: token)


async def test_a_private_swarm_answers_members_alone(peers):
    guest, host = SigningKey.new(), SigningKey.new()
    listener = await peers.host(members=member(host))
    assert not await peers.is_direct(), "no token"
    for holder, expected in ((guest, True), (SigningKey.new(), False)):  # the second one's token is of somebody else
        daemon = PlayedDaemon(peers.network, holder.peer if expected else "thief")
        peers.guest = DirectTransport(daemon, member(guest))
        assert await peers.is_direct() is expected
        assert not listener._expected


async def test_over_real_daemons():
    """The server is seen at the address where it listens."""
    accepted = asyncio.get_running_loop().create_future()

    async def serve(connection: Connection) -> None:
        accepted.set_result(connection)
        await connection.write(await connection.read_exactly(1))

    options = direct.DirectOptions()
    async with (
        joined([], host_maddrs=[LOOPBACK], direct=options) as server,
        joined(server.addresses, listens=False, direct=options) as client,
    ):
        await server.transport.accept(ECHO, serve)
        connection = await client.transport.dial(server.id, server.addresses, ECHO)
        await connection.write(b"x")
        assert await connection.read_exactly(1) == b"x"
        assert (connection.direct, connection.peer) == (True, server.id)
        assert (await accepted).peer == client.id
        stream = await client.transport.daemon.dial(server.id, (), PROTOCOL)
        await write_message(stream, Question(protocol="/unknown", ticket=bytes(16), key=new_key()))
        with raises(ConnectionLost, peer=server.id):
            await asyncio.wait_for(read_message(stream, Answer), LONG_S)
        connection.close()
