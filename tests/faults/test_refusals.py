"""One server's refusal ends no run: another one contradicts it, and the first is left alone, or agrees: both are named.

Where nobody else holds the blocks, the only server's word is final.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from petals_tune.errors import (
    AccessDenied,
    PetalsTuneError,
    ProtocolError,
    RequestRefused,
    RequestTooLarge,
    SwarmMismatch,
)
from petals_tune.swarm import loop
from petals_tune.swarm.history import Inputs
from petals_tune.swarm.routes.bans import LONGEST_BAN_S
from petals_tune.swarm.session import ChainSession
from petals_tune.wire.messages import Backward, Forwarded, Gradients, Message, Refusal, SessionOpened, Step
from tests.faults.network import Network, id_of
from tests.faults.step import LENGTH, REPLY_S, TOLERANCE, WHOLE, WIDTH, TrainingStep, check
from tests.models import relative_error
from tests.raising import raises
from tests.servers.peers import LIMITS

WORDS: list[PetalsTuneError] = [
    RequestRefused("no", reason="hidden size"),
    ProtocolError("no", what="message"),
    SwarmMismatch("no"),
    AccessDenied("no", reason="revoked"),
]


@pytest.fixture
def network(folder: Path) -> Iterator[Network]:
    """Blocks 0:3 at `a`, 3:6 at `liar`, which looks best."""
    network = Network(folder)
    network.serve("a", "0:3")
    network.serve("liar", "3:6")
    yield network
    network.stop()


def refusing(network: Network, word: PetalsTuneError, reply: type[Message] = Forwarded, name: str = "liar") -> None:
    network.servers[name].handler.lie = lambda found: Refusal.of(word) if isinstance(found, reply) else found


def step_of(network: Network) -> TrainingStep:
    step = TrainingStep(network)
    step.chain.client.load.correction[id_of("liar")] = 1e-9
    return step


@pytest.mark.parametrize("reply", [Forwarded, Gradients], ids=["forward", "backward"])
@pytest.mark.parametrize("word", WORDS, ids=lambda word: type(word).__name__)
def test_a_refusal_that_another_server_contradicts_costs_its_server_a_ban_and_is_reported_once(
    network, expected, word, reply, caplog
):
    network.serve("b", "3:6")
    refusing(network, word, reply)
    step = step_of(network)
    step.run()
    check(step, expected)
    assert network.calls["liar", "Forward"] >= 1
    client = step.chain.client
    now_s = client._bans.offended_until_s.get(id_of("liar"), 0.0)
    if isinstance(word, RequestRefused | ProtocolError):
        assert id_of("liar") in client._bans.offenders(now_s - LONGEST_BAN_S), "for longer than one that only failed"
    else:
        assert not now_s, "it may be honest: its list of names is newer, or it has moved to another model"
        assert id_of("liar") in client.banned()
    assert [text for text in caplog.messages if "refused what others did" in text and id_of("liar") in text] != []
    assert len([text for text in caplog.messages if "refused what others did" in text]) == 1


@pytest.mark.parametrize("word", WORDS, ids=lambda word: type(word).__name__)
def test_what_two_servers_refuse_ends_the_run_with_both_names(network, word):
    network.serve("b", "3:6")
    for name in ("liar", "b"):
        refusing(network, word, name=name)
    with raises(type(word), **vars(word)) as caught:
        step_of(network).run()
    assert all(id_of(name) in str(caught.value) for name in ("liar", "b"))


@pytest.mark.parametrize("word", WORDS, ids=lambda word: type(word).__name__)
def test_where_nobody_else_is_there_one_word_is_final_and_the_text_says_so(network, word):
    refusing(network, word)
    with raises(type(word), **vars(word)) as caught:
        step_of(network).run()
    assert f"only server {id_of('liar')} was there to ask" in str(caught.value)


def test_bad_input_is_the_runs_own_fault_however_many_servers_there_are(network):
    network.serve("b", "0:3")
    step = step_of(network)
    step.hidden[0, 0, 0] = torch.inf
    with raises(RequestRefused, reason="hidden not finite", block=0) as caught:
        step.run()
    assert all(id_of(name) in str(caught.value) for name in ("a", "b"))


def test_one_refusal_of_servers_that_together_do_the_work_is_contradicted_once_all_of_it_is_done(network, expected):
    network.serve("c", "3:5")
    network.serve("d", "5:6")
    refusing(network, WORDS[0])
    step = step_of(network)
    step.run()
    check(step, expected)
    assert id_of("liar") in step.chain.client._bans.offended_until_s


def test_a_server_that_lacks_again_and_again_what_it_was_sent_is_left(network, expected):
    network.serve("b", "3:6")
    network.servers["liar"].handler.lie = lambda found: (
        Refusal(error="LeaseLost", text="gone") if isinstance(found, Gradients) else found
    )
    step = step_of(network)
    step.run()
    check(step, expected)
    assert id_of("liar") in step.chain.client.banned()
    assert network.calls["b", "Backward"] >= 1


# Limits: what a server takes at once is in its Welcome


def limited(network: Network, name: str, span: str, **limits: int) -> None:
    handler = network.serve(name, span).handler
    handler._limits = handler._admission.limits = handler._executor._limits = replace(LIMITS, **limits)


@pytest.mark.parametrize("limits", [{"max_tokens": 1}, {"max_positions": LENGTH - 1}, {"max_message_bytes": 2**16}])
def test_a_server_that_takes_less_is_passed_over_and_not_banned(network, expected, limits):
    network.kill("liar")
    limited(network, "liar", "3:6", **limits)
    network.serve("b", "3:6")
    step = step_of(network)
    step.run()
    check(step, expected)
    assert not network.calls["liar", "Forward"]
    assert not step.chain.client.banned()


def test_where_all_take_fewer_tokens_the_error_says_how_many(network):
    network.kill("liar")
    limited(network, "liar", "3:6", max_tokens=LENGTH)
    limited(network, "b", "3:6", max_tokens=LENGTH - 2)
    step = step_of(network)

    async def forward() -> None:
        await step.chain.forward(step.hidden, step._call.context, step._call.span, keep=False, input_grad=False)

    with raises(RequestTooLarge, limit="max_tokens", size=step.hidden.shape[0] * LENGTH, fits=LENGTH):
        loop.run(forward())
    step.forward()
    assert network.calls["liar", "Forward"] == len(step.hidden), "row by row"


def test_where_all_take_fewer_positions_the_error_says_how_many(network):
    network.kill("liar")
    limited(network, "liar", "3:6", max_positions=LENGTH - 2)
    limited(network, "b", "3:6", max_positions=LENGTH - 1)
    with raises(RequestTooLarge, limit="max_positions", size=LENGTH, fits=LENGTH - 1):
        step_of(network).run()
    assert not network.calls["b", "Forward"]


@pytest.mark.parametrize("fits", [LENGTH, None])
def test_a_refusal_that_names_a_limit_is_asked_of_others_and_its_server_not_banned(network, expected, fits):
    network.serve("b", "3:6")
    refusing(network, RequestRefused("no", limit="max_compute_gb", fits=fits))
    step = step_of(network)
    step.run()
    check(step, expected)
    assert network.calls["liar", "Forward"] >= 1
    assert id_of("liar") not in step.chain.client.banned()
    asked = network.calls["liar", "Forward"]
    step.forward()
    assert network.calls["liar", "Forward"] == asked, "not again with as much"


def test_a_limit_of_the_only_server_is_met_by_smaller_requests(network):
    """As far as they go: then the error says that this one takes no more."""
    refusing(network, RequestRefused("no", limit="max_compute_gb"))
    with raises(RequestTooLarge, limit="max_compute_gb", size=LENGTH):
        step_of(network).run()
    assert network.calls["liar", "Forward"] > 2
    assert not network.calls["liar", Backward.__name__]


# Generation


class Generation:
    """A prompt of six positions and two single ones, in a session."""

    def __init__(self, network: Network):
        self._network, self.chain = network, network.chain(reply_s=REPLY_S)
        self._session = ChainSession(self.chain.calls, self.chain.repair, WHOLE, rows=2, max_length=16, adapter=None)
        drawn = torch.Generator().manual_seed(5)
        self._inputs = [torch.randn(2, length, WIDTH, generator=drawn) for length in (6, 1, 1)]

    def run(self, *, before_last: Callable[[], object] = lambda: None) -> torch.Tensor:
        outputs, position = [], 0
        for number, hidden in enumerate(self._inputs):
            if number == len(self._inputs) - 1:
                before_last()
            inputs = Inputs(hidden=hidden, padding=None, positions=None)
            outputs.append(loop.run(self._session.step(inputs, position=position, order=None)))
            position += len(inputs)
        self._network.disconnect_clients()
        return torch.cat(outputs, dim=1)


def lengths(network: Network, name: str) -> list[int]:
    """Positions of the steps that server `name` gets from now on."""
    handler, seen = network.servers[name].handler, []
    reply = handler._reply

    async def seeing(client: str, request: Message) -> Message:
        if isinstance(request, Step):
            seen.append(request.hidden.shape[1])
        return await reply(client, request)

    handler._reply = seeing  # type: ignore[method-assign]
    return seen


def test_a_step_that_the_only_server_refuses_for_its_size_is_made_in_smaller_ones(network):
    plain = Generation(network).run()
    handler = network.servers["liar"].handler
    reply = handler._reply

    async def refuse_long(client: str, request: Message) -> Message:
        if isinstance(request, Step) and request.hidden.shape[1] > 2:
            raise RequestRefused("no", limit="max_compute_gb", fits=5)  # two positions of two rows
        return await reply(client, request)

    handler._reply = refuse_long  # type: ignore[method-assign]
    seen = lengths(network, "liar")
    found = Generation(network).run()
    assert seen == [6, 2, 2, 2, 1, 1]
    assert relative_error(found, plain) <= TOLERANCE


def test_what_was_so_far_is_replayed_in_as_many_positions_as_another_server_takes(network):
    plain = Generation(network).run()
    limited(network, "b", "3:6", max_tokens=5)
    seen = lengths(network, "b")
    generation = Generation(network)
    generation.chain.client.load.correction[id_of("liar")] = 1e-9
    found = generation.run(before_last=lambda: network.kill("liar"))
    assert seen == [2, 2, 2, 1, 1]
    assert relative_error(found, plain) <= TOLERANCE


def test_a_session_that_no_server_has_room_for_is_refused_with_the_longest_that_would_fit(network):
    network.serve("b", "3:6")
    for name, length in (("liar", 5), ("b", 9)):
        word = RequestRefused("no", limit="max_cache_gb", max_length=length)
        refusing(network, word, SessionOpened, name)
    with raises(RequestRefused, limit="max_cache_gb", max_length=9) as caught:
        Generation(network).run()
    assert all(id_of(name) in str(caught.value) for name in ("liar", "b"))


def test_a_session_that_one_server_has_no_room_for_is_opened_at_another(network):
    plain = Generation(network).run()
    network.serve("b", "3:6")
    refusing(network, RequestRefused("no", limit="max_cache_gb", max_length=5), SessionOpened)
    generation = Generation(network)
    generation.chain.client.load.correction[id_of("liar")] = 1e-9
    assert relative_error(generation.run(), plain) <= TOLERANCE
    assert network.calls["liar", "OpenSession"] == 2, "one is of the plain run"
    assert not generation.chain.client.banned()
