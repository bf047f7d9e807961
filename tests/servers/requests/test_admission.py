"""Fair shares and limits, as plain values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_tune.errors import ServerBusy
from servers.requests.admission import Gate, RequestLimits
from servers.stores.budget import MAX_HOLDINGS, Shares

CLIENTS = st.sampled_from(["a", "b", "c"])


def gate(**changes: float) -> Gate:
    limits = {"max_streams": 6, "max_streams_per_client": 2, "max_in_flight": 3}
    limits |= {"max_requests_per_s": 10.0, "max_request_s": 60.0}
    sizes = {"max_receiving_bytes": 100, "max_message_bytes": 100, "max_positions": 8, "max_tokens": 16}
    return Gate(RequestLimits(**{**limits, **sizes, **changes}))


@given(st.lists(st.tuples(CLIENTS, st.integers(1, 60), st.booleans()), max_size=60))
def test_shares_stay_within_the_budget_and_nobody_within_its_share_gives_anything_up(wishes):
    shares: Shares[int] = Shares(100)
    held: dict[int, tuple[str, int]] = {}
    for key, (client, size, drops) in enumerate(wishes):
        mine = [each for each, (holder, _) in held.items() if holder == client]
        assert shares.of(client) == mine
        if drops and mine:
            shares.drop(mine[0])
            del held[mine[0]]
            continue
        by_client = {c: sum(s for holder, s in held.values() if holder == c) for c in "abc"}
        share = 100 // len({client, *(holder for holder, _ in held.values())})
        leaving = shares.make_room(client, size)
        if leaving is None:
            assert by_client[client] + size > share, "who stays within its share always gets it"
            assert sum(by_client.values()) + size > 100
            continue
        for other in leaving:
            holder, lost = held.pop(other)
            assert holder != client
            assert by_client[holder] > share
            by_client[holder] -= lost
            shares.drop(other)
        shares.hold(key, client, size)
        held[key] = (client, size)
        assert shares.used_bytes == sum(size for _, size in held.values()) <= 100


def test_many_small_things_of_one_client_are_bounded_by_their_number():
    shares: Shares[int] = Shares(10**9)
    for key in range(MAX_HOLDINGS):
        shares.hold(key, "greedy", 1)
    assert shares.make_room("greedy", 1) is None
    assert shares.make_room("other", 1) == []


def test_what_others_hold_beyond_their_share_counts_as_room():
    shares: Shares[str] = Shares(100)
    assert shares.room_for("a") == 100
    shares.hold("x", "a", 90)
    assert (shares.room_for("a"), shares.room_for("b")) == (10, 50)
    assert shares.make_room("b", 50) == ["x"]
    assert shares.make_room("b", 51) is None


def test_streams_are_counted_by_client_and_in_all():
    door = gate(max_streams=3)
    first = door.enter("a")
    assert door.enter("a") is first
    with pytest.raises(ServerBusy, match="more than 2 streams of one client"):
        door.enter("a")
    door.enter("b")
    with pytest.raises(ServerBusy, match="3 streams open"):
        door.enter("c")
    door.leave("a")
    assert "a" in door
    door.leave("a")
    assert "a" not in door
    assert door.enter("a") is not first


def test_requests_in_flight_are_counted_over_all_streams_of_a_client():
    door = gate()
    guest, other = door.enter("a"), door.enter("b")
    for _ in range(3):
        guest.begin()
    with pytest.raises(ServerBusy, match="more than 3 requests in flight"):
        door.enter("a").begin()
    other.begin()
    guest.end()
    guest.begin()


def test_a_second_of_requests_may_come_at_once_and_the_next_ones_at_their_pace():
    guest = gate(max_requests_per_s=10).enter("a")
    assert [guest.pause_s(100.0) for _ in range(10)] == [0.0] * 10
    assert [guest.pause_s(100.0) for _ in range(3)] == pytest.approx([0.1, 0.2, 0.3])
    assert guest.pause_s(100.5) == 0.0 or guest.pause_s(100.5) <= 0.1
    assert guest.pause_s(10_000.0) == 0.0, "waiting earns one second's worth, no more"
    assert [guest.pause_s(10_000.0) for _ in range(10)][-1] == pytest.approx(0.1)


@given(st.lists(st.tuples(CLIENTS, st.integers(1, 60)), max_size=40))
def test_whoever_comes_next_finds_room_to_receive(requests):
    door = gate(max_receiving_bytes=128, max_streams=20, max_streams_per_client=20)
    guests = {client: door.enter(client) for client in "abc"}
    for client, size in requests:
        guests[client].take(size)
        assert door.receiving_bytes <= 128
        new, half = door.enter("new"), (128 - door.receiving_bytes) // 2
        assert new.take(half)
        new.give_back(half)
        door.leave("new")


def test_alone_a_client_may_have_half_of_the_memory_for_requests_under_way():
    guest = gate(max_receiving_bytes=100).enter("a")
    assert guest.take(50)
    assert not guest.take(1)
    guest.give_back(50)
    assert not guest.take(51)
