import pytest

from petals_tune.errors import ServerUnreachable, SwarmTimeout, UncoveredBlocks
from petals_tune.swarm.retry import FIRST_BAN_S, LONGEST_BAN_S, Attempts, Bans, Load, RetryPolicy
from petals_tune.wire.records import ServerRecord, Throughput
from petals_tune.wire.span import BlockSpan

POLICY = RetryPolicy(timeout_s=100, uncovered_s=10, first_pause_s=1, longest_pause_s=5)


def test_pauses_double_up_to_the_longest():
    assert [POLICY.pause_s(attempt) for attempt in range(6)] == [0, 1, 2, 4, 5, 5]
    assert POLICY.pause_s(5000) == 5


def test_a_ban_ends_by_itself_and_further_failures_double_it():
    bans = Bans()
    bans.failed("a", 100.0)
    assert bans.active(100.0 + FIRST_BAN_S - 0.1) == {"a"}
    assert bans.active(100.0 + FIRST_BAN_S) == frozenset()
    bans.failed("a", 200.0)
    assert bans.active(200.0 + 2 * FIRST_BAN_S - 0.1) == {"a"}
    assert bans.active(200.0 + 2 * FIRST_BAN_S) == frozenset()


def test_a_ban_is_never_longer_than_the_longest():
    bans = Bans()
    for _ in range(2000):
        bans.failed("a", 0.0)
    assert bans.active(LONGEST_BAN_S - 0.1) == {"a"}
    assert bans.active(LONGEST_BAN_S) == frozenset()


def test_an_answer_ends_a_ban_and_forgets_the_failures():
    bans = Bans()
    bans.failed("a", 0.0)
    bans.failed("a", 0.0)
    bans.failed("b", 0.0)
    bans.answered("a")
    bans.answered("never seen")
    assert bans.active(1.0) == {"b"}
    bans.failed("a", 10.0)
    assert bans.active(10.0 + FIRST_BAN_S) == frozenset()


def test_work_is_tried_again_with_growing_pauses_until_the_deadline():
    attempts, error = Attempts(POLICY, since_s=0), ServerUnreachable("gone")
    assert [attempts.failed(error, now_s) for now_s in (0, 1, 3, 99.9)] == [1, 2, 4, 5]
    with pytest.raises(SwarmTimeout, match=r"swarm\.timeout_s=100 s \(5 attempts\); the last error: gone") as caught:
        attempts.failed(error, 100)
    assert caught.value.__cause__ is error


def test_work_that_moves_on_starts_anew():
    attempts, error = Attempts(POLICY, since_s=0), ServerUnreachable("gone")
    attempts.failed(error, 1)
    attempts.failed(error, 2)
    attempts.moved_on(50)
    assert attempts.failed(error, 149) == 1
    with pytest.raises(SwarmTimeout):
        attempts.failed(error, 150)


def test_blocks_that_nobody_holds_are_waited_for_a_shorter_time_and_named_at_the_end():
    attempts, error = Attempts(POLICY, since_s=0), UncoveredBlocks("blocks 3:6")
    attempts.failed(error, 9.9)
    with pytest.raises(UncoveredBlocks) as caught:
        attempts.failed(error, 10)
    assert caught.value is error


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
    load.measured(announced, 6.0, 50, 6)  # half as fast
    assert load.cost(announced, 50, 6) == pytest.approx(6.0)
    assert load.cost(announced, 1, 6) == pytest.approx(1.2), "so is a single token"
    assert load.cost(server("b", step=10.0, batch=100.0), 50, 6) == pytest.approx(3.0)


def test_speed_follows_the_newest_measurements_smoothly():
    load, one = Load(), server("a")
    load.measured(one, 1.0, 1, 1)
    load.measured(one, 2.0, 1, 1)
    assert 1.0 < load.cost(one, 1, 1) < 1.5
    for _ in range(50):
        load.measured(one, 2.0, 1, 1)
    assert load.cost(one, 1, 1) == pytest.approx(2.0)


def test_work_in_hand_is_paid_before_ours_and_given_back():
    load, one = Load(), server("a")
    load.measured(one, 0.5, 1, 1)
    load.take("a", 10)
    load.take("a", 4)
    assert load.cost(one, 1, 2) == 8.0
    load.give_back("a", 10)
    load.give_back("a", 4)
    assert load.cost(one, 1, 2) == 1.0
