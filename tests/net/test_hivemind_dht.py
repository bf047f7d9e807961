"""Real DHT nodes on 127.0.0.1: a server that announces, and a client that looks."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from hivemind.dht.node import DHTNode
from hivemind.utils.timed_storage import get_dht_time

from petals_tune.errors import AccessDenied, ClockSkew, ServerUnreachable
from petals_tune.net.dht_auth import MembersOnly, SignedRecords
from petals_tune.net.hivemind_dht import HivemindDirectory
from petals_tune.net.hivemind_p2p import HivemindTransport
from petals_tune.net.members import Members
from petals_tune.wire.records import ServerRecord, dht_key, encode_record
from petals_tune.wire.signing import SigningKey
from petals_tune.wire.span import BlockSpan
from petals_tune.wire.tokens import issue
from tests.raising import raises


def key_of(name: str) -> SigningKey:
    """The identity of the server that a test calls so."""
    return SigningKey(name.encode().ljust(32)[:32])


def record(name: str, start: int = 0, stop: int = 4) -> ServerRecord:
    peer = key_of(name).peer
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
    async with AsyncExitStack() as stack:
        transport = await HivemindTransport.start()
        stack.push_async_callback(transport.stop)
        server = await HivemindDirectory.join(transport, (), client_mode=False)
        stack.push_async_callback(server.leave)
        peers = await transport.addresses()
        transport = await HivemindTransport.start(peers, listens=False)
        stack.push_async_callback(transport.stop)
        client = await HivemindDirectory.join(transport, peers, client_mode=True)
        stack.push_async_callback(client.leave)
        yield server.node, client.node


class Speaker(HivemindDirectory):
    """Announces as the server of one name; the nodes of all servers are one here."""

    def __init__(self, node: DHTNode, swarm: str, name: str):
        super().__init__(node, swarm)
        self._guard = SignedRecords(key_of(name))

    async def announce(self, announced: ServerRecord, *, lasts_s: float) -> None:
        self.node.protocol.record_validator = self._guard
        await super().announce(announced, lasts_s=lasts_s)


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await holds():
            await asyncio.sleep(0.05)


async def test_what_servers_announce_is_seen_in_the_order_of_the_blocks_until_they_withdraw(nodes, name):
    server, client = nodes
    speakers, view = {each: Speaker(server, name, each) for each in "abc"}, HivemindDirectory(client, name)
    records = {"c": record("c", 4, 8), "a": record("a"), "b": record("b", 1, 4)}
    assert (await view.snapshot()).servers == ()
    for each, announced in records.items():
        await speakers[each].announce(announced, lasts_s=60)
    assert (await view.snapshot()).servers == (records["a"], records["b"], records["c"])
    await speakers["b"].withdraw(records["b"])
    assert (await view.snapshot()).servers == (records["a"], records["c"])


async def test_a_server_that_loads_is_seen_by_other_servers_and_sent_no_clients(nodes, name):
    server, client = nodes
    joining = msgspec.structs.replace(record("a"), state="joining")
    directory, view = Speaker(server, name, "a"), HivemindDirectory(client, name)
    await directory.announce(joining, lasts_s=60)
    seen = await view.snapshot()
    assert (seen.servers, seen.joining) == ((), (joining,))
    await directory.announce(record("a"), lasts_s=60)
    seen = await view.snapshot()
    assert (seen.servers, seen.joining) == ((record("a"),), ())


async def test_a_server_that_starts_again_under_its_address_is_seen(nodes, name):
    server, client = nodes
    before = Speaker(server, name, "a")
    await before.announce(record("a"), lasts_s=60)
    await before.withdraw(record("a"))
    assert (await HivemindDirectory(client, name).snapshot()).servers == ()
    await Speaker(server, name, "a").announce(
        record("a", 2, 6), lasts_s=60 + 3
    )  # as if 3 s later: no server starts faster
    assert (await HivemindDirectory(client, name).snapshot()).servers == (record("a", 2, 6),)


async def test_an_announcement_that_the_dht_does_not_take_is_not_lost_without_a_word(nodes, name, caplog):
    server, _ = nodes
    await Speaker(server, name, "a").announce(record("a"), lasts_s=-60)  # as from a machine whose clock is behind
    assert "did not take this server's announcement" in caplog.text


async def test_an_announcement_that_is_not_renewed_ends_by_itself(nodes, name):
    server, client = nodes
    await Speaker(server, name, "a").announce(record("a"), lasts_s=1)

    async def gone() -> bool:
        return (await HivemindDirectory(client, name).snapshot()).servers == ()

    await eventually(gone)


async def test_a_renewal_replaces_the_record(nodes, name):
    server, client = nodes
    directory = Speaker(server, name, "a")
    await directory.announce(record("a"), lasts_s=60)
    await directory.announce(record("a", 2, 6), lasts_s=60)
    assert [seen.blocks for seen in (await HivemindDirectory(client, name).snapshot()).servers] == [BlockSpan(2, 6)]


async def test_records_that_are_malformed_or_speak_for_another_peer_are_left_out(nodes, name):
    server, client = nodes
    key, until = dht_key(name), get_dht_time() + 60
    await Speaker(server, name, "honest").announce(record("honest"), lasts_s=60)
    foreign = {
        "thief": encode_record(record("honest", 0, 8)),
        "bytes": b"\xc1",
        "text": b"\x81\xa4peer\xa1\x80",
        "number": 7,
        "none": None,
        "old": msgspec.msgpack.encode({"peer": "old"}),
    }
    for each, value in foreign.items():  # each signed by the peer under whose name it stands
        server.protocol.record_validator = SignedRecords(key_of(each))
        assert await server.store(key, value, until, subkey=key_of(each).peer)
    assert len((await client.get(key, latest=True)).value) == 1 + len(foreign), "they are there to be left out"
    assert (await HivemindDirectory(client, name).snapshot()).servers == (record("honest"),)


async def test_nobody_announces_or_withdraws_anothers_blocks(nodes, name):
    """What another signed, or nobody, no node takes, whoever asks it; nor does a client that is shown it."""
    server, client = nodes
    key, until, honest = dht_key(name), get_dht_time() + 120, record("honest")
    await Speaker(server, name, "honest").announce(honest, lasts_s=60)
    withdrawn = encode_record(msgspec.structs.replace(honest, state="offline"))
    for identity in (key_of("thief"), None):
        for node in nodes:  # the server's own node, and a client that asks it over the network
            node.protocol.record_validator = SignedRecords(identity)
            assert not await node.store(key, withdrawn, until, subkey=honest.peer)
    assert (await HivemindDirectory(client, name).snapshot()).servers == (honest,)

    class Believer(SignedRecords):
        def validate(self, record: object) -> bool:
            return True

    server.protocol.record_validator = Believer(key_of("thief"))
    assert await server.store(key, withdrawn, until, subkey=honest.peer), "a node of the thief's own takes it"
    assert (await HivemindDirectory(client, name).snapshot()).servers == (honest,), (
        "the client goes on with what it knew"
    )


async def test_swarms_of_other_names_do_not_see_each_other(nodes):
    server, client = nodes
    await Speaker(server, "one", "a").announce(record("a"), lasts_s=60)
    assert (await HivemindDirectory(client, "other").snapshot()).servers == ()
    assert (await HivemindDirectory(client, "one").snapshot()).servers == (record("a"),)


async def test_a_clock_that_is_off_is_an_error_of_its_own(monkeypatch):
    """A swarm whose first server believes that it is a minute later."""
    owner, identity = SigningKey.new(), SigningKey.new()
    token = issue(owner, name="all", peer=identity.peer, hosts=True, expires_s=2**39)
    members = Members(owner.public, identity, lambda _: token)
    sign_response = MembersOnly.sign_response

    async def sign_a_minute_later(self: MembersOnly, response: Any, request: Any) -> None:
        response.dht_time += 60  # only a ping's response has a time
        await sign_response(self, response, request)

    monkeypatch.setattr(MembersOnly, "sign_response", sign_a_minute_later)
    async with AsyncExitStack() as stack:
        first = await HivemindTransport.start(identity=identity)
        stack.push_async_callback(first.stop)
        directory = await HivemindDirectory.join(first, (), client_mode=False, identity=identity, members=members)
        stack.push_async_callback(directory.leave)
        peers = await first.addresses()
        second = await HivemindTransport.start(peers, listens=False)
        stack.push_async_callback(second.stop)
        with raises(ClockSkew):
            await HivemindDirectory.join(second, peers, client_mode=True, members=members)


async def test_who_has_an_expired_token_is_told_so_instead_of_seeing_and_being_seen_by_nobody():
    owner, identity, now_s = SigningKey.new(), key_of("me"), 99.0
    token = issue(owner, name="host", peer=identity.peer, hosts=True, expires_s=100)
    members = Members(owner.public, identity, lambda _: token, clock=lambda: now_s)
    async with AsyncExitStack() as stack:
        transport = await HivemindTransport.start(identity=identity)
        stack.push_async_callback(transport.stop)
        directory = await HivemindDirectory.join(transport, (), client_mode=False, identity=identity, members=members)
        stack.push_async_callback(directory.leave)
        mine = record("me")
        await directory.announce(mine, lasts_s=60)
        assert (await directory.snapshot()).servers == (mine,)
        now_s = 100.0
        for work in (directory.announce(mine, lasts_s=60), directory.withdraw(mine), directory.snapshot()):
            with raises(AccessDenied, reason="expired", member="host"):
                await work


async def test_a_directory_whose_daemon_was_killed_is_empty_takes_nothing_and_can_be_left(caplog):
    async with AsyncExitStack() as stack:
        first = await HivemindTransport.start()
        stack.push_async_callback(first.stop)
        directory = await HivemindDirectory.join(first, (), client_mode=False)
        stack.push_async_callback(directory.leave)
        peers = await first.addresses()
        second = await HivemindTransport.start(peers, listens=False)
        lonely = await HivemindDirectory.join(second, peers, client_mode=True)
        os.kill(second.p2p._child.pid, signal.SIGKILL)
        await second.ended()
        assert (await lonely.snapshot()).servers == ()
        await lonely.announce(record("a"), lasts_s=60)
        assert "did not take this server's announcement" in caplog.text
        await lonely._ping(second, peers[0])
        await lonely.leave()
        await second.stop()
        with raises(ServerUnreachable):
            await HivemindDirectory.join(second, peers, client_mode=True)
