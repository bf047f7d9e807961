import numpy as np
import pytest

from petals_tune.swarm.routes.load import MOST_CLAIMED, Load
from petals_tune.swarm.routes.route import Hop
from petals_tune.swarm.routes.table import ServerTable
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


def cost(load: Load, one: ServerRecord, tokens: int, blocks: int, *others: ServerRecord) -> float:
    """Of so many tokens through so many blocks of `one`, with `others` in the swarm."""
    table = ServerTable([one, *others])
    costs, place = load.costs(table, tokens), table.places[one.peer]
    return float(costs.fixed_s[place] + costs.per_block_s[place] * blocks)


def test_a_server_that_was_never_measured_costs_what_it_announces():
    load, announced = Load(), server("new", step=10.0, batch=100.0)
    assert cost(load, announced, 1, 6) == pytest.approx(0.6), "one token at a time"
    assert cost(load, announced, 50, 6) == pytest.approx(3.0), "many at once"
    assert cost(load, server("near", step=10.0, batch=100.0, network=25.0), 50, 6) == pytest.approx(5.0)


def test_what_was_measured_corrects_what_is_announced():
    load, announced = Load(), server("a", step=10.0, batch=100.0)
    load.add_measurement(announced, 6.0, 50, 6)  # half as fast
    assert cost(load, announced, 50, 6) == pytest.approx(6.0)
    assert cost(load, announced, 1, 6) == pytest.approx(1.2), "so is a single token"


def test_the_network_that_a_server_announces_is_corrected_like_its_speed():
    load, announced = Load(), server("a", batch=100.0, network=100.0)
    load.add_measurement(announced, 28.0, 100, 6)  # 6 s to compute and 1 s to send, said it
    assert cost(load, announced, 100, 6) == pytest.approx(28.0)


def test_speed_follows_the_newest_measurements_smoothly():
    load, one = Load(), server("a")
    load.add_measurement(one, 1.0, 1, 1)
    load.add_measurement(one, 2.0, 1, 1)
    assert 1.0 < cost(load, one, 1, 1) < 1.5
    for _ in range(50):
        load.add_measurement(one, 2.0, 1, 1)
    assert cost(load, one, 1, 1) == pytest.approx(2.0)


def test_a_claim_counts_as_a_few_times_the_median_speed_at_most_until_it_was_measured():
    load, honest = Load(), [server(f"h{number}", step=100.0, batch=100.0 * number) for number in (1, 2, 3)]
    liar = server("liar", step=9e11, batch=9e11)
    for each in honest:
        load.add_measurement(each, 6.0 / each.throughput.batch * 600, 600, 6)
    assert cost(load, liar, 600, 6, *honest) == pytest.approx(18.0 / MOST_CLAIMED)
    slow = server("slow", step=1.0, batch=10.0)
    assert cost(load, slow, 600, 6, *honest) == pytest.approx(360.0), "who claims little is believed"
    load.add_measurement(liar, 119.0, 600, 6)
    assert cost(load, liar, 600, 6, *honest) == pytest.approx(119.0)
    load.forget("liar")
    assert cost(load, liar, 600, 6, *honest) == pytest.approx(18.0 / MOST_CLAIMED)


def test_where_nobody_was_measured_no_claim_counts_as_much_more_than_that_of_the_others():
    honest = [server(f"h{number}", batch=100.0, step=100.0) for number in range(3)]
    assert cost(Load(), server("liar", batch=9e11, step=9e11), 100, 6, *honest) == pytest.approx(6.0 / MOST_CLAIMED)


def test_a_server_that_says_that_it_took_no_time_and_answers_late_is_slow():
    load, honest, liar = Load(), server("h", step=100.0, batch=1000.0), server("l", step=100.0, batch=1000.0)
    load.add_measurement(honest, 3.84, 128, 30)
    load.add_measurement(liar, 119.0, 128, 30)
    assert cost(load, liar, 128, 30, honest) == pytest.approx(119.0)
    assert cost(load, honest, 128, 30, liar) == pytest.approx(3.84)


def test_a_server_that_announces_another_speed_than_before_is_as_good_as_new():
    load, before = Load(), server("a", step=100.0, batch=100.0)
    honest = [server(f"h{number}", step=100.0, batch=100.0) for number in range(3)]
    for each in (before, *honest):
        load.add_measurement(each, 36.0, 600, 6)
    after = server("a", step=9e11, batch=9e11)
    assert cost(load, after, 600, 6, *honest) == pytest.approx(36.0 / MOST_CLAIMED)
    assert load.measured(ServerTable([after, *honest])).tolist() == [False, True, True, True]
    load.add_measurement(after, 72.0, 600, 6)
    assert cost(load, after, 600, 6, *honest) == pytest.approx(72.0)


def test_work_in_hand_is_paid_before_ours_and_given_back():
    load, one = Load(), server("a")
    load.add_measurement(one, 0.5, 1, 1)
    with load.reserved([Hop(one, BlockSpan(0, 5))], 2), load.reserved([Hop(one, BlockSpan(0, 4))], 1):
        assert cost(load, one, 1, 2) == 8.0
    assert cost(load, one, 1, 2) == 1.0


def test_what_was_reserved_is_given_back_when_the_work_fails():
    load, one = Load(), server("a")
    with pytest.raises(ZeroDivisionError), load.reserved([Hop(one, BlockSpan(0, 5))], 2):
        raise ZeroDivisionError
    assert not load.in_hand


def test_an_answer_that_waited_for_work_of_ours_does_not_make_its_server_slow():
    load, one = Load(), server("a", step=100.0, batch=100.0)
    hop = Hop(one, BlockSpan(0, 5))
    with load.sending(hop, 20) as nothing, load.sending(hop, 20) as first:
        assert (nothing, first) == (0, 100)
    assert not load.sent
    load.add_measurement(one, 2.0, 20, 5, ahead=first)  # one second each
    assert cost(load, one, 20, 5) == pytest.approx(1.0)


def test_the_way_counts_where_it_is_given():
    load, table = Load(), ServerTable([server("a", step=10.0), server("b", step=10.0)])
    costs = load.costs(table, 1, round_trip_s=np.array([0.1, 0.3]))
    assert costs.fixed_s == pytest.approx([0.1, 0.3])
    assert load.costs(table, 1).fixed_s == pytest.approx([0.0, 0.0])
