"""Generation along a route: what is kept to be replayed, and the numbers of steps, whoever is lost meanwhile."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from petals_tune.blocks.adapters import Adapter
from petals_tune.errors import Diverged, RequestRefused, ServerBusy, SwarmTimeout, UncoveredBlocks
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


# Forks: another session that begins with what this one holds.


def fork(generation: Generation, position: int, *, rows: int = ROWS, order: torch.Tensor | None = None) -> Generation:
    forked = copy.copy(generation)
    forked.session = loop.run(generation.session.fork(position, rows=rows, max_length=16, order=order))
    return forked


def test_a_fork_sends_nothing_that_the_session_has_sent(network):
    generation = Generation(network)
    generation.steps(4, 5)
    order = torch.tensor([1, 1, 0])
    forked = fork(generation, 4, rows=3, order=order)
    assert network.calls["a", "OpenSession"] == network.calls["b", "OpenSession"] == 2
    assert network.calls["a", "Step"] == 2
    other = HIDDEN[order].flip(2)
    found = loop.run(
        forked.session.step(Inputs(hidden=other[:, 4:], padding=None, positions=None), position=4, order=None)
    )
    check(generation.step(5, LENGTH), of_one_engine(network))
    assert network.calls["a", "Step"] == 4
    whole = torch.cat([HIDDEN[order, :4], other[:, 4:]], dim=1)
    padding = torch.cat([PADDING[order, :4], torch.ones(3, LENGTH - 4, dtype=torch.bool)], dim=1)
    expected = network.engine("0:6").forward(forward("0:6", whole, padding=padding), None).output
    assert relative_error(found, expected[:, 4:]) <= TOLERANCE


@pytest.mark.parametrize("lost", ["before", "after", "its session alone"])
def test_a_fork_is_replayed_where_its_server_is_lost(network, lost):
    generation = Generation(network)
    generation.steps(4, 6)
    if lost == "before":
        loop.run(replaced(network))
    elif lost == "its session alone":
        network.servers["b"].handler.stores.sessions.drop_client("client")
    forked = fork(generation, 4)
    if lost == "after":
        fault = network.fault("b", Step, lambda: replaced(network))
    whole = of_one_engine(network)
    check(forked.step(4, LENGTH), whole)
    check(generation.step(6, LENGTH), whole)
    assert lost != "after" or fault.fired.is_set()


def test_a_fork_of_nothing_and_one_that_is_closed(network):
    generation = Generation(network)
    assert fork(generation, 0).session._sessions == []
    generation.steps(4)
    forked = fork(generation, 4)
    loop.run(forked.session.close())
    check(generation.step(4, LENGTH), of_one_engine(network))
    forked = fork(generation, 5)
    loop.run(generation.session.close())
    check(forked.step(5, LENGTH), of_one_engine(network))


def test_a_fork_that_fails_leaves_nothing_behind(network):
    """Nobody has blocks 3:6 any more: the fork on 0:3 is given back."""
    generation = Generation(network, timeout_s=0.1)
    generation.steps(4)
    network.kill("b")
    with raises(UncoveredBlocks, missing=(BlockSpan(3, 6),)):
        fork(generation, 4)
    loop.run(
        generation.chain.forward(HIDDEN, generation.session._context, BlockSpan(0, 3), keep=False, input_grad=False)
    )
    assert len(network.servers["a"].handler.stores.sessions) == 1


# Budgets count what sessions hold: one may be refused room in the middle.

LONG = torch.randn(ROWS, 20, WIDTH, generator=torch.Generator().manual_seed(2))  # more than a cache begins with


def long_step(generation: Generation, start: int, stop: int) -> torch.Tensor:
    part = Inputs(hidden=LONG[:, start:stop], padding=None, positions=None)
    return loop.run(generation.session.step(part, position=start, order=None))


def two_sessions(network: Network) -> tuple[Generation, Generation]:
    """On servers that have room for one in full, and for two that are short."""
    one = Generation(network, max_length=32, attempts=4)
    two = copy.copy(one)
    two.session = ChainSession(one.chain.calls, one.chain.repair, WHOLE, rows=ROWS, max_length=32, adapter=None)
    for each in (one, two):
        long_step(each, 0, 10)
    for server in network.servers.values():
        store = server.handler.stores.sessions
        store.max_bytes = int(1.2 * store.used_bytes)
        assert len(store) == 2
    return one, two


def test_a_session_that_cannot_grow_goes_on_at_another_server(network):
    one, two = two_sessions(network)
    network.serve("b2", "3:6")
    network.servers["a"].handler.stores.sessions.max_bytes = 2**30
    expected = network.engine("0:6").forward(forward("0:6", LONG), None).output
    assert relative_error(long_step(two, 10, 20), expected[:, 10:]) <= TOLERANCE
    assert network.calls["b2", "OpenSession"] == 1
    assert relative_error(long_step(one, 10, 20), expected[:, 10:]) <= TOLERANCE
    assert network.calls["b2", "OpenSession"] == 1, "there is room at b again"


def test_a_session_that_cannot_grow_anywhere_waits_for_room(network, monkeypatch):
    one, two = two_sessions(network)
    pause, errors = two.chain.repair.pause, []

    async def note(attempts: Any, error: Any) -> None:
        errors.append(error)
        if len(errors) == 2:
            await one.session.close()
        await pause(attempts, error)

    monkeypatch.setattr(two.chain.repair, "pause", note)
    expected = network.engine("0:6").forward(forward("0:6", LONG), None).output
    assert relative_error(long_step(two, 10, 20), expected[:, 10:]) <= TOLERANCE
    assert [type(error) for error in errors[:2]] == [ServerBusy] * 2
    assert {error.limit for error in errors[:2]} == {"max_cache_gb"}


def test_a_session_that_never_gets_room_ends_after_so_many_attempts(network):
    _, two = two_sessions(network)
    with raises(SwarmTimeout, limit="swarm.attempts", attempts=4):
        long_step(two, 10, 20)
