from dataclasses import dataclass

import pytest

from petals_tune.swarm import hand_over
from petals_tune.swarm.hand_over import APART_S, FAR_S, HandOverRules
from petals_tune.wire.records import ServerRecord
from tests.swarm.test_trace import ROUTE


@dataclass
class Stream:
    round_trip_s: float


class Streams:
    """A client with an open stream to each server whose round trip is given."""

    def __init__(self, **round_trips_s: float):
        self._streams = {peer: Stream(round_trip_s) for peer, round_trip_s in round_trips_s.items()}

    def open_stream(self, server: ServerRecord) -> Stream | None:
        return self._streams.get(server.peer)


A, B, C = ROUTE
FAR, NEAR = 2 * FAR_S, FAR_S / 2


def applies(rule: str, **round_trips_s: float) -> bool:
    named = {{"a": A, "b": B}[name].server.peer: seconds for name, seconds in round_trips_s.items()}
    return HandOverRules(Streams(**named), rule).applies(A, B)  # type: ignore[arg-type]


def test_servers_hand_on_by_themselves_where_both_are_far():
    assert applies("auto", a=FAR, b=FAR)
    assert not applies("auto", a=FAR, b=NEAR)
    assert not applies("auto", a=NEAR, b=FAR)
    assert not applies("auto", a=FAR), "the round trip to the other one is not known"
    assert applies("always", a=NEAR, b=NEAR)
    assert not applies("never", a=FAR, b=FAR)


def test_two_servers_that_could_not_reach_each_other_are_left_alone_for_a_while(monkeypatch):
    now_s = 100.0
    monkeypatch.setattr(hand_over.time, "monotonic", lambda: now_s)
    rules = HandOverRules(Streams(), "always")  # type: ignore[arg-type]
    rules.failed(A.server.peer, B.server.peer)
    assert not rules.applies(A, B)
    assert rules.applies(B, C)
    assert rules.applies(B, A), "the other direction was not tried"
    now_s += APART_S
    assert rules.applies(A, B)


def test_a_pass_has_one_ticket_between_neighbours_that_hand_on():
    rules = HandOverRules(Streams(), "always")  # type: ignore[arg-type]
    (*first, ticket), (*second, other_ticket) = rules.tickets(ROUTE)
    assert (first, second) == ([A, B], [B, C])
    assert ticket != other_ticket
    rules.failed(A.server.peer, B.server.peer)
    assert [hops for *hops, _ in rules.tickets(ROUTE)] == [[B, C]]


@pytest.mark.parametrize("hops", [(), (A,)])
def test_a_pass_of_less_than_two_servers_hands_nothing_on(hops):
    assert not list(HandOverRules(Streams(), "always").tickets(hops))  # type: ignore[arg-type]
