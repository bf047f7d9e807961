import pytest

from petals_tune.swarm.load import Load
from petals_tune.swarm.route import Hop
from petals_tune.wire.records import ServerRecord, Throughput
from petals_tune.wire.span import BlockSpan


def server(peer: str, **throughput: float) -> ServerRecord:
    return ServerRecord(
        peer=peer,
        addresses=(),
        model="digest",
        model_name="tiny",
        blocks=BlockSpan(0, 6),
        total_blocks=6,
        quantization="none",
        dtype="float32",
        throughput=Throughput(**throughput),
    )


def test_a_server_that_was_never_measured_costs_what_it_announces():
    load, announced = Load(), server("new", step=10.0, batch=100.0)
    assert load.cost(announced, 1, 6) == pytest.approx(0.6), "one token at a time"
    assert load.cost(announced, 50, 6) == pytest.approx(3.0), "many at once"
    assert load.cost(server("near", step=10.0, batch=100.0, network=25.0), 50, 6) == pytest.approx(5.0)


def test_what_was_measured_corrects_what_is_announced():
    load, announced = Load(), server("a", step=10.0, batch=100.0)
    load.add_measurement(announced, 6.0, 50, 6)  # half as fast
    assert load.cost(announced, 50, 6) == pytest.approx(6.0)
    assert load.cost(announced, 1, 6) == pytest.approx(1.2), "so is a single token"
    assert load.cost(server("b", step=10.0, batch=100.0), 50, 6) == pytest.approx(3.0)


def test_speed_follows_the_newest_measurements_smoothly():
    load, one = Load(), server("a")
    load.add_measurement(one, 1.0, 1, 1)
    load.add_measurement(one, 2.0, 1, 1)
    assert 1.0 < load.cost(one, 1, 1) < 1.5
    for _ in range(50):
        load.add_measurement(one, 2.0, 1, 1)
    assert load.cost(one, 1, 1) == pytest.approx(2.0)


def test_work_in_hand_is_paid_before_ours_and_given_back():
    load, one = Load(), server("a")
    load.add_measurement(one, 0.5, 1, 1)
    with load.reserved([Hop(one, BlockSpan(0, 5))], 2), load.reserved([Hop(one, BlockSpan(0, 4))], 1):
        assert load.cost(one, 1, 2) == 8.0
    assert load.cost(one, 1, 2) == 1.0


def test_what_was_reserved_is_given_back_when_the_work_fails():
    load, one = Load(), server("a")
    with pytest.raises(ZeroDivisionError), load.reserved([Hop(one, BlockSpan(0, 5))], 2):
        raise ZeroDivisionError
    assert load.in_hand == {"a": 0}
