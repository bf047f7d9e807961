import pytest

from petals_tune.errors import Diverged, NotFinite, ServerUnreachable, SwarmTimeout, UncoveredBlocks
from petals_tune.swarm.retry import (
    FIRST_BAN_S,
    LONGEST_BAN_S,
    NOT_FINITE_S,
    OFFENCE_S,
    SAY_AFTER_S,
    SAY_EVERY_S,
    Attempts,
    Bans,
    Load,
    Notices,
    RetryPolicy,
)
from petals_tune.wire.records import ServerRecord, Throughput
from petals_tune.wire.span import BlockSpan

POLICY = RetryPolicy(timeout_s=100, first_pause_s=1, longest_pause_s=5)
GONE, NOBODY, NAN = ServerUnreachable("gone"), UncoveredBlocks("blocks 3:6"), NotFinite("NaN")


def test_pauses_double_up_to_the_longest():
    assert [POLICY.pause_s(attempt) for attempt in range(6)] == [0, 1, 2, 4, 5, 5]
    assert POLICY.pause_s(5000) == 5


def test_a_ban_lasts_until_its_end_and_then_until_the_server_was_reached():
    bans = Bans()
    bans.failed("a", 100.0)
    before, after = 100.0 + FIRST_BAN_S - 0.1, 100.0 + FIRST_BAN_S
    assert (bans.active(before), bans.doubtful(before)) == ({"a"}, frozenset())
    assert (bans.active(after), bans.doubtful(after)) == ({"a"}, {"a"})
    bans.reached("a")
    assert bans.active(after) == frozenset()


def test_requests_that_fail_together_are_one_failure_and_each_further_one_doubles_the_ban():
    bans = Bans()
    for _ in range(8):
        bans.failed("a", 100.0)
    assert bans.doubtful(100.0 + FIRST_BAN_S) == {"a"}
    bans.failed("a", 200.0)
    assert bans.doubtful(200.0 + 2 * FIRST_BAN_S - 0.1) == frozenset()
    assert bans.doubtful(200.0 + 2 * FIRST_BAN_S) == {"a"}


def test_a_ban_is_never_longer_than_the_longest():
    bans = Bans()
    for number in range(2000):
        bans.failed("a", 1000.0 * number)
    assert bans.doubtful(1_999_000.0 + LONGEST_BAN_S - 0.1) == frozenset()
    assert bans.doubtful(1_999_000.0 + LONGEST_BAN_S) == {"a"}


def test_an_answer_ends_a_ban_and_forgets_the_failures():
    bans = Bans()
    bans.failed("a", 0.0)
    bans.failed("a", 10.0)
    bans.failed("b", 0.0)
    bans.answered("a")
    bans.answered("never seen")
    assert bans.active(1.0) == {"b"}
    bans.failed("a", 100.0)
    assert bans.doubtful(100.0 + FIRST_BAN_S) == {"a", "b"}


def test_wrong_numbers_are_not_forgotten_for_an_answer():
    bans = Bans()
    bans.offended("liar", 0.0)
    bans.not_finite("nan", 0.0)
    for peer in ("liar", "nan"):
        bans.answered(peer)
        bans.reached(peer)
    assert bans.active(1.0) == {"liar", "nan"}
    assert bans.offenders(1.0) == {"liar"}, "the other one is asked where there is nobody else"
    assert bans.active(NOT_FINITE_S) == {"liar"}
    assert bans.active(OFFENCE_S) == frozenset()


def test_work_is_tried_again_with_growing_pauses_until_the_deadline():
    attempts = Attempts(POLICY, since_s=0)
    assert [attempts.failed(GONE, now_s) for now_s in (0, 1, 3, 99.9)] == [1, 2, 4, 5]
    with pytest.raises(
        SwarmTimeout, match=r"100 s and 5 attempts \(swarm\.timeout_s=100\); the last error: gone$"
    ) as caught:
        attempts.failed(GONE, 100)
    assert caught.value.__cause__ is GONE


def test_work_that_moves_on_starts_anew():
    attempts = Attempts(POLICY, since_s=0)
    attempts.failed(GONE, 1)
    attempts.failed(GONE, 2)
    attempts.moved_on(50)
    assert attempts.failed(GONE, 149) == 1
    with pytest.raises(SwarmTimeout):
        attempts.failed(GONE, 150)


def test_blocks_that_nobody_holds_are_named_at_the_deadline():
    attempts = Attempts(POLICY, since_s=0)
    attempts.failed(NOBODY, 99.9)
    with pytest.raises(UncoveredBlocks) as caught:
        attempts.failed(NOBODY, 100)
    assert caught.value is NOBODY


def test_where_a_server_failed_before_that_is_said_too():
    attempts = Attempts(POLICY, since_s=0)
    attempts.failed(GONE, 1)
    with pytest.raises(SwarmTimeout, match=r"the last error: blocks 3:6\nbefore that: gone"):
        attempts.failed(NOBODY, 100)


def test_attempts_count_failures_of_servers_and_not_the_waiting_for_one():
    attempts = Attempts(RetryPolicy(timeout_s=100, attempts=2), since_s=0)
    for now_s in range(5):
        attempts.failed(NOBODY, now_s)
    attempts.failed(GONE, 5)
    with pytest.raises(SwarmTimeout, match=r"\(swarm\.attempts=2\)"):
        attempts.failed(GONE, 6)


def test_numbers_that_are_not_finite_twice_are_nobodys_fault_but_the_runs():
    attempts = Attempts(POLICY, since_s=0)
    attempts.failed(NAN, 1)
    attempts.failed(GONE, 2)
    with pytest.raises(Diverged, match="training diverged"):
        attempts.failed(NAN, 3)
    attempts.moved_on(4)
    attempts.failed(NAN, 5)


def test_waiting_is_said_after_a_while_not_often_and_once_for_all():
    notices = Notices()
    assert not notices.due(0.0, SAY_AFTER_S - 0.1)
    assert [notices.due(0.0, SAY_AFTER_S) for _ in range(4)] == [True, False, False, False]
    assert not notices.due(0.0, SAY_AFTER_S + SAY_EVERY_S - 0.1)
    assert notices.due(0.0, SAY_AFTER_S + SAY_EVERY_S)


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
