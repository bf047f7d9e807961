import pytest

from petals_tune.errors import Diverged, NotFinite, ServerUnreachable, SwarmTimeout, UncoveredBlocks
from petals_tune.swarm.retry import NOTICE_AFTER_S, NOTICE_EVERY_S, Attempts, Notices, RetryPolicy
from tests.raising import raises

POLICY = RetryPolicy(timeout_s=100, first_pause_s=1, longest_pause_s=5)
GONE, NOBODY = ServerUnreachable("gone"), UncoveredBlocks("blocks 3:6")
NAN, NAN_TOO = NotFinite("NaN", peer="a"), NotFinite("NaN", peer="b")


def test_pauses_double_up_to_the_longest():
    assert [POLICY.pause_s(attempt) for attempt in range(6)] == [0, 1, 2, 4, 5, 5]
    assert POLICY.pause_s(5000) == 5


def test_work_is_tried_again_with_growing_pauses_until_the_deadline():
    attempts = Attempts(POLICY, since_s=0)
    assert [attempts.failed(GONE, now_s) for now_s in (0, 1, 3, 99.9)] == [1, 2, 4, 5]
    with raises(SwarmTimeout, limit="swarm.timeout_s", attempts=5, last=GONE, before=None) as caught:
        attempts.failed(GONE, 100)
    assert caught.value.__cause__ is GONE


def test_work_that_moves_on_starts_anew():
    attempts = Attempts(POLICY, since_s=0)
    attempts.failed(GONE, 1)
    attempts.failed(GONE, 2)
    attempts.made_progress(50)
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
    with raises(SwarmTimeout, last=NOBODY, before=GONE):
        attempts.failed(NOBODY, 100)


def test_attempts_count_failures_of_servers_and_not_the_waiting_for_one():
    attempts = Attempts(RetryPolicy(timeout_s=100, attempts=2), since_s=0)
    for now_s in range(5):
        attempts.failed(NOBODY, now_s)
    attempts.failed(GONE, 5)
    with raises(SwarmTimeout, limit="swarm.attempts"):
        attempts.failed(GONE, 6)


def test_numbers_that_two_servers_or_the_only_one_twice_find_not_finite_are_the_runs_own_fault():
    attempts = Attempts(POLICY, since_s=0)
    attempts.failed(NAN, 1)
    attempts.failed(GONE, 2)
    attempts.failed(NAN, 2.5)
    with raises(Diverged):
        attempts.failed(NAN_TOO, 3)
    with raises(Diverged):
        attempts.failed(NAN, 3, alone=True)
    attempts.made_progress(4)
    attempts.failed(NAN, 5)


def test_waiting_is_said_after_a_while_not_often_and_once_for_all():
    notices = Notices()
    assert not notices.due(0.0, NOTICE_AFTER_S - 0.1)
    assert [notices.due(0.0, NOTICE_AFTER_S) for _ in range(4)] == [True, False, False, False]
    assert not notices.due(0.0, NOTICE_AFTER_S + NOTICE_EVERY_S - 0.1)
    assert notices.due(0.0, NOTICE_AFTER_S + NOTICE_EVERY_S)
