"""Spot checks over servers: one that lies is outvoted, and honest ones are left alone."""

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from petals_tune.swarm import loop
from petals_tune.swarm.routes import trials
from petals_tune.wire.messages import Forward, Forwarded, Gradients, Message
from petals_tune.wire.records import Throughput
from petals_tune.wire.span import BlockSpan
from petals_tune.wire.tensors import WIRE_FORMATS, FormatOption
from tests.faults.network import Network
from tests.faults.step import TrainingStep, check
from tests.processes import LONG_S

SPAN = BlockSpan(3, 6)


@pytest.fixture
def network(folder: Path) -> Iterator[Network]:
    """Two servers of the first half, of which one holds another cut too, and three of the second."""
    network = Network(folder)
    for name, span in {"a": "0:3", "a2": "0:2", "a3": "2:3", "b": "3:6", "b2": "3:6", "b3": "3:6"}.items():
        network.serve(name, span)
    yield network
    network.stop()


class Checked(TrainingStep):
    """A step, all of which is checked."""

    def __init__(self, network: Network, wire_format: FormatOption = "float32"):
        # An honest server of a busy machine may take longer than other tests wait for one that is lost.
        super().__init__(network, verify=1.0, wire_format=wire_format, reply_s=LONG_S)

    def settle(self) -> None:
        """Wait until every check has ended."""
        deadline_s = time.monotonic() + LONG_S
        while self.chain.calls.observer.running:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


@pytest.mark.parametrize("wire_format", WIRE_FORMATS)
def test_honest_servers_are_checked_and_left_alone_whatever_their_cut(network, expected, wire_format, caplog):
    step = Checked(network, wire_format)
    step.run(between=step.settle, after=step.settle)
    if wire_format == "float32":
        check(step, expected)
    assert network.calls["a2", "Forward"] == network.calls["a3", "Forward"] >= 2
    assert step.chain.client.stats.checks == 8, "two micro-batches over two legs, forward and back"
    assert step.chain.client.stats.outvoted == 0
    assert not step.chain.client.banned()
    assert not [record for record in caplog.records if record.name.startswith("petals_tune")]


def scaled(kind: type[Message], field: str, by: float = 1.01):
    def lie(reply: Message) -> Message:
        if not isinstance(reply, kind):
            return reply
        value = getattr(reply, field)
        wrong = [each * by for each in value] if isinstance(value, list) else value * by
        return msgspec.structs.replace(reply, **{field: wrong})

    return lie


def one_position(reply: Message) -> Message:
    """One per cent more at one of the ten positions of a micro-batch, which are of two rows."""
    if isinstance(reply, Forwarded):
        hidden = reply.hidden.clone()
        hidden[1, 3] *= 1.01
        reply = msgspec.structs.replace(reply, hidden=hidden)
    return reply


LIES = [
    *((scaled(Forwarded, "hidden"), wire_format) for wire_format in ("float32", "bfloat16", "blockwise8")),
    *((scaled(Gradients, "hidden"), wire_format) for wire_format in ("float32", "blockwise8")),
    (scaled(Gradients, "adapter"), "float32"),
    (one_position, "float32"),
]


@pytest.mark.parametrize(("lie", "wire_format"), LIES, ids=lambda value: getattr(value, "__name__", value))
def test_a_server_that_lies_is_outvoted_banned_and_reported(network, lie, wire_format, caplog):
    liar = network.servers["b2"]
    liar.handler.lie = lie
    step = Checked(network, wire_format)
    step.chain.client.load.correction[liar.record.peer] = 1e-9  # everybody asks it
    step.run(between=step.settle, after=step.settle)
    assert step.chain.client.banned() == {liar.record.peer}
    assert step.chain.client.stats.outvoted >= 1
    assert any(liar.record.peer in record.getMessage() and "%" in record.getMessage() for record in caplog.records)
    assert loop.run(step.chain.client.route(SPAN, work=1))[0].server.peer != liar.record.peer


def test_servers_of_another_quantization_are_no_measure(network):
    for name in ("b2", "b3"):
        network.kill(name)
        network.serve(name, "3:6", quantization="int8")
    step = Checked(network)
    for name, speed_s in {"b": 1e-9, "b2": 1.0, "b3": 1.0}.items():
        step.chain.client.load.correction[network.servers[name].record.peer] = speed_s
    step.run(between=step.settle, after=step.settle)
    assert network.calls["b", "Forward"] == 2
    assert not network.calls["b2", "Forward"] + network.calls["b3", "Forward"]


def test_where_two_disagree_and_there_is_no_third_both_are_named_and_nobody_is_banned(network, caplog):
    network.kill("b3")
    network.servers["b2"].handler.lie = scaled(Forwarded, "hidden")
    step = Checked(network)
    step.run(between=step.settle, after=step.settle)
    assert not step.chain.client.banned()
    (said, *_) = [record.getMessage() for record in caplog.records]
    assert "there is no third one to ask" in said
    assert all(network.servers[name].record.peer in said for name in ("b", "b2"))


async def nothing() -> None: ...


def test_servers_that_claim_to_be_fast_and_never_answer_cost_a_little_time_and_no_number(folder, expected, monkeypatch):
    """They live, say so, and would be waited for as long as `reply_s`."""
    monkeypatch.setattr(trials, "LEAST_S", 0.3)
    network, fast = Network(folder), Throughput(step=9e11, batch=9e11)
    try:
        network.serve("honest", "0:3", throughput=Throughput(step=100.0, batch=1000.0))
        network.serve("honest 2", "3:6", throughput=Throughput(step=100.0, batch=1000.0))
        names = [f"liar {number}" for number in range(4)]
        for name in names:
            network.serve(name, "0:6", throughput=fast)
            network.fault(name, Forward, nothing)
        step = TrainingStep(network, reply_s=1e6)
        step.run()
        check(step, expected)
        assert network.calls["honest", "Forward"] >= 1
        assert sum(network.calls[name, "Forward"] > 0 for name in names) >= 1, "they were asked"
    finally:
        network.stop()
