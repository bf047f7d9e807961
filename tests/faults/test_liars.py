"""Spot checks: which work is checked, who is outvoted, and that honest servers are left alone."""

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from petals_tune.swarm import loop
from petals_tune.swarm.verify import COMPUTED, Answer, Deviation, choose_outvoted, deviation, is_selected, tolerance
from petals_tune.wire.messages import CollectedSum, Forwarded, Gradients, Message
from petals_tune.wire.span import BlockSpan
from petals_tune.wire.tensors import WIRE_FORMATS, as_received
from tests.faults.network import Network
from tests.faults.step import TrainingStep, check
from tests.processes import LONG_S

SPAN = BlockSpan(3, 6)


def answer(*values: float) -> Answer:
    return Answer(servers=(), tensors=(torch.tensor(values),))


def test_the_share_that_is_checked_is_the_one_that_was_asked_for_and_follows_from_the_seed():
    inputs = torch.randn(4000, 1, 8, 40, generator=torch.Generator().manual_seed(0))
    inputs[:, :, :7] = 1.0  # all texts begin alike

    def chosen(seed: int, share: float, kind: str = "forward") -> list[bool]:
        return [is_selected(share, seed=seed, kind=kind, span=SPAN, hidden=hidden) for hidden in inputs]

    assert sum(chosen(0, 0.02)) == pytest.approx(80, abs=30)
    assert chosen(0, 0.02) == chosen(0, 0.02)
    assert chosen(0, 0.02) != chosen(1, 0.02)
    assert chosen(0, 0.02) != chosen(0, 0.02, "backward")
    assert not any(chosen(0, 0.0))
    assert all(chosen(0, 1.0))


def test_a_third_answer_tells_who_is_wrong_or_that_nobody_knows():
    good, bad, worse = answer(1.0, 2.0), answer(1.01, 2.02), answer(9.0, 9.0)
    close, wide = Deviation(largest=1e-3, typical=1e-3), Deviation(largest=6e-3, typical=6e-3)
    assert choose_outvoted(bad, good, good, close) is bad
    assert choose_outvoted(good, bad, good, close) is bad
    assert choose_outvoted(good, bad, worse, close) is None
    assert choose_outvoted(good, bad, answer(1.005, 2.01), wide) is None, "the third one agrees with both"


def rounded(values: torch.Tensor, wire_format: str) -> Answer:
    return Answer(servers=(), tensors=(as_received(values, wire_format),))


@pytest.fixture
def hidden() -> torch.Tensor:
    """Like those of a language model: two values outweigh all others together."""
    drawn = torch.randn(2, 32, 96, generator=torch.Generator().manual_seed(0))
    drawn[:, 0, 7] = torch.tensor([900.0, 700.0])
    return drawn


@pytest.mark.parametrize("wire_format", WIRE_FORMATS)
@pytest.mark.parametrize("dtype", COMPUTED)
def test_honest_answers_are_within_the_tolerance_of_every_format(hidden, dtype, wire_format):
    norms = hidden.norm(dim=-1, keepdim=True)
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)) * norms / hidden.shape[-1] ** 0.5
    other = hidden + 0.5 * COMPUTED[dtype] * noise
    apart = deviation(rounded(hidden, wire_format), rounded(other, wire_format))
    assert apart.within(tolerance(dtype, [wire_format])), apart


@pytest.mark.parametrize("wire_format", WIRE_FORMATS)
def test_a_lie_of_one_in_a_hundred_is_beyond_the_tolerance_of_every_format(hidden, wire_format):
    apart = deviation(rounded(hidden * 1.01, wire_format), rounded(hidden, wire_format))
    assert apart.typical == pytest.approx(0.01, rel=0.1)
    assert not apart.within(tolerance("float32", [wire_format])), apart


def test_a_lie_about_few_positions_shows_in_the_largest_error_and_no_gradient_is_no_deviation(hidden):
    lie = hidden.clone()
    lie[0, 0] *= 1.1
    apart = deviation(rounded(lie, "float32"), rounded(hidden, "float32"))
    assert apart.largest == pytest.approx(0.1)
    assert apart.typical == 0
    nothing = torch.zeros(1, 3, 4)
    assert deviation(rounded(nothing, "float32"), rounded(nothing, "float32")) == Deviation(largest=0.0, typical=0.0)
    assert deviation(rounded(nothing + 1e-3, "float32"), rounded(nothing, "float32")).typical > 1


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

    def __init__(self, network: Network, wire_format: str = "float32"):
        super().__init__(network, verify=1.0, wire_format=wire_format)

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
    assert step.chain.client.stats.checks >= 10, "two micro-batches over two legs, forward and back, and the sums"
    assert step.chain.client.stats.outvoted == 0
    assert not step.chain.client.banned()
    assert not caplog.records


def scaled(kind: type[Message], field: str):
    def lie(reply: Message) -> Message:
        if not isinstance(reply, kind):
            return reply
        value = getattr(reply, field)
        wrong = [each * 1.01 for each in value] if isinstance(value, list) else value * 1.01
        return msgspec.structs.replace(reply, **{field: wrong})

    return lie


LIES = [
    (Forwarded, "hidden", "float32"),
    (Forwarded, "hidden", "bfloat16"),
    (Forwarded, "hidden", "blockwise8"),
    (Gradients, "hidden", "float32"),
    (Gradients, "hidden", "blockwise8"),
    (CollectedSum, "adapter", "float32"),
]


@pytest.mark.parametrize(("kind", "field", "wire_format"), LIES, ids=str)
def test_a_server_that_scales_its_answers_is_outvoted_banned_and_reported(network, kind, field, wire_format, caplog):
    liar = network.servers["b2"]
    liar.handler.lie = scaled(kind, field)
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
