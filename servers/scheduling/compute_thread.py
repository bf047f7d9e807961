"""The compute thread. torch releases the interpreter lock while it computes, so the event loop goes on serving."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

import torch

from servers.scheduling.fair_queue import FairQueue, Priority

T = TypeVar("T")


class Outcome(Generic[T]):
    """The result of work, for one task that waits for it. Used by the event loop alone."""

    def __init__(self) -> None:
        self._result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._ended = asyncio.Event()

    @property
    def given_up(self) -> bool:
        """Whether the task that waits was cancelled."""
        return self._result.cancelled()

    def settle(self, result: T | BaseException) -> None:
        """Pass on the result, or the error to raise, of work that has ended."""
        self._ended.set()
        if self.given_up:
            return
        if isinstance(result, BaseException):
            self._result.set_exception(result)
        else:
            self._result.set_result(result)

    async def wait(self, drop: Callable[[], bool]) -> T:
        """Return the result. Where the caller is cancelled, `drop` the work; wait for its end where it has begun.

        `drop` returns whether the work had not begun.
        """
        try:
            return await self._result
        except asyncio.CancelledError:
            if not drop():
                while not self._ended.is_set():
                    with suppress(asyncio.CancelledError):
                        await self._ended.wait()
            raise


_Work = tuple[Callable[[], Any], Outcome[Any], asyncio.AbstractEventLoop]


class ComputeThread:
    """Runs functions one after the other, in the order of the fair queue."""

    def __init__(self, threads: int | None = None):
        self._queue: FairQueue[_Work] = FairQueue()
        self._changed = threading.Condition()  # lock of the queue
        self._stopping = False
        if threads is not None:
            torch.set_num_threads(threads)  # of the thread below, and of the event loop's, which computes short steps
        self._unfinished = 0
        self._thread = threading.Thread(target=self._work, name="compute", daemon=True)
        self._thread.start()

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs or waits. Only the event loop adds work, so True stays true until it does."""
        return not self._unfinished

    @property
    def queue_length(self) -> int:
        """How many functions wait."""
        with self._changed:
            return len(self._queue)

    async def run(self, priority: Priority, function: Callable[[], T], *, client: str = "") -> T:
        """Run `function` on the thread on behalf of `client`; "" is the server itself, or several clients at once.

        Where the caller is cancelled, a function that waits is dropped, with all that it holds. One that runs already
        ends first: until then the memory that it holds is taken.
        """
        outcome: Outcome[T] = Outcome()
        work: _Work = (function, outcome, asyncio.get_running_loop())
        self._unfinished += 1
        with self._changed:
            self._queue.push(priority, client, work)
            self._changed.notify()

        def drop() -> bool:
            with self._changed:
                dropped = self._queue.discard(priority, client, work)
            self._unfinished -= dropped
            return dropped

        return await outcome.wait(drop)

    def stop(self) -> None:
        """End the thread after the work that is queued."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or len(self._queue) > 0)
                if not len(self._queue):
                    return
                function, outcome, loop = self._queue.pop()
            result: Any = None
            started_s = time.perf_counter()
            try:
                if not outcome.given_up:
                    result = function()
            except BaseException as raised:  # noqa: BLE001  # raised again in `run`
                result = raised
            with self._changed:
                self._queue.charge(time.perf_counter() - started_s)
            loop.call_soon_threadsafe(self._settle, outcome, result)
            del function, outcome, result  # or a request's tensors would live until the next one comes

    def _settle(self, outcome: Outcome[Any], result: Any) -> None:
        self._unfinished -= 1
        outcome.settle(result)
