"""The order of a run's requests."""

import asyncio
import contextlib
import time

import pytest

from petals_tune.errors import ConfigError
from petals_tune.service.errors import ServiceError
from petals_tune.service.tinker.runs.turns import Turns, in_thread
from tests.raising import raises


class Requests:
    """Requests that note when they are done."""

    def __init__(self):
        self.turns, self.done = Turns(), []

    def start(self, number, error=None):
        return asyncio.create_task(self._work(number, error))

    async def _work(self, number, error):
        async with self.turns.turn(number):
            await asyncio.sleep(0)
            self.done.append(number)
            if error is not None:
                raise error


async def settled():
    for _ in range(20):
        await asyncio.sleep(0)


async def test_requests_are_done_in_the_order_of_their_numbers():
    requests = Requests()
    tasks = [requests.start(number) for number in (3, 1, 4, 2)]
    await asyncio.gather(*tasks)
    assert requests.done == [1, 2, 3, 4]
    assert requests.turns.done == 4


async def test_a_failed_request_lets_the_next_one_through():
    requests = Requests()
    tasks = [requests.start(2), requests.start(1, ValueError())]
    with pytest.raises(ValueError):  # noqa: PT011  # the one above
        await tasks[1]
    await tasks[0]
    assert requests.done == [1, 2]


async def test_a_request_that_is_cancelled_while_it_waits_is_passed_over():
    requests = Requests()
    tasks = {number: requests.start(number) for number in (2, 3, 4)}
    await settled()
    tasks[3].cancel()
    await settled()
    assert requests.done == []
    await requests.start(1)
    await asyncio.gather(tasks[2], tasks[4])
    assert requests.done == [1, 2, 4]


async def test_one_that_is_cancelled_just_as_its_turn_comes_is_passed_over():
    requests = Requests()
    second, third = requests.start(2), requests.start(3)
    await settled()
    first = requests.start(1)
    await first
    second.cancel()  # it was let through, and has not gone on yet
    with contextlib.suppress(asyncio.CancelledError):
        await second
    await third
    assert requests.turns.done == 3


async def test_a_number_is_done_once():
    requests = Requests()
    waiting = requests.start(2)
    await settled()
    with raises(ConfigError, key="seq_id", seen=2):
        await requests.start(2)
    await requests.start(1)
    await waiting
    with raises(ConfigError, key="seq_id", seen=1):
        await requests.start(1)


async def test_stop_ends_those_that_wait_and_not_the_one_whose_turn_it_is():
    requests, go_on = Requests(), asyncio.Event()

    async def first():
        async with requests.turns.turn(1):
            await go_on.wait()
            requests.done.append(1)

    running, waiting = asyncio.create_task(first()), requests.start(2)
    await settled()
    requests.turns.stop()
    with pytest.raises(ServiceError, match="stopping"):
        await waiting
    go_on.set()
    await running
    with pytest.raises(ServiceError, match="stopping"):
        await requests.start(3)
    assert (requests.done, requests.turns.done) == ([1], 1)


async def test_a_cancelled_task_waits_for_its_thread():
    ended = []

    def work():
        time.sleep(0.1)
        ended.append(True)

    task = asyncio.create_task(in_thread(work))
    await asyncio.sleep(0.02)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert ended
