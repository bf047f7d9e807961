"""Real p2p daemons and DHT nodes on 127.0.0.1."""

import asyncio
import os
import signal
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from petals_tune.errors import AccessDenied, PetalsTuneError, ServerError, ServerUnreachable, SwarmMismatch
from petals_tune.net.circuit_relay import Reservation
from petals_tune.net.dht import directory as dht_directory
from petals_tune.net.hivemind_p2p import LOOPBACK
from petals_tune.net.in_process import InProcessNetwork
from petals_tune.net.peer import Peer, _ask_for_the_reason, joined
from petals_tune.net.transport import Connection
from petals_tune.wire.messages import Refusal
from petals_tune.wire.records import PROTOCOL
from petals_tune.wire.span import BlockSpan
from tests.net.played_peer import LONG_S, PlayedPeer, welcome
from tests.raising import raises
from tests.servers.peers import record_of

MODEL, WHOLE = "digest", BlockSpan(0, 6)


async def announce(server: Peer) -> None:
    record = msgspec.structs.replace(record_of(server.id), addresses=server.addresses)
    await server.directory.announce(record, lasts_s=60)


async def until_known(server: Peer, *, to: Peer) -> None:
    """Returns once the DHT shows `to` the server, which renews its announcement meanwhile."""
    async with asyncio.timeout(30):
        while [record.peer for record in (await to.directory.snapshot(MODEL, WHOLE)).servers] != [server.id]:
            await announce(server)
            await asyncio.sleep(0.2)


async def test_a_swarm_whose_first_node_was_restarted_comes_together_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The node knows nobody then, and who did not get an answer from it has forgotten it."""
    monkeypatch.setattr(dht_directory, "PING_S", 0.3)
    identity_path = str(tmp_path / "node.identity")
    async with AsyncExitStack() as stack:
        first = AsyncExitStack()
        node = await first.enter_async_context(joined([], host_maddrs=[LOOPBACK], identity_path=identity_path))
        peers = node.addresses
        server = await stack.enter_async_context(joined(peers, host_maddrs=[LOOPBACK]))
        await announce(server)
        client = await stack.enter_async_context(joined(peers, listens=False))
        await first.aclose()
        await client.directory.snapshot(MODEL, WHOLE)
        async with asyncio.timeout(30):
            while knows(server, node):
                await announce(server)
                await asyncio.sleep(0.1)

        again = joined([], host_maddrs=[peers[0].partition("/p2p/")[0]], identity_path=identity_path)
        node = await stack.enter_async_context(again)
        await until_known(server, to=node)
        newcomer = await stack.enter_async_context(joined(peers, listens=False))
        await until_known(server, to=newcomer)
        async with asyncio.timeout(30):
            while not knows(client, node):
                await asyncio.sleep(0.1)


def knows(peer: Peer, other: Peer) -> bool:
    """Whether `other` is in the routing table of the DHT node of `peer`."""
    return other.transport.p2p.peer_id in peer.directory.node.protocol.routing_table


async def test_a_daemon_that_ends_ends_the_work_with_a_reason():
    async with joined([], host_maddrs=[LOOPBACK]) as peer:
        assert await peer.while_daemon_lives(asyncio.sleep(0, "done"), asyncio.Event()) == "done"
        assert peer.daemon_lives
        os.kill(peer.transport.p2p._child.pid, signal.SIGKILL)
        with raises(ServerError, peer=peer.id) as caught:
            await peer.while_daemon_lives(asyncio.sleep(LONG_S), asyncio.Event())
        assert "killed by signal 9" in str(caught.value)
        assert not peer.daemon_lives


async def test_a_daemon_that_ends_together_with_the_process_is_no_error():
    stop = asyncio.Event()

    async def work() -> str:
        os.kill(peer.transport.p2p._child.pid, signal.SIGTERM)
        await peer.daemon_ended
        stop.set()
        return "done"

    async with joined([], host_maddrs=[LOOPBACK]) as peer:
        assert await peer.while_daemon_lives(work(), stop) == "done"


async def test_a_client_joins_and_leaves_nothing():
    async with joined([], host_maddrs=[LOOPBACK]) as server:
        async with joined(server.addresses, listens=False) as client:
            assert client.addresses == ()
            assert (await client.directory.snapshot(MODEL, WHOLE)).servers == ()
            transport = client.transport
        assert not transport.alive
        with raises(ServerUnreachable):
            async with joined([server.addresses[0].replace(server.id, client.id)], listens=False):
                pass


def test_the_addresses_of_a_relayed_peer_follow_its_relay():
    relays = ["/ip4/10.0.0.1/tcp/1/p2p/one", "/ip4/10.0.0.2/tcp/1/p2p/two"]
    network = InProcessNetwork()
    place = Reservation(network.find(network.peer("me").id), relays, relays[0])  # type: ignore[arg-type]
    own = ("/ip4/127.0.0.1/tcp/5/p2p/me", "/ip4/10.0.0.9/tcp/5/p2p/me")
    peer = replace(network.peer("me"), own_addresses=own, reservation=place)
    assert peer.addresses == (own[1], "/ip4/10.0.0.1/tcp/1/p2p/one/p2p-circuit/p2p/me")
    place.relay = place.relays[1]
    assert peer.addresses == (own[1], "/ip4/10.0.0.2/tcp/1/p2p/two/p2p-circuit/p2p/me")


# Why the directory of a private swarm is silent: one initial peer's word is not enough where there are others

DENIED, ELSEWHERE = AccessDenied("no", reason="revoked", member="alice"), SwarmMismatch("no")


async def played(network: InProcessNetwork, name: str, answer: PetalsTuneError | None) -> None:
    """An initial peer that refuses whoever greets it, or lets him in."""

    async def serve(connection: Connection) -> None:
        peer = PlayedPeer(connection)
        number, _ = await peer.read()
        await peer.send(welcome() if answer is None else Refusal.of(answer), number)

    await network.peer(name).transport.accept(PROTOCOL, serve)


async def reason(answers: dict[str, PetalsTuneError | None], *, away: Sequence[str] = ()) -> None:
    network = InProcessNetwork()
    for name, answer in answers.items():
        await played(network, name, answer)
    addresses = [f"/ip4/127.0.0.1/tcp/1/p2p/{name}" for name in (*answers, *away)]
    try:
        await _ask_for_the_reason(network.peer("me").transport, addresses, None, timeout_s=LONG_S)
    finally:
        await network.close()


@pytest.mark.parametrize(
    ("answers", "away"),
    [({"a": DENIED, "b": None}, ()), ({"a": None}, ()), ({}, ("a", "b"))],
    ids=["another one lets us in", "the only one lets us in", "none answers"],
)
async def test_no_reason_is_known_where(answers, away):
    await reason(answers, away=away)


@pytest.mark.parametrize(
    "answers", [{"a": DENIED}, {"a": DENIED, "b": DENIED}, {"a": DENIED, "b": DENIED, "c": ELSEWHERE}]
)
async def test_two_initial_peers_that_agree_or_the_only_one_are_believed(answers):
    with raises(AccessDenied, **vars(DENIED)) as caught:
        await reason(answers)
    assert "a" in str(caught.value)


@pytest.mark.parametrize(
    ("answers", "away"), [({"a": DENIED}, ("b",)), ({"a": DENIED, "b": ELSEWHERE}, ())], ids=["alone", "they differ"]
)
async def test_one_of_several_initial_peers_is_not_believed_and_what_it_says_is_told(answers, away):
    with raises(ServerUnreachable, peer="a") as caught:
        await reason(answers, away=away)
    assert "no" in str(caught.value)
