import msgspec
import pytest

from petals_tune.swarm.routes.round_trips import FAR_S, KEPT, RoundTrips
from petals_tune.swarm.routes.table import ServerTable
from tests.swarm.routes.test_route import server

NEAR = msgspec.structs.replace(server("a", 0, 6), round_trips_s={"b": 0.02, "far": 0.5})
TABLE = ServerTable([NEAR, server("b", 6, 12), server("far", 6, 12)])


def known(**seconds: float) -> RoundTrips:
    trips = RoundTrips()
    for peer, each in seconds.items():
        trips.add(peer, each)
    return trips


def test_the_quickest_of_the_last_few_counts():
    trips = known(a=0.3)
    trips.add("a", 0.1)
    trips.add("a", 0.4)
    assert trips.to("a") == 0.1
    for _ in range(KEPT):
        trips.add("a", 0.6)
    assert trips.to("a") == 0.6, "the way has become longer"
    assert trips.to("b") is None


def test_a_server_that_was_never_measured_is_as_far_as_the_median():
    assert known(a=0.1, b=0.3).to_all(TABLE) == pytest.approx([0.1, 0.3, 0.2])
    assert RoundTrips().to_all(TABLE) == pytest.approx([0.0, 0.0, 0.0])


def test_a_pair_saves_the_way_through_us_less_the_way_between_them():
    handing = known(a=0.1, b=0.11, far=0.1).handing(TABLE, "auto")
    assert [TABLE.servers[place].peer for place in handing.taker] == ["b"], "the other way is longer than through us"
    assert handing.saved_s == pytest.approx([(0.1 + 0.11 - 0.02) / 2])


def test_a_way_that_is_shorter_than_both_ways_from_us_differ_is_not_believed():
    trips = known(a=0.1, b=0.3)
    assert trips.handing(TABLE, "auto").saved_s == pytest.approx([(0.1 + 0.3 - 0.2) / 2])
    assert trips.waited_s(TABLE.servers[1], NEAR) == pytest.approx((0.3 - 0.1 + 0.2) / 2)


def test_pairs_save_where_they_would_hand_on_and_both_were_measured():
    near = known(a=FAR_S / 2, b=0.3)
    assert not len(near.handing(TABLE, "auto").giver)
    assert len(near.handing(TABLE, "always").giver) == 1
    assert near.handing(TABLE, "never") is None
    assert not len(known(a=0.1).handing(TABLE, "always").giver)
    assert RoundTrips().handing(TABLE, "always") is None


def test_a_new_measurement_changes_what_is_saved():
    trips = known(a=0.1, b=0.12)
    first = trips.handing(TABLE, "auto")
    assert trips.handing(TABLE, "auto") is first, "nothing has changed"
    trips.add("b", 0.1)
    assert trips.handing(TABLE, "auto").saved_s == pytest.approx([(0.1 + 0.1 - 0.02) / 2])
    other = ServerTable(TABLE.servers[:2])
    assert trips.handing(other, "auto").saved_s == pytest.approx([(0.1 + 0.1 - 0.02) / 2])


def test_the_way_is_no_part_of_a_servers_own_time():
    trips, (a, b, far) = known(a=0.1, b=0.11), (NEAR, TABLE.servers[1], TABLE.servers[2])
    assert trips.waited_s(b, None) == 0.11
    assert trips.waited_s(b, a) == pytest.approx(0.01 + 0.055 - 0.05), "from the one to the other, and then to us"
    assert trips.waited_s(a, b) == 0.1, "b announced nothing"
    assert trips.waited_s(far, None) == 0.0
