"""Servers that hand their outputs on to the next one, without the client in between, and what can go wrong there."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from petals_tune.errors import ServerBusy
from petals_tune.swarm import loop
from petals_tune.swarm.history import Inputs
from petals_tune.swarm.session import ChainSession
from petals_tune.wire.messages import Delivery, HandOver, Message, Step, Stepped
from servers.requests import hand_over as handover
from servers.stores.sessions import SessionStore
from tests.faults.network import Network
from tests.faults.step import WHOLE, WIDTH, TrainingStep, check
from tests.models import relative_error

pytestmark = pytest.mark.usefixtures("short_silence")

STEPS = 4


@pytest.fixture
def network(folder: Path) -> Iterator[Network]:
    """Blocks 0:2 at `a`, 2:4 at `b`, 4:6 at `c`."""
    network = Network(folder, hand_over="always")
    for name, span in (("a", "0:2"), ("b", "2:4"), ("c", "4:6")):
        network.serve(name, span)
    yield network
    network.stop()


def test_outputs_and_gradients_go_from_server_to_server(network, expected):
    step = TrainingStep(network)
    step.run()
    check(step, expected)
    assert sorted(network.handed_on) == ["a", "a", "b", "b", "b", "b", "c", "c"], "two micro-batches, there and back"
    assert step.chain.client.stats.retries == step.chain.client.stats.recomputations == 0
    network.hand_over = "never"
    through_the_client = TrainingStep(network)
    through_the_client.run()
    check(step, through_the_client)
    tensors = 2 * 2 * step.hidden.nbytes  # what two servers do not get from the client any more, there and back
    spared = through_the_client.chain.client.stats.sent_bytes - step.chain.client.stats.sent_bytes
    assert spared == pytest.approx(tensors, rel=0.2)


def test_what_two_servers_cannot_hand_on_the_client_delivers_and_asks_no_more(network, expected, monkeypatch):
    network.apart = {("a", "b"), ("c", "b")}
    tried: list[str] = []
    for name in ("a", "c"):
        neighbours = network.servers[name].handler._neighbours
        hand_on = neighbours.hand_on
        monkeypatch.setattr(neighbours, "hand_on", lambda *args, hand_on=hand_on: tried.append("") or hand_on(*args))
    step = TrainingStep(network)
    step.run()
    check(step, expected)
    assert sorted(network.handed_on) == ["b", "b", "b", "b"]
    assert step.chain.client.stats.retries == 0
    asked = len(tried)
    step.run()
    check(step, expected)
    assert len(tried) == asked


def test_a_server_that_hands_on_something_else_than_it_answers_costs_a_repetition(network, expected, monkeypatch):
    """`b` refuses what it cannot use, and is asked with what the client got from `a`."""
    handed_on = network.servers["a"].handler._neighbours.hand_on
    sent = []

    async def nonsense(goes, tensor):
        sent.append({0: tensor * torch.nan, 1: tensor[:1]}.get(len(sent), tensor))
        return await handed_on(goes, sent[-1])

    monkeypatch.setattr(network.servers["a"].handler._neighbours, "hand_on", nonsense)
    step = TrainingStep(network)
    step.run()
    check(step, expected)
    assert len(sent) == 2
    assert network.calls["b", "Forward"] == 3, "once refused by its numbers, once before by its shape, twice computed"


def test_a_peer_that_is_no_server_is_neither_dialled_nor_remembered(network):
    neighbours = network.servers["a"].handler._neighbours
    hand_on = super(type(neighbours), neighbours).hand_on

    async def handed_on(peer: str) -> bool:
        return await hand_on(HandOver(peer=peer, ticket=bytes(16)), torch.zeros(1, 1, WIDTH))

    assert loop.run(handed_on(network.servers["b"].record.peer))
    assert not any(loop.run(handed_on(f"stranger {number}")) for number in range(20))
    assert neighbours._pool.peers == {network.servers["b"].record.peer}
    assert not neighbours._shut_until_s


def test_a_server_that_could_not_be_reached_is_looked_up_anew(network, monkeypatch):
    neighbours = network.servers["a"].handler._neighbours
    hand_on = super(type(neighbours), neighbours).hand_on
    monkeypatch.setattr(handover, "SHUT_S", 0.0)
    lookups = []

    async def looked() -> None:
        lookups.append(None)

    network.at_lookup = looked
    goes = HandOver(peer=network.servers["b"].record.peer, ticket=bytes(16))
    assert loop.run(hand_on(goes, torch.zeros(1, 1, WIDTH)))
    network.kill("b")
    assert not loop.run(hand_on(goes, torch.zeros(1, 1, WIDTH)))
    network.serve("b", "2:4")
    assert loop.run(hand_on(goes, torch.zeros(1, 1, WIDTH)))
    assert len(lookups) == 2


@pytest.mark.parametrize("loses", ["its output", "the stream"])
def test_an_output_that_does_not_arrive_is_delivered_by_the_client(network, expected, monkeypatch, loses):
    neighbours = network.servers["a"].handler._neighbours

    async def lost(goes, tensor):
        """Says that it handed on; and then its stream ends."""
        record = await neighbours._record(goes.peer)
        await (await neighbours._pool.get(record)).send(Delivery(ticket=bytes(16), tensor=tensor))
        if loses == "the stream":
            await neighbours.close()
        return loses == "the stream"

    monkeypatch.setattr(neighbours, "hand_on", lost)
    step = TrainingStep(network)
    step.run()
    check(step, expected)
    assert step.chain.client.stats.retries == 0


def test_a_tensor_that_comes_before_its_request_is_kept_for_it(network, expected, monkeypatch):
    handler = network.servers["b"].handler
    receive = handler._inbox.receive

    async def late(comes):
        await early.wait()
        return await receive(comes)

    deliver, early = handler._inbox.deliver, asyncio.Event()
    monkeypatch.setattr(handler._inbox, "receive", late)
    monkeypatch.setattr(handler._inbox, "deliver", lambda *args: (deliver(*args), early.set()))
    step = TrainingStep(network)
    step.run()
    check(step, expected)
    assert early.is_set()


class Generation:
    """Steps of a session through all blocks, from the same inputs each time."""

    def __init__(self, network: Network):
        self._network, self.chain = network, network.chain(reply_s=1.0)
        self._session = ChainSession(self.chain.calls, self.chain.repair, WHOLE, rows=1, max_length=16, adapter=None)
        drawn = torch.Generator().manual_seed(5)
        self._inputs = [torch.randn(1, length, WIDTH, generator=drawn) for length in (3, 1, 1, 1, 1)]

    def run(self, *, before_last: Callable[[], object] = lambda: None) -> list[torch.Tensor]:
        outputs, position = [], 0
        for hidden in self._inputs:
            if len(outputs) == len(self._inputs) - 1:
                before_last()
            inputs = Inputs(hidden=hidden, padding=None, positions=None)
            outputs.append(loop.run(self._session.step(inputs, position=position, order=None)))
            position += len(inputs)
        self._network.disconnect_clients()
        return outputs


@pytest.mark.parametrize("lost", ["a", "b", "c"])
@pytest.mark.parametrize("kind", ["killed", "stopped", "recut"])
def test_a_generation_that_is_handed_on_outlives_each_of_its_servers(network, lost, kind):
    network.hand_over = "never"
    undisturbed = Generation(network).run()
    network.hand_over = "always"
    span = str(network.servers[lost].record.blocks)

    async def harm() -> None:
        if kind == "stopped":
            network.servers[lost].running.clear()
        else:
            await network.end(lost)
        if kind == "recut":
            for number in range(int(span[0]), int(span[-1])):
                await network.start(f"part {number}", f"{number}:{number + 1}")
        else:
            await network.start("spare", span)

    fault = network.fault(lost, Step, harm, skip=2)
    outputs = Generation(network).run()
    assert fault.fired.is_set()
    assert network.handed_on, "before the fault"
    assert max(relative_error(*pair) for pair in zip(outputs, undisturbed, strict=True)) <= 1e-6


@pytest.mark.parametrize("lost", ["a", "b"])
def test_a_server_that_comes_back_with_fewer_blocks_does_not_hand_on_for_its_old_ones(network, lost):
    """It lost its session; its part of the blocks is computed first, and the output is not what the next one awaits."""
    network.hand_over = "never"
    undisturbed = Generation(network).run()
    network.hand_over = "always"
    first = network.servers[lost].record.blocks.start

    def restart() -> None:
        network.kill(lost)
        network.serve(lost, f"{first}:{first + 1}")
        network.serve("rest", f"{first + 1}:{first + 2}")

    outputs = Generation(network).run(before_last=restart)
    assert network.handed_on, "before the restart"
    assert max(relative_error(*pair) for pair in zip(outputs, undisturbed, strict=True)) <= 1e-6


def test_a_session_whose_replay_fails_is_closed(network, monkeypatch):
    network.hand_over = "never"
    undisturbed, closed = Generation(network).run(), []
    monkeypatch.setattr(SessionStore, "close", lambda self, client, number: closed.append(number))

    def replace() -> None:
        network.kill("b")
        spare = network.serve("spare", "2:4")

        def fail_once(reply: Message) -> Message:
            if isinstance(reply, Stepped):
                spare.handler.lie = None
                raise ServerBusy("not now")
            return reply

        spare.handler.lie = fail_once

    outputs = Generation(network).run(before_last=replace)
    assert closed == [1], "the first one at `spare`"
    assert max(relative_error(*pair) for pair in zip(outputs, undisturbed, strict=True)) <= 1e-6
