"""Real DHT nodes on 127.0.0.1: servers that announce, and a client that looks."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from hivemind.dht.routing import DHTID

from petals_tune.errors import AccessDenied, ClockSkew, ServerUnreachable
from petals_tune.net.dht.directory import HIDDEN_S, DhtDirectory
from petals_tune.net.dht.keys import Spot
from petals_tune.net.dht.members_only import MembersOnly
from petals_tune.net.dht.node import Search
from petals_tune.net.hivemind_p2p import HivemindTransport
from petals_tune.net.members import Members
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.signing import SigningKey
from petals_tune.wire.span import BlockSpan
from petals_tune.wire.tokens import issue
from tests.net.dht.nodes import addresses, key_of, node, record
from tests.raising import raises

pytestmark = pytest.mark.asyncio(loop_scope="module")
WHOLE = BlockSpan(0, 24)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def nodes() -> AsyncIterator[tuple[DhtDirectory, DhtDirectory]]:
    """A server's node and a client's."""
    async with node(name="a") as (server, peers), node(peers, client=True) as (client, _):
        yield server, client


def speaker(server: DhtDirectory, name: str) -> DhtDirectory:
    """Announces as the server of one name; the nodes of all servers are one here."""
    return DhtDirectory(server.node, identity=key_of(name))


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await holds():
            await asyncio.sleep(0.05)


async def seen(client: DhtDirectory, model: str) -> tuple[ServerRecord, ...]:
    return (await client.snapshot(model, WHOLE)).servers


async def test_what_servers_announce_is_seen_in_the_order_of_the_blocks_until_they_withdraw(nodes, model):
    server, client = nodes
    records = {
        "c": record("c", 9, 24, model=model),
        "a": record("a", 0, 4, model=model),
        "b": record("b", 1, 9, model=model),
    }
    speakers = {each: speaker(server, each) for each in "abc"}
    assert await seen(client, model) == ()
    for each, announced in records.items():
        await speakers[each].announce(announced, lasts_s=60)
    assert await seen(client, model) == (records["a"], records["b"], records["c"])
    assert (await client.snapshot(model, BlockSpan(10, 12))).servers == (records["c"],)
    await speakers["b"].withdraw(records["b"])
    snapshot = await client.snapshot(model, WHOLE)
    assert (snapshot.servers, snapshot.left) == ((records["a"], records["c"]), {records["b"].peer})
    assert not snapshot.is_sample


async def test_a_server_that_loads_is_seen_by_other_servers_and_sent_no_clients(nodes, model):
    server, client = nodes
    joining = record("a", model=model, state="joining")
    directory = speaker(server, "a")
    await directory.announce(joining, lasts_s=60)
    snapshot = await client.snapshot(model, WHOLE)
    assert (snapshot.servers, snapshot.joining) == ((), (joining,))
    await directory.announce(record("a", model=model), lasts_s=60)
    snapshot = await client.snapshot(model, WHOLE)
    assert (snapshot.servers, snapshot.joining) == ((record("a", model=model),), ())


async def test_a_server_that_moves_is_seen_where_it_is_now(nodes, model):
    server, client = nodes
    directory = speaker(server, "a")
    await directory.announce(record("a", 0, 4, model=model), lasts_s=60)
    assert len(await seen(client, model)) == 1
    moved = record("a", 16, 24, model=model)
    await directory.announce(moved, lasts_s=60)
    assert await seen(client, model) == (moved,)
    async with node(await addresses(server), client=True) as (newcomer, _):
        assert (await newcomer.snapshot(model, BlockSpan(0, 8))).servers == ()
        assert await seen(newcomer, model) == (moved,)


async def test_a_server_that_starts_again_is_seen_though_its_new_record_ends_sooner(nodes, model):
    server, client = nodes
    before = speaker(server, "a")
    await before.announce(record("a", model=model), lasts_s=500)
    await before.withdraw(record("a", model=model))
    assert await seen(client, model) == ()
    again = record("a", 2, 6, model=model)
    await speaker(server, "a").announce(again, lasts_s=60)
    assert await seen(client, model) == (again,)


async def test_an_announcement_that_the_dht_does_not_take_is_not_lost_without_a_word(nodes, model, caplog):
    server, _ = nodes
    await speaker(server, "a").announce(record("a", model=model), lasts_s=-60)  # as where the clock is behind
    assert "no node of the DHT took this server's announcement" in caplog.text


async def test_an_announcement_that_is_not_renewed_ends_by_itself(nodes, model):
    server, client = nodes
    await speaker(server, "a").announce(record("a", model=model), lasts_s=1)
    assert await seen(client, model) != ()

    async def gone() -> bool:
        return await seen(client, model) == ()

    await eventually(gone)


async def test_models_share_a_network_and_are_told_apart(nodes, model):
    server, client = nodes
    one, other = record("a", model=f"{model} 1", model_name="one"), record("b", model=f"{model} 2", model_name="two")
    await speaker(server, "a").announce(one, lasts_s=60)
    await speaker(server, "b").announce(other, lasts_s=60)
    assert await seen(client, one.model) == (one,)
    assert await seen(client, other.model) == (other,)
    assert await seen(client, f"{model} 3") == ()
    listed = await client.models()
    assert [each for each in listed if each.model.startswith(model)] == [one, other]


async def test_weights_that_are_not_those_of_the_reader_are_not_shown(nodes, model):
    server, client = nodes
    ours, foreign = record("a", model=f"{model}.weights"), record("b", model=f"{model}.other")
    for name, each in {"a": ours, "b": foreign}.items():
        await speaker(server, name).announce(each, lasts_s=60)
    assert await seen(client, f"{model}.weights") == (ours,)
    found = await seen(client, model)
    assert sorted(each.model for each in found) == sorted([ours.model, foreign.model]), "it knows no weights"


async def test_servers_of_another_release_are_routed_around_and_it_is_said(nodes, model, caplog):
    server, client = nodes
    await speaker(server, "a").announce(record("a", model=model, protocol="/petals_tune/1", version="0.1"), lasts_s=60)
    await speaker(server, "b").announce(record("b", model=model), lasts_s=60)
    assert await seen(client, model) == (record("b", model=model),)
    assert "1 of 2 servers are passed over" in caplog.text
    assert "0.1" in caplog.text
    caplog.clear()
    await seen(client, model)
    assert not caplog.text, "once"


async def test_one_server_is_found_by_its_peer_id(nodes, model):
    server, client = nodes
    there = record("a", model=model)
    await speaker(server, "a").announce(there, lasts_s=60)
    assert await client.find(there.peer, model, there.blocks) == there
    assert await client.find(key_of("b").peer, model, there.blocks) is None
    assert await client.find(there.peer, "another model", there.blocks) is None


async def test_servers_of_a_group_that_is_full_are_found_deeper(nodes, model, monkeypatch):
    """70 servers of one group: its root takes 32; the others stand one level below, and deeper."""
    server, client = nodes
    monkeypatch.setattr("petals_tune.net.dht.tree.UP", 0.0)
    names = [f"{number} of many" for number in range(70)]
    for name in names:
        await speaker(server, name).announce(record(name, model=model), lasts_s=300)
    first = await client.snapshot(model, WHOLE)
    assert first.is_sample
    found = {each.peer for each in first.servers}
    for _ in range(150):
        found |= {each.peer for each in (await client.snapshot(model, WHOLE)).servers}
    assert found == {key_of(name).peer for name in names}
    async with node(await addresses(server), client=True) as (newcomer, _):
        for name in names[::7]:
            assert await newcomer.find(key_of(name).peer, model, BlockSpan(0, 4)) == record(name, model=model)


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
        directory = await DhtDirectory.join(first, (), client_mode=False, identity=identity, members=members)
        stack.push_async_callback(directory.leave)
        peers = await first.addresses()
        second = await HivemindTransport.start(peers, listens=False)
        stack.push_async_callback(second.stop)
        with raises(ClockSkew):
            await DhtDirectory.join(second, peers, client_mode=True, members=members)


async def test_who_has_an_expired_token_is_told_so_instead_of_seeing_and_being_seen_by_nobody():
    owner, identity, now_s = SigningKey.new(), key_of("a"), 99.0
    token = issue(owner, name="host", peer=identity.peer, hosts=True, expires_s=100)
    members = Members(owner.public, identity, lambda _: token, clock=lambda: now_s)
    async with AsyncExitStack() as stack:
        transport = await HivemindTransport.start(identity=identity)
        stack.push_async_callback(transport.stop)
        directory = await DhtDirectory.join(transport, (), client_mode=False, identity=identity, members=members)
        stack.push_async_callback(directory.leave)
        mine = record("a")
        await directory.announce(mine, lasts_s=60)
        assert await seen(directory, mine.model) == (mine,)
        now_s = 100.0
        works = [directory.announce(mine, lasts_s=60), directory.withdraw(mine), directory.snapshot(mine.model, WHOLE)]
        for work in [*works, directory.find(mine.peer, mine.model, WHOLE), directory.models()]:
            with raises(AccessDenied, reason="expired", member="host"):
                await work


async def test_a_directory_whose_daemon_was_killed_goes_on_with_what_it_knows_and_can_be_left(caplog):
    async with AsyncExitStack() as stack:
        server, peers = await stack.enter_async_context(node(name="a"))
        await server.announce(record("a"), lasts_s=60)
        second = await HivemindTransport.start(peers, listens=False, identity=key_of("b"))
        lonely = await DhtDirectory.join(second, peers, client_mode=True, identity=key_of("b"))
        assert await seen(lonely, "digest") == (record("a"),)
        os.kill(second.p2p._child.pid, signal.SIGKILL)
        await second.ended()
        assert await seen(lonely, "digest") == (record("a"),)
        assert "no node of the directory answered" in caplog.text
        await lonely.announce(record("b"), lasts_s=60)
        assert "no node of the DHT took this server's announcement" in caplog.text
        await lonely._ping(second, peers[0])
        await lonely.leave()
        await second.stop()
        with raises(ServerUnreachable):
            await DhtDirectory.join(second, peers, client_mode=True)


async def test_a_withdrawal_replaces_the_record_for_those_who_know_it(nodes, model):
    server, client = nodes
    directory, there = speaker(server, "a"), record("a", model=model)
    await directory.announce(there, lasts_s=60)
    assert await seen(client, model) == (there,)
    await directory.withdraw(there)
    assert await client.find(there.peer, model, there.blocks) is None
    assert msgspec.structs.replace(there, state="offline") not in await client.models()


class HidingNode:
    """Takes announcements, and shows them to others or not."""

    def __init__(self) -> None:
        self.nearest, self.shown, self.looks = ["one"], True, 0
        self.told_also: list[tuple[str, ...]] = []

    def holders(self, key: DHTID) -> list[str]:
        return self.nearest

    async def store(self, data: bytes, spots: dict[Spot, DHTID], *, also_at: Any, timeout_s: float) -> Any:
        self.told_also.append(tuple(also_at))
        return dict.fromkeys(spots, (5, 5))

    async def find(self, keys: list[DHTID], **_: Any) -> dict[DHTID, Search]:
        self.looks += 1
        told = {record("a").peer} if self.shown else set()
        return {key: Search(key, 2, answered={DHTID(1)}, told=told) for key in keys}


async def test_a_server_that_is_hidden_by_new_neighbours_of_its_key_tells_the_initial_peers(monkeypatch, caplog):
    """It looks at once where others are the nearest, and else at every fifth renewal."""
    node, first = HidingNode(), key_of("first").peer
    directory = DhtDirectory(node, identity=key_of("a"), initial_peers=[f"/ip4/127.0.0.1/tcp/1/p2p/{first}"])  # type: ignore[arg-type]
    for _ in range(4):
        await directory.announce(record("a"), lasts_s=60)
    assert (node.looks, set(node.told_also)) == (1, {()})
    node.nearest, node.shown = ["two"], False
    await directory.announce(record("a"), lasts_s=60)
    assert (node.looks, node.told_also[-2:]) == (2, [(), (first,)]), "at once"
    assert "do not show it" in caplog.text
    await directory.announce(record("a"), lasts_s=60)
    assert (node.looks, node.told_also[-1]) == (3, (first,)), "the sixth"
    node.shown = True
    for _ in range(6):
        await directory.announce(record("a"), lasts_s=60)
    assert (node.looks, node.told_also[-1]) == (4, (first,)), "it may be shown by the initial peers alone"
    now_s = time.monotonic()
    monkeypatch.setattr("petals_tune.net.dht.directory.time.monotonic", lambda: now_s + HIDDEN_S)
    await directory.announce(record("a"), lasts_s=60)
    assert node.told_also[-1] == ()
