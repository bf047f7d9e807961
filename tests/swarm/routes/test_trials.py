import msgspec
import pytest

from petals_tune.swarm.routes.table import ServerTable
from petals_tune.swarm.routes.trials import (
    ANSWERS,
    FIRST_PAUSE_S,
    LEAST_S,
    LONGEST_PAUSE_S,
    MOST_TIMES,
    Trials,
    hosts_of,
)
from petals_tune.wire.records import ServerRecord
from tests.swarm.routes.test_route import server


def at(host: str, peer: str) -> ServerRecord:
    return msgspec.structs.replace(server(peer, 0, 4), addresses=(f"/ip4/{host}/tcp/1/p2p/{peer}",))


def test_a_newcomer_has_to_answer_soon_until_it_answered_a_few_times():
    trials, new = Trials(), at("10.0.0.1", "new")
    trials.begin("new", expected_s=0.1)
    assert trials.limits_s == {"new": LEAST_S}
    trials.begin("new", expected_s=20.0)
    assert trials.limits_s == {"new": 20.0 * MOST_TIMES}, "large work takes long"
    for _ in range(ANSWERS):
        assert trials.limits_s
        trials.answered(new)
    trials.begin("new", expected_s=0.1)
    assert not trials.limits_s, "it is none any more"


def test_newcomers_that_fail_put_the_next_one_off_ever_longer_until_one_works():
    trials, now_s = Trials(), 100.0
    pauses = []
    for number in range(8):
        assert trials.allowed(now_s)
        trials.begin(f"liar {number}", 0.1)
        trials.failed(at("10.0.0.1", f"liar {number}"), now_s)
        assert not trials.allowed(now_s)
        pauses.append(next(s for s in range(1, 100) if trials.allowed(now_s + s)))
        now_s += 1000.0
    assert pauses == [min(FIRST_PAUSE_S * 2**number, LONGEST_PAUSE_S) for number in range(8)]
    trials.begin("good", 0.1)
    trials.answered(at("10.0.0.2", "good"))
    trials.begin("liar", 0.1)
    trials.failed(at("10.0.0.1", "liar"), now_s)
    assert trials.allowed(now_s + FIRST_PAUSE_S)


def test_a_server_that_did_much_and_fails_is_no_newcomer_that_failed():
    trials, one = Trials(), at("10.0.0.1", "one")
    trials.begin("one", 0.1)
    trials.answered(one)
    trials.failed(one, 100.0)
    assert trials.allowed(100.0)
    assert not trials.limits_s


def test_newcomers_at_a_host_where_more_failed_than_worked_are_suspects():
    trials = Trials()
    table = ServerTable([at("10.0.0.1", "a"), at("10.0.0.1", "b"), at("10.0.0.2", "c")])
    assert trials.suspects(table).tolist() == [False, False, False]
    trials.failed(at("10.0.0.1", "x"), 100.0)
    assert trials.suspects(table).tolist() == [True, True, False]
    trials.answered(at("10.0.0.1", "a"))
    assert trials.suspects(table).tolist() == [False, False, False]
    assert trials.suspects(table, slow=["c", "gone"]).tolist() == [False, False, True]
    assert trials.allowed(100.0), "who could only not be reached had no work"


@pytest.mark.parametrize(
    ("addresses", "hosts"),
    [
        (("/ip4/10.0.0.1/tcp/1/p2p/Q", "/ip4/10.0.0.1/udp/1/quic/p2p/Q", "/dns4/a.net/tcp/1"), ("10.0.0.1", "a.net")),
        (("/ip6/fe80::1/tcp/1/p2p/Q",), ("fe80::1",)),
        (("/ip4/9.9.9.9/tcp/1/p2p/R/p2p-circuit/p2p/Q",), ("peer",)),
        (("/", "nonsense"), ("peer",)),
        ((), ("peer",)),
    ],
)
def test_a_server_is_at_the_hosts_that_it_announces_and_a_relay_is_none_of_them(addresses, hosts):
    assert hosts_of(msgspec.structs.replace(server("peer", 0, 4), addresses=addresses)) == hosts


def test_a_bounded_number_of_hosts_is_remembered_those_heard_of_last(monkeypatch):
    monkeypatch.setattr("petals_tune.swarm.routes.trials.MAX_HOSTS", 3)
    trials = Trials()
    for number in (1, 2, 3, 1, 4):
        trials.failed(at(f"10.0.0.{number}", f"liar {number}"), 100.0)
    table = ServerTable([at(f"10.0.0.{number}", f"new {number}") for number in (1, 2, 3, 4)])
    suspect = {server.peer for server, bad in zip(table.servers, trials.suspects(table), strict=True) if bad}
    assert suspect == {"new 1", "new 3", "new 4"}
