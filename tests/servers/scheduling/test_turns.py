"""The thread for large messages: one at a time, the client with the least time next, the loop free meanwhile."""

import asyncio
import threading
from functools import partial

import pytest

from servers.scheduling.turns import Turns


class Work:
    """Functions that note who they ran for; the first one waits until `release` is set."""

    def __init__(self) -> None:
        self.turns, self.ran, self.release = Turns(), [], threading.Event()
        self.threads: set[int] = set()

    def start(self, client: str) -> asyncio.Task[str]:
        return asyncio.create_task(self.turns.run(client, partial(self._work, client)))

    def _work(self, client: str) -> str:
        assert self.release.wait(60)
        self.threads.add(threading.get_ident())
        self.ran.append(client)
        return client


async def test_of_many_that_wait_the_one_of_another_client_is_next():
    work = Work()
    greedy = [work.start("greedy") for _ in range(5)]
    await asyncio.sleep(0)
    meek = work.start("meek")
    await asyncio.sleep(0)
    work.release.set()
    assert await asyncio.gather(*greedy, meek) == ["greedy"] * 5 + ["meek"]
    assert work.ran.index("meek") == 1
    assert threading.get_ident() not in work.threads


async def test_errors_come_back_and_the_next_one_runs():
    turns = Turns()
    with pytest.raises(ZeroDivisionError):
        await turns.run("a", lambda: 1 / 0)
    assert await turns.run("a", lambda: 7) == 7


async def test_what_is_cancelled_before_its_turn_does_not_run_and_what_runs_keeps_its_turn():
    work = Work()
    running, waiting, last = work.start("a"), work.start("b"), work.start("c")
    await asyncio.sleep(0)
    for task in (waiting, running):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await asyncio.sleep(0.01)
    assert not last.done(), "the function of the first one runs still"
    work.release.set()
    assert await last == "c"
    assert work.ran == ["a", "c"]


async def test_one_whose_turn_comes_as_it_is_cancelled_passes_it_on():
    work = Work()
    work.release.set()
    first, second, third = work.start("a"), work.start("b"), work.start("c")
    while not first.done():
        await asyncio.sleep(0)
    second.cancel()
    assert await third == "c"


async def test_one_that_is_cancelled_at_the_moment_of_its_turn_does_not_stop_the_others(monkeypatch):
    """Its future is cancelled at once, and its task has not run since."""
    work = Work()
    first, second, third = work.start("a"), work.start("b"), work.start("c")
    await asyncio.sleep(0)
    charge = work.turns._scheduler.charge
    monkeypatch.setattr(work.turns._scheduler, "charge", lambda elapsed_s: (charge(elapsed_s), second.cancel()))
    work.release.set()
    assert await asyncio.gather(first, third) == ["a", "c"]
    assert second.cancelled()
    assert await work.start("d") == "d"
