"""Limits of each key, with a clock of the test's own."""

from contextlib import ExitStack

import pytest

from petals_tune.service.errors import ServiceError
from petals_tune.service.users.fairness import Fairness


def refused(fairness, owner, now_s):
    with pytest.raises(ServiceError) as caught, fairness.in_flight(owner, now_s):
        pass
    assert caught.value.status == 429
    return float(caught.value.headers["Retry-After"])


def test_requests_in_flight_are_counted_for_each_key():
    fairness = Fairness(most_in_flight=2, tokens_a_minute=None)
    with ExitStack() as stack:
        stack.enter_context(fairness.in_flight("anna", 0))
        inner = stack.enter_context(ExitStack())
        inner.enter_context(fairness.in_flight("anna", 0))
        refused(fairness, "anna", 0)
        with fairness.in_flight("ben", 0):
            pass
        inner.close()
        with fairness.in_flight("anna", 0):
            pass


def test_tokens_come_back_by_the_minute():
    fairness = Fairness(most_in_flight=9, tokens_a_minute=600)  # 10 a second
    with fairness.in_flight("anna", 0):
        fairness.charge("anna", 700, 0)
    assert refused(fairness, "anna", 0) == 10
    with fairness.in_flight("ben", 0):
        pass
    assert refused(fairness, "anna", 5) == 5
    with fairness.in_flight("anna", 11):
        pass


def test_what_is_not_used_is_kept_for_a_minute_and_no_more():
    fairness = Fairness(most_in_flight=9, tokens_a_minute=60)
    fairness.charge("anna", 0, 0)
    fairness.charge("anna", 61, 3600)
    refused(fairness, "anna", 3600)


def test_a_request_that_fails_is_no_longer_in_flight():
    fairness = Fairness(most_in_flight=1, tokens_a_minute=None)
    with pytest.raises(KeyError), fairness.in_flight("anna", 0):
        raise KeyError
    with fairness.in_flight("anna", 0):
        pass
