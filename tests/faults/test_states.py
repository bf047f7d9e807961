"""Blocks with a state in a generation that loses a server and goes back: the numbers of an undisturbed one."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from petals_tune.swarm import loop
from petals_tune.swarm.chain import Chain
from petals_tune.swarm.history import Inputs
from petals_tune.swarm.session import ChainSession
from petals_tune.wire.messages import Step
from petals_tune.wire.span import BlockSpan
from tests.faults.network import Network
from tests.models import relative_error, save_model
from tests.servers.parts import forward
from tests.servers.steps import TOLERANCE, hidden

ALL = BlockSpan(0, 6)


@pytest.fixture(
    scope="module", params=["qwen3_next", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bamba", "jamba"))]
)
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    folder: Path = save_model(tmp_path_factory.mktemp("model") / request.param, request.param)
    network = Network(folder)
    yield network
    network.stop()


@pytest.fixture
def chain(network: Network) -> Iterator[Chain]:
    for name, span in (("a", "0:3"), ("b", "3:6"), ("b2", "3:6")):
        if name not in network.servers:
            network.serve(name, span)
    chain = network.chain()
    yield chain
    loop.run(chain.client.close())


class Generation:
    """A session on the whole chain, and the text that it is given."""

    def __init__(self, chain: Chain, rows: int = 2):
        self.session = ChainSession(chain.calls, chain.repair, ALL, rows=rows, max_length=64, adapter=None)
        self.text = hidden(rows, 0, 0)

    def step(self, new: torch.Tensor, position: int, order: torch.Tensor | None = None) -> torch.Tensor:
        before = self.text[:, :position] if order is None else self.text[order, :position]
        self.text = torch.cat([before, new], dim=1)
        inputs = Inputs(hidden=new, padding=None, positions=None)
        return loop.run(self.session.step(inputs, position=position, order=order))

    def servers(self) -> list[str]:
        return [each.hop.server.peer for each in self.session._sessions]

    def close(self) -> None:
        loop.run(self.session.close())


def expected(network: Network, text: torch.Tensor) -> torch.Tensor:
    """One pass over a text, through the blocks of both halves."""
    for span in ("0:3", "3:6"):
        text = network.engine(span).forward(forward(span, text), None).output
    return text


def test_a_killed_server_is_replaced_and_the_text_goes_on(network, chain):
    with closing(Generation(chain)) as run:
        found = [run.step(hidden(2, 5, 0), 0), run.step(hidden(2, 1, 1), 5)]
        lost = next(name for name in ("b", "b2") if name in run.servers()[1].split("-"))
        fault = network.fault(lost, Step, lambda: network.end(lost))
        found += [run.step(hidden(2, 1, at), at) for at in range(6, 10)]
        assert fault.fired.is_set()
        assert lost not in run.servers()[1].split("-")
        assert relative_error(torch.cat(found, dim=1), expected(network, run.text)) < TOLERANCE


@pytest.mark.parametrize("back", [9, 7, 3])
def test_a_session_goes_back_to_what_servers_keep_and_to_what_they_do_not(network, chain, monkeypatch, back):
    """To 3, inside the prompt and before its second step, the client replays."""
    monkeypatch.setattr("petals_tune.blocks.generation.states.SPACING", 2)
    network.calls.clear()
    with closing(Generation(chain)) as run:
        run.step(hidden(2, 4, 0), 0)
        for at in range(4, 10):
            run.step(hidden(2, 1, at), at)
        steps = sum(count for (_, kind), count in network.calls.items() if kind == "Step")
        assert steps == 2 * 7
        last = [run.step(hidden(2, 2, 20), back), run.step(hidden(2, 1, 21), back + 2)]
        steps = sum(count for (_, kind), count in network.calls.items() if kind == "Step") - steps
        assert (steps == 2 * 2) == (back >= 7), "where servers keep enough, nothing is sent again"
        assert relative_error(torch.cat(last, dim=1), expected(network, run.text)[:, back:]) < TOLERANCE


def test_beams_go_on_where_a_server_was_lost(network, chain):
    with closing(Generation(chain, rows=3)) as run:
        run.step(hidden(3, 4, 0), 0)
        run.step(hidden(3, 1, 1), 4, torch.tensor([1, 1, 0]))
        lost = next(name for name in ("b", "b2") if name in run.servers()[1].split("-"))
        network.kill(lost)
        last = run.step(hidden(3, 1, 2), 5, torch.tensor([2, 0, 2]))
        assert relative_error(last, expected(network, run.text)[:, 5:]) < TOLERANCE


@pytest.mark.parametrize("back", [37, 20])
def test_windows_go_back_a_little_and_to_what_they_do_not_keep_any_more(tmp_path_factory, monkeypatch, back):
    """Windows of 4, and 3 positions before them: to 37 of 40 the servers go back, to 20 the client replays."""
    monkeypatch.setattr("petals_tune.blocks.generation.memory.SLACK", 3)
    network = Network(save_model(tmp_path_factory.mktemp("model") / "mistral", "mistral"))
    try:
        for name, span in (("a", "0:3"), ("b", "3:6")):
            network.serve(name, span)
        chain = network.chain()
        with closing(Generation(chain)) as run:
            for at in range(0, 40, 2):
                run.step(hidden(2, 2, at), at)
            network.calls.clear()
            last = [run.step(hidden(2, 2, 50), back), run.step(hidden(2, 1, 51), back + 2)]
            steps = sum(count for (_, kind), count in network.calls.items() if kind == "Step")
            assert (steps == 2 * 2) == (back == 37), "where servers keep enough, nothing is sent again"
            assert relative_error(torch.cat(last, dim=1), expected(network, run.text)[:, back:]) < TOLERANCE
        loop.run(chain.client.close())
    finally:
        network.stop()


def test_a_session_that_finds_no_room_to_grow_goes_on_at_another_server(tmp_path_factory):
    """The first server has room for 16 positions; a second one comes."""
    network = Network(save_model(tmp_path_factory.mktemp("model") / "llama", "llama"))
    try:
        server = network.serve("a", "0:6")
        chain = network.chain()
        with closing(Generation(chain)) as run:
            run.step(hidden(2, 16, 0), 0)
            before = run.servers()
            kept = server.handler._executor._stores.sessions
            assert len(kept) == 1
            kept.max_bytes = kept.used_bytes + 1
            network.serve("b", "0:6")
            found = run.step(hidden(2, 1, 1), 16)
            assert run.servers() != before
            assert len(kept) == 0
            assert relative_error(found, expected(network, run.text)[:, 16:]) < TOLERANCE
        loop.run(chain.client.close())
    finally:
        network.stop()
