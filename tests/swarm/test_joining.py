"""A client is in a swarm once all its blocks have a server; otherwise it hears what is missing, and has left again."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from petals_tune.errors import SwarmMismatch, UncoveredBlocks
from petals_tune.net.peer import Peer
from petals_tune.swarm import client, joining, loop
from petals_tune.swarm.client import SwarmClient
from petals_tune.swarm.joining import join_swarm
from petals_tune.swarm.retry import RetryPolicy
from petals_tune.wire.span import BlockSpan
from tests.faults.network import CLIENT, MODEL, Network, id_of
from tests.faults.step import WHOLE
from tests.raising import raises


class Entrance:
    """Where clients come in and go out."""

    def __init__(self, network: Network):
        self._network = network
        self.inside = 0

    @asynccontextmanager
    async def joined(self, *_: object, **__: object) -> AsyncIterator[Peer]:
        self.inside += 1
        try:
            yield self._network.peer(CLIENT)
        finally:
            self.inside -= 1

    def join(self, model: str = MODEL, blocks: Sequence[BlockSpan] = (WHOLE,), **options: Any) -> SwarmClient:
        return loop.run(
            join_swarm(["peer"], model=model, source="the model", blocks=blocks, policy=RetryPolicy(), **options)
        )


@pytest.fixture
def entrance(network, monkeypatch):
    entrance = Entrance(network)
    monkeypatch.setattr(client, "joined", entrance.joined)
    return entrance


def test_who_finds_all_blocks_is_in_until_it_closes(entrance):
    joined = entrance.join()
    assert entrance.inside == 1
    assert {server.peer for server in joined.servers} == {id_of("a"), id_of("b")}
    loop.run(joined.close())
    assert entrance.inside == 0


def test_blocks_that_nobody_holds_are_named_after_a_while_and_the_client_leaves(entrance, network, monkeypatch):
    monkeypatch.setattr(joining, "JOIN_S", 0.2)
    network.kill("b")
    network.serve("c", "4:5")
    with raises(UncoveredBlocks, missing=(BlockSpan(3, 4), BlockSpan(5, 6)), seen=(id_of("a"), id_of("c"))) as caught:
        entrance.join()
    hosting = "  start one:  python -m servers 'model.source=the model' 'swarm.initial_peers=[peer]' blocks="
    assert str(caught.value).splitlines()[1:] == [f"{hosting}3:4", f"{hosting}5:6"], (
        "names of our own, none of a server"
    )
    assert entrance.inside == 0


def test_only_the_blocks_that_are_needed_are_waited_for(entrance, network):
    network.kill("b")
    network.serve("c", "4:5")
    loop.run(entrance.join(blocks=[BlockSpan(1, 3), BlockSpan(4, 5)]).close())


def test_a_server_that_comes_meanwhile_is_found(entrance, network):
    network.kill("b")

    async def come() -> None:
        network.at_lookup = comes

    async def comes() -> None:
        network.at_lookup = None
        await network.start("b", "3:6")

    network.at_lookup = come
    loop.run(entrance.join().close())


def test_who_wants_a_model_that_nobody_serves_is_told_what_there_is(entrance, monkeypatch):
    monkeypatch.setattr(joining, "JOIN_S", 0.2)
    with raises(SwarmMismatch, wanted="another", found=(MODEL,)):
        entrance.join(model="another")
    assert entrance.inside == 0


def test_who_gives_up_waiting_leaves(entrance, network):
    looking = asyncio.Event()

    async def look() -> None:
        looking.set()
        await asyncio.Event().wait()

    network.at_lookup = look

    async def give_up() -> None:
        task = asyncio.create_task(
            join_swarm(["peer"], model=MODEL, source="the model", blocks=[WHOLE], policy=RetryPolicy())
        )
        await looking.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    loop.run(give_up())
    assert entrance.inside == 0


def test_who_finds_its_model_in_another_quantization_alone_is_not_told_of_another_model(entrance, monkeypatch):
    monkeypatch.setattr(joining, "JOIN_S", 0.2)
    with raises(UncoveredBlocks, missing=(WHOLE,)):
        entrance.join(quantizations=["int8"])
    assert entrance.inside == 0
