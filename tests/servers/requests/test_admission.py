"""Quotas of clients, as plain values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_tune.errors import ServerBusy
from servers.requests.admission import Admission, RequestLimits, Reservation
from tests.raising import raises

CLIENTS = st.sampled_from(["a", "b", "c"])


def admission(**changes: float) -> Admission:
    limits = {"max_streams": 6, "max_streams_per_client": 2, "max_in_flight": 3}
    limits |= {"max_requests_per_s": 10.0, "max_request_s": 60.0}
    sizes = {"max_receiving_bytes": 100, "max_message_bytes": 100, "max_positions": 8, "max_tokens": 16}
    sizes |= {"max_compute_bytes": 100}
    return Admission(RequestLimits(**{**limits, **sizes, **changes}))


def test_streams_are_counted_by_client_and_in_all():
    admitted = admission(max_streams=3)
    first = admitted.open_stream("a")
    assert admitted.open_stream("a") is first
    with raises(ServerBusy, limit="max_streams_per_client"):
        admitted.open_stream("a")
    admitted.open_stream("b")
    with raises(ServerBusy, limit="max_streams"):
        admitted.open_stream("c")
    admitted.close_stream("a")
    assert "a" in admitted
    admitted.close_stream("a")
    assert "a" not in admitted
    assert admitted.open_stream("a") is not first


def test_requests_in_flight_are_counted_over_all_streams_of_a_client():
    admitted = admission()
    quota, other = admitted.open_stream("a"), admitted.open_stream("b")
    for _ in range(3):
        quota.start_request()
    with raises(ServerBusy, limit="max_in_flight"):
        admitted.open_stream("a").start_request()
    other.start_request()
    quota.finish_request()
    quota.start_request()


def test_a_second_of_requests_may_come_at_once_and_the_next_ones_at_their_pace():
    quota = admission(max_requests_per_s=10).open_stream("a")
    assert [quota.delay_s(100.0) for _ in range(10)] == [0.0] * 10
    assert [quota.delay_s(100.0) for _ in range(3)] == pytest.approx([0.1, 0.2, 0.3])
    assert quota.delay_s(100.5) == 0.0 or quota.delay_s(100.5) <= 0.1
    assert quota.delay_s(10_000.0) == 0.0, "waiting earns one second's worth, no more"
    assert [quota.delay_s(10_000.0) for _ in range(10)][-1] == pytest.approx(0.1)


@given(st.lists(st.tuples(CLIENTS, st.integers(1, 60)), max_size=40))
def test_whoever_comes_next_finds_room_to_receive(requests):
    admitted = admission(max_receiving_bytes=128, max_streams=20, max_streams_per_client=20)
    quotas = {client: admitted.open_stream(client) for client in "abc"}
    for client, size in requests:
        quotas[client].reserve(size)
        assert admitted.receiving_bytes <= 128
        new, half = admitted.open_stream("new"), (128 - admitted.receiving_bytes) // 2
        assert new.reserve(half)
        new.release(half)
        admitted.close_stream("new")


def test_alone_a_client_may_have_half_of_the_memory_for_requests_under_way():
    quota = admission(max_receiving_bytes=100).open_stream("a")
    assert quota.reserve(50)
    assert not quota.reserve(1)
    quota.release(50)
    assert not quota.reserve(51)


def test_a_reservation_follows_the_size_of_its_message_and_is_released_once():
    admitted = admission(max_receiving_bytes=100)
    quota = admitted.open_stream("a")
    assert quota.reserve(20)
    room = Reservation(quota, 20)
    assert room.resize(50)
    assert not room.resize(51), "half of it, for one that is alone"
    assert room.size_bytes == quota.receiving_bytes == 50
    assert room.resize(10)
    assert admitted.receiving_bytes == 10
    for _ in range(2):
        room.release()
        assert admitted.receiving_bytes == 0


def test_a_client_that_comes_again_has_what_it_left_in_its_quota():
    admitted = admission(max_receiving_bytes=100)
    quota = admitted.open_stream("a")
    assert quota.reserve(40)
    quota.start_request()
    admitted.close_stream("a")
    assert "a" not in admitted, "it has no stream"
    assert admitted.open_stream("a") is quota
    admitted.close_stream("a")
    quota.release(40)
    assert admitted.open_stream("a") is quota
    admitted.close_stream("a")
    quota.finish_request()
    assert admitted.open_stream("a") is not quota
