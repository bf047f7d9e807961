"""Generation along a route: what is kept to be replayed, and the numbers of steps, whoever is lost meanwhile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from petals_tune.blocks.adapters import Adapter
from petals_tune.errors import Diverged, RequestRefused, SwarmTimeout
from petals_tune.swarm import loop
from petals_tune.swarm import session as module
from petals_tune.swarm.history import Inputs
from petals_tune.swarm.session import ChainSession
from petals_tune.wire.adapter import AdapterVersion
from petals_tune.wire.messages import Message, OpenSession, Refusal, Step, Stepped
from petals_tune.wire.span import BlockSpan
from tests.faults.network import Network
from tests.faults.step import WHOLE, WIDTH, adapter
from tests.models import ROPE_TYPES, relative_error
from tests.raising import raises
from tests.servers.parts import forward

ROWS, LENGTH, TOLERANCE = 2, 7, 1e-5
HIDDEN = torch.randn(ROWS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
PADDING = torch.tensor([[True] * LENGTH, [False] * 2 + [True] * (LENGTH - 2)])


class Generation:
    """A session over all blocks of a network."""

    def __init__(self, network: Network, *, adapter: AdapterVersion | None = None, max_length: int = 16, **policy: Any):
        self.chain = network.chain(reply_s=1.0, **policy)
        calls, repair = self.chain.calls, self.chain.repair
        self.session = ChainSession(calls, repair, WHOLE, rows=ROWS, max_length=max_length, adapter=adapter)

    def step(self, start: int, stop: int, *, order: torch.Tensor | None = None, hidden: torch.Tensor = HIDDEN) -> Any:
        part = Inputs(hidden=hidden[:, start:stop], padding=PADDING[:, start:stop], positions=None)
        return loop.run(self.session.step(part, position=start, order=order))

    def steps(self, *stops: int) -> torch.Tensor:
        return torch.cat([self.step(start, stop) for start, stop in zip((0, *stops), stops, strict=False)], dim=1)


def of_one_engine(network: Network, hidden: torch.Tensor = HIDDEN, parts: Adapter | None = None) -> torch.Tensor:
    """The outputs for all positions at once."""
    length = hidden.shape[1]
    return network.engine("0:6").forward(forward("0:6", hidden, padding=PADDING[:, :length]), parts).output


def check(found: torch.Tensor, expected: torch.Tensor) -> None:
    real = PADDING[:, -found.shape[1] :]
    assert relative_error(found[real], expected[:, -found.shape[1] :][real]) <= TOLERANCE


def test_steps_give_the_numbers_of_all_positions_at_once(network):
    generation = Generation(network)
    check(generation.steps(4, 5, 6, LENGTH), of_one_engine(network))
    assert network.calls["a", "OpenSession"] == network.calls["b", "OpenSession"] == 1
    assert network.calls["a", "Step"] == network.calls["b", "Step"] == 4


def test_a_session_has_the_adapter_that_it_was_opened_with(network):
    generation = Generation(network, adapter=adapter())
    check(generation.steps(4, LENGTH), of_one_engine(network, parts=Adapter(adapter().parts)))
    assert network.calls["a", "PutAdapter"] == 1


def test_a_step_at_an_earlier_position_forgets_what_lay_behind(network):
    generation = Generation(network)
    generation.steps(4, LENGTH)
    other = HIDDEN.clone()
    other[:, 3:] = HIDDEN[:, 3:].flip(1)
    check(generation.step(3, LENGTH, hidden=other), of_one_engine(network, other))


def test_rows_go_on_in_another_order_also_on_a_server_that_comes_later(network):
    """The later server has seen neither the rows nor their new order."""
    generation, order = Generation(network), torch.tensor([0, 0])
    generation.steps(4)
    generation.step(4, 5, order=order)
    fault = network.fault("b", Step, lambda: replaced(network))
    found = generation.step(5, LENGTH)
    assert fault.fired.is_set()
    whole = HIDDEN.clone()
    whole[:, :4] = HIDDEN[order, :4]
    padding = PADDING.clone()
    padding[:, :4] = PADDING[order, :4]
    expected = network.engine("0:6").forward(forward("0:6", whole, padding=padding), None).output
    assert relative_error(found, expected[:, 5:]) <= TOLERANCE


async def replaced(network: Network, *spans: str) -> None:
    """The server of the second half is lost, and there are others."""
    await network.end("b")
    for span in spans or ("3:6",):
        await network.start(f"new {span}", span)


@pytest.mark.parametrize("spans", [("3:6",), ("3:4", "4:6")], ids=["one other", "two others"])
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_a_server_that_is_lost_is_replaced_and_its_inputs_alone_are_replayed(network, spans, skip):
    fault = network.fault("b", Step, lambda: replaced(network, *spans), skip=skip)
    found = Generation(network).steps(4, 5, LENGTH)
    assert fault.fired.is_set()
    check(found, of_one_engine(network))
    assert network.calls["a", "OpenSession"] == 1
    assert network.calls["a", "Step"] == 3, "its caches are as they were"
    for span in spans:
        assert network.calls[f"new {span}", "Step"] == 3, "what was before, and what was to come"


def test_a_server_that_is_lost_while_a_session_is_opened_is_replaced(network):
    fault = network.fault("b", OpenSession, lambda: replaced(network))
    check(Generation(network).steps(4, LENGTH), of_one_engine(network))
    assert fault.fired.is_set()
    assert network.calls["a", "OpenSession"] == 1


def test_a_server_that_forgot_its_session_is_given_it_again(network):
    generation = Generation(network)
    before = generation.step(0, 4)
    handler = network.servers["b"].handler
    handler.stores.sessions.drop_client("client")
    check(torch.cat([before, generation.step(4, LENGTH)], dim=1), of_one_engine(network))
    assert network.calls["b", "OpenSession"] == 2
    assert network.calls["b", "Step"] == 4, "before, in vain, again, and then the new ones"


def test_a_prompt_is_read_in_pieces(network, monkeypatch):
    monkeypatch.setattr(module, "MOST_POSITIONS", 3)
    check(Generation(network).steps(LENGTH), of_one_engine(network))
    assert network.calls["a", "Step"] == 3


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_what_is_replayed_has_the_frequencies_of_the_first_time(model_folder, monkeypatch, rope_type):
    """A prompt of 12 positions in parts of 5, behind which the text goes back to 10."""
    monkeypatch.setattr(module, "MOST_POSITIONS", 5)
    hidden = torch.randn(ROWS, 14, WIDTH, generator=torch.Generator().manual_seed(1))
    network = Network(model_folder("llama", **ROPE_TYPES[rope_type]))

    def generate(*, lost: bool) -> torch.Tensor:
        for name, span in {"a": "0:3", "b": "3:6"}.items():
            network.serve(name, span)
        generation = Generation(network)
        outputs = []
        for start, stop in ((0, 12), (10, 11), (11, 14)):
            fault = network.fault("b", Step, lambda: replaced(network)) if lost and start == 11 else None
            part = Inputs(hidden=hidden[:, start:stop], padding=None, positions=None, context_length=stop)
            outputs.append(loop.run(generation.session.step(part, position=start, order=None)))
            assert fault is None or fault.fired.is_set()
        network.disconnect_clients()
        return torch.cat(outputs, dim=1)

    try:
        assert torch.equal(generate(lost=True), generate(lost=False))
    finally:
        network.stop()


def test_a_session_that_would_be_too_long_says_what_would_do_and_goes_on(network):
    generation = Generation(network, max_length=5)
    generation.steps(4)
    with raises(RequestRefused, reason="too long", max_length=6):
        generation.step(4, 6)
    check(generation.step(4, 5), of_one_engine(network, HIDDEN[:, :5]))


def test_a_session_gives_its_caches_back(network):
    generation = Generation(network)
    generation.steps(4)
    sessions = [server.handler.stores.sessions for server in network.servers.values()]
    assert [len(each) for each in sessions] == [1, 1]
    loop.run(generation.session.close())
    loop.run(generation.chain.forward(HIDDEN, generation.session._context, WHOLE, keep=False, input_grad=False))
    assert [len(each) for each in sessions] == [0, 0]


def test_a_session_that_cannot_be_opened_gives_back_what_was(network):
    """Blocks 3:6 have no room: the caches on 0:3 are not left behind."""
    generation = Generation(network, max_length=10**7)
    sessions_of_a = network.servers["a"].handler.stores.sessions
    sessions_of_a.max_bytes = 2**60
    with raises(RequestRefused, limit="max_cache_gb"):
        generation.steps(4)
    loop.run(
        generation.chain.forward(HIDDEN, generation.session._context, BlockSpan(0, 3), keep=False, input_grad=False)
    )
    assert network.calls["a", "OpenSession"] == 1
    assert len(sessions_of_a) == 0


def lie_in_steps(network: Network, name: str, span: str, changed: Callable[[Message], Message]) -> None:
    """Start a server that opens sessions and answers every step wrongly."""
    handler = network.serve(name, span).handler
    handler.lie = lambda reply: changed(reply) if isinstance(reply, Stepped) else reply


@pytest.mark.parametrize("names", [("b2",), ("b2", "b3")], ids=["one server", "two servers"])
def test_servers_that_open_sessions_and_return_nan_end_a_step(network, names):
    """To open a session is no progress: with that, they were asked for ever."""
    network.kill("b")
    for name in names:
        lie_in_steps(network, name, "3:6", lambda reply: Stepped(hidden=torch.full_like(reply.hidden, torch.nan)))
    with raises(Diverged):
        Generation(network).steps(4)


def test_servers_that_open_sessions_replay_them_and_refuse_new_steps_use_up_the_attempts(network):
    generation = Generation(network, attempts=3)
    generation.steps(4)
    network.kill("b")
    busy = Refusal(error="ServerBusy", text="no")
    for name in ("b2", "b3", "b4"):
        lie_in_steps(network, name, "3:6", lambda reply: busy if reply.hidden.shape[1] == 1 else reply)
    with raises(SwarmTimeout, limit="swarm.attempts", attempts=3):
        generation.step(4, 5)
