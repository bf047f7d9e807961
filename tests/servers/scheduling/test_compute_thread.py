"""The compute thread: results and errors come back, what was cancelled does not run, and the order is the queue's."""

import asyncio
import threading
import weakref
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from servers.scheduling.compute_thread import ComputeThread
from servers.scheduling.fair_queue import Priority


@pytest.fixture
def compute() -> Iterator[ComputeThread]:
    thread = ComputeThread()
    yield thread
    thread.stop()


class Held:
    """Keeps the thread busy until it is released."""

    def __init__(self, compute: ComputeThread):
        self.running, self.release = threading.Event(), threading.Event()
        self.task = asyncio.create_task(compute.run(Priority.FORWARD, self._wait))

    def _wait(self) -> None:
        self.running.set()
        assert self.release.wait(60)

    async def start(self) -> None:
        await asyncio.to_thread(self.running.wait, 60)


async def test_results_and_errors_come_back_from_another_thread(compute):
    assert await compute.run(Priority.FORWARD, threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        await compute.run(Priority.FORWARD, lambda: 1 / 0)
    assert await compute.run(Priority.FORWARD, lambda: 7) == 7, "an error ends the function, not the thread"


async def test_what_waits_runs_by_priority(compute):
    held, ran = Held(compute), []
    await held.start()
    tasks = [
        asyncio.create_task(compute.run(priority, lambda name=priority.name: ran.append(name), client="a"))
        for priority in (Priority.FORWARD, Priority.BACKWARD, Priority.STEP)
    ]
    await asyncio.sleep(0)
    assert compute.queue_length == 3
    held.release.set()
    await asyncio.gather(held.task, *tasks)
    assert ran == ["STEP", "BACKWARD", "FORWARD"]


async def test_what_was_cancelled_before_its_turn_does_not_run(compute):
    held, ran = Held(compute), []
    await held.start()
    cancelled = asyncio.create_task(compute.run(Priority.FORWARD, lambda: ran.append("cancelled")))
    await asyncio.sleep(0)
    cancelled.cancel()
    held.release.set()
    await compute.run(Priority.FORWARD, lambda: ran.append("after"))
    assert ran == ["after"]


async def test_what_was_cancelled_before_its_turn_is_dropped_with_all_that_it_holds(compute):
    held = Held(compute)
    await held.start()
    tensor = torch.zeros(10)
    gone = weakref.ref(tensor)
    cancelled = asyncio.create_task(compute.run(Priority.FORWARD, partial(tensor.sum, 0), client="a"))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.wait([cancelled])
    del tensor, cancelled
    assert gone() is None
    assert compute.queue_length == 0
    held.release.set()
    await held.task
    assert compute.is_idle


async def test_what_runs_when_it_is_cancelled_ends_first(compute):
    """Until then the memory that it holds is taken, and whoever accounts for it must not think otherwise."""
    held = Held(compute)
    await held.start()
    for _ in range(2):
        held.task.cancel()
        await asyncio.sleep(0.01)
        assert not held.task.done()
    held.release.set()
    with pytest.raises(asyncio.CancelledError):
        await held.task
    assert compute.is_idle


async def test_it_is_idle_when_nothing_runs_or_waits(compute):
    assert compute.is_idle
    held = Held(compute)
    await held.start()
    assert not compute.is_idle
    held.release.set()
    await held.task
    assert compute.is_idle


async def test_stop_runs_what_is_queued_and_ends_the_thread():
    compute, ran = ComputeThread(), []
    held = Held(compute)
    await held.start()
    last = asyncio.create_task(compute.run(Priority.FORWARD, lambda: ran.append("last")))
    await asyncio.sleep(0)
    stopping = asyncio.create_task(asyncio.to_thread(compute.stop))
    held.release.set()
    await asyncio.gather(stopping, held.task, last)
    assert ran == ["last"]
    assert not compute._thread.is_alive()
