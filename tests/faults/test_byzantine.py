"""Every kind of message x every refusal, delay and wrong answer to it x each phase of training and generation.

Beside the server that does it there is an honest one, and the numbers are those of a run without it, every time. Where
it is alone, they are too, or the run ends with an error that names it.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from petals_tune.errors import PetalsTuneError
from petals_tune.wire.messages import (
    Chained,
    ChainedReply,
    CollectedSum,
    Done,
    Forwarded,
    Gradients,
    Hello,
    Message,
    Ping,
    Pong,
    Refusal,
    SessionOpened,
    Stepped,
    Welcome,
)
from tests.faults.byzantine import BAD, MISDEEDS, PHASES, ByzantineNetwork, Phase, Plan
from tests.faults.network import id_of
from tests.faults.step import REPLY_S
from tests.models import relative_error

pytestmark = pytest.mark.usefixtures("short_silence")

REPLIES = {Welcome, Pong, Forwarded, Gradients, CollectedSum, SessionOpened, Stepped, ChainedReply, Done, Refusal}
KINDS = [kind for kind in Message.__subclasses__() if kind not in REPLIES]
TOLERANCE = 1e-6


class Nothing(Message, frozen=True, tag="nothing"):
    """No message of this kind is ever sent."""


@cache
def undisturbed(folder: Path, phase: Phase) -> tuple[list[torch.Tensor], set[type[Message]]]:
    """The numbers of a phase whose servers are all honest, and the kinds of messages that one of them got."""
    plan = Plan(kind=Nothing, misdeed=MISDEEDS["never"])
    network = ByzantineNetwork(folder, plan, hand_over=phase.hand_over, has_second=True)
    found = phase.run(network)
    network.stop()
    assert not plan.fired
    return found, plan.seen


def cases() -> Iterator[object]:
    """All of them; those of the fast set are spread over the phases, kinds and misdeeds."""
    number = 0
    for kind in KINDS:
        for phase in PHASES:
            for misdeed in MISDEEDS:
                number += 1
                marks = () if number % SAMPLED == 0 else pytest.mark.slow
                yield pytest.param(phase, kind, misdeed, marks=marks, id=f"{kind.__name__}-{phase.name}-{misdeed}")


SAMPLED = 53


def skip_what_is_not_sent(folder: Path, phase: Phase, kind: type[Message]) -> None:
    _, seen = undisturbed(folder, phase)
    if kind not in seen and kind is not Ping:
        pytest.skip(f"no {kind.__name__} is sent in {phase.name}")


@pytest.mark.parametrize(("phase", "kind", "misdeed"), list(cases()))
def test_beside_an_honest_server_the_numbers_are_the_same(folder, phase, kind, misdeed):
    skip_what_is_not_sent(folder, phase, kind)
    expected, _ = undisturbed(folder, phase)
    plan = Plan(kind=kind, misdeed=MISDEEDS[misdeed])
    network = ByzantineNetwork(folder, plan, hand_over=phase.hand_over, has_second=True)
    try:
        found = phase.run(network)
    finally:
        network.stop()
    assert plan.fired
    assert len(found) == len(expected)
    assert max(relative_error(*pair) for pair in zip(found, expected, strict=True)) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("misdeed", MISDEEDS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
def test_alone_it_is_named_where_the_run_ends(folder, phase, kind, misdeed):
    skip_what_is_not_sent(folder, phase, kind)
    expected, _ = undisturbed(folder, phase)
    plan = Plan(kind=kind, misdeed=MISDEEDS[misdeed])
    network = ByzantineNetwork(folder, plan, hand_over=phase.hand_over, has_second=False)
    found, said = expected, id_of(BAD)
    try:
        found = phase.run(network, timeout_s=0.3, reply_s=3 * REPLY_S, connect_s=2 * REPLY_S)
    except PetalsTuneError as error:
        said = str(error)
    finally:
        network.stop()
    assert id_of(BAD) in said
    assert max(relative_error(*pair) for pair in zip(found, expected, strict=True)) <= TOLERANCE
    assert plan.fired


def test_every_kind_of_message_is_a_reply_or_met_by_the_bad_server_in_some_phase(folder):
    seen = {Ping}.union(*(undisturbed(folder, phase)[1] for phase in PHASES))
    assert seen == set(KINDS)
    assert {Hello, Chained} <= seen
