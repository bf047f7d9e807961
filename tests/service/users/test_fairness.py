"""Limits of each key, with a clock of the test's own."""

import asyncio
from contextlib import ExitStack

import pytest

from petals_tune.service.errors import ServiceError
from petals_tune.service.users.fairness import Fairness
from petals_tune.service.users.slots import Slots


def fairness_of(most_in_flight=9, tokens_a_minute=None, most_waiting=9, slots=9):
    return Fairness(
        slots=Slots(slots),
        most_in_flight=most_in_flight,
        most_waiting=most_waiting,
        tokens_a_minute=tokens_a_minute,
    )


def refused(fairness, owner, answers, now_s):
    with pytest.raises(ServiceError) as caught:
        fairness.check(owner, answers, now_s)
    assert caught.value.status == 429
    return float(caught.value.headers["Retry-After"])


def test_answers_in_flight_are_counted_for_each_key():
    fairness = fairness_of(most_in_flight=3)
    with ExitStack() as stack:
        stack.enter_context(fairness.in_flight("anna", 2))
        refused(fairness, "anna", 2, 0)
        fairness.check("anna", 1, 0)
        fairness.check("ben", 3, 0)
        inner = stack.enter_context(ExitStack())
        inner.enter_context(fairness.in_flight("anna", 1))
        refused(fairness, "anna", 1, 0)
        fairness.check("anna", 0, 0)  # training, which has no answers
        inner.close()
        fairness.check("anna", 1, 0)


def test_a_request_for_more_than_a_key_may_have_is_let_in_alone():
    fairness = fairness_of(most_in_flight=3)
    fairness.check("anna", 5, 0)
    with fairness.in_flight("anna", 1):
        refused(fairness, "anna", 5, 0)


def test_tokens_come_back_by_the_minute():
    fairness = fairness_of(tokens_a_minute=600)  # 10 a second
    fairness.check("anna", 1, 0)
    fairness.charge("anna", 700, 0)
    assert refused(fairness, "anna", 1, 0) == 10
    assert refused(fairness, "anna", 0, 0) == 10
    fairness.check("ben", 1, 0)
    assert refused(fairness, "anna", 1, 5) == 5
    fairness.check("anna", 1, 11)


def test_what_is_not_used_is_kept_for_a_minute_and_no_more():
    fairness = fairness_of(tokens_a_minute=60)
    fairness.charge("anna", 0, 0)
    fairness.charge("anna", 61, 3600)
    refused(fairness, "anna", 1, 3600)


async def test_a_full_queue_refuses_keys_that_wait_already():
    fairness = fairness_of(slots=1, most_waiting=2)

    async def hold():
        async with fairness.slots.held("anna"):
            await asyncio.Event().wait()

    tasks = [asyncio.create_task(hold()) for _ in range(3)]
    await asyncio.sleep(0)
    refused(fairness, "anna", 1, 0)
    fairness.check("ben", 1, 0)
    fairness.check("anna", 0, 0)
    tasks.pop().cancel()
    await asyncio.sleep(0)
    fairness.check("anna", 1, 0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_work_that_fails_is_no_longer_in_flight():
    fairness = fairness_of(most_in_flight=1)
    with pytest.raises(ZeroDivisionError), fairness.in_flight("anna"):
        _ = 1 / (not fairness.busy)
    assert not fairness.busy
    fairness.check("anna", 1, 0)
