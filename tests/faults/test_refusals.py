"""One server's refusal ends no run: another one contradicts it, and the first is left alone, or agrees: both are named.

Where nobody else holds the blocks, the only server's word is final.
"""

from collections.abc import Iterator
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
from petals_tune.swarm.routes.bans import LONGEST_BAN_S
from petals_tune.wire.messages import Backward, Forwarded, Gradients, Message, Refusal
from tests.faults.network import Network, id_of
from tests.faults.step import LENGTH, TrainingStep, check
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
    with raises(RequestTooLarge, limit="max_tokens", size=LENGTH):
        step_of(network).run()
    assert network.calls["liar", "Forward"] > 2
    assert not network.calls["liar", Backward.__name__]
