"""One client: streams to servers, what it learns of them, and what it leaves behind."""

import asyncio

import pytest
import torch

from petals_tune.errors import ServerBusy, ServerTimeout, ServerUnreachable, SwarmError
from petals_tune.swarm.client import LEAST_OWN, PING_S
from petals_tune.swarm.routes.route import Hop
from petals_tune.wire.messages import Forwarded, Gradients, Refusal, Stepped
from tests.net.played_peer import accepted
from tests.raising import raises
from tests.swarm.played_swarm import WHOLE, A, Swarm


async def test_a_server_that_cannot_be_reached_is_named_with_its_blocks_and_banned():
    swarm = Swarm(A)
    with raises(ServerUnreachable, peer="a"):
        await swarm.client.stream(A)
    assert swarm.client.banned() == {"a"}


async def test_a_server_that_refuses_a_stream_says_why():
    swarm = Swarm(A)
    ends = await accepted(swarm.network, "a")
    opening = asyncio.create_task(swarm.client.stream(A))
    played = await ends.get()
    number, _ = await played.read()
    await played.send(Refusal.of(ServerBusy("full", limit="max_streams")), number)
    with raises(ServerBusy, peer="a", limit="max_streams"):
        await opening


# What it learns of servers


HOP = Hop(A, WHOLE)
HIDDEN = torch.zeros(1, 1, 2)


async def test_the_time_until_a_reply_counts_whatever_the_server_says_it_took():
    client = Swarm(A).client
    client.worked(HOP, Forwarded(hidden=HIDDEN, compute_s=0.0), 12.0, 1, ahead=0, giver=None)
    assert client.load.correction == {"a": pytest.approx(2.0)}, "it announced one second a block"
    client.load.forget("a")
    client.worked(HOP, Forwarded(hidden=HIDDEN, compute_s=18.0), 12.0, 1, ahead=0, giver=None)
    assert client.load.correction == {"a": pytest.approx(3.0)}, "who says that it took longer is believed"
    client.load.forget("a")
    client.worked(HOP, Forwarded(hidden=HIDDEN), 12.0, 1, ahead=6, giver=None)
    assert client.load.correction == {"a": pytest.approx(1.0)}, "half of it was for work before"


async def test_the_way_of_a_step_is_not_the_servers_own_time_however_far_it_seems_to_be():
    client = Swarm(A).client
    client._routing.round_trips.add("a", 2.0)
    client.worked(HOP, Stepped(hidden=HIDDEN), 8.0, 1, ahead=0, giver=None)
    assert client.load.correction == {"a": pytest.approx(1.0)}
    client.load.forget("a")
    client.worked(HOP, Stepped(hidden=HIDDEN), 1.5, 1, ahead=0, giver=None)
    assert client.load.correction == {"a": pytest.approx(LEAST_OWN * 1.5 / 6)}


async def test_only_work_of_which_the_costs_are_known_measures_a_server():
    client = Swarm(A).client
    client.worked(HOP, Gradients(hidden=HIDDEN), 12.0, 1, ahead=0, giver=None)
    assert not client.load.correction


async def test_a_server_that_answered_too_late_is_trusted_no_more():
    client = Swarm(A).client
    client.load.add_measurement(A, 1.0, 1, 6)
    client.failed(A, ServerUnreachable("gone", peer="a"))
    assert client.load.correction, "it may be back"
    client.failed(A, ServerTimeout("late", peer="a"))
    assert not client.load.correction


async def test_round_trips_are_measured_when_a_stream_opens_and_again_after_a_while(clock):
    swarm = await Swarm.up(A)
    await swarm.peers()
    trips = swarm.client._routing.round_trips
    assert trips.to("a") is not None
    measured = trips._last["a"]
    assert len(measured) == 1
    clock.now_s += PING_S + 1
    calls = swarm.client.stats.calls
    while len(measured) < 2:
        await swarm.peers()
        await asyncio.sleep(0.001)
    assert swarm.client.stats.calls == calls, "a ping is no work"
    await swarm.client.close()


# What it leaves behind


async def test_a_closed_client_has_no_streams_and_no_tasks_and_does_nothing_more():
    swarm, never = Swarm(A), asyncio.Event()
    await swarm.client.refresh()
    stream = await swarm.opened(A)
    swarm.directory.before = never.wait
    refreshing = swarm.client.refresh_soon()
    await asyncio.sleep(0)
    await swarm.client.close()
    assert not stream.alive
    assert refreshing.cancelled()
    for use in (lambda: swarm.client.route(WHOLE, work=1), lambda: swarm.client.stream(A)):
        with raises(SwarmError):
            await use()
