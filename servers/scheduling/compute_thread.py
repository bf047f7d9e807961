"""The compute thread. torch releases the interpreter lock while it computes, so the event loop goes on serving."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from servers.scheduling.fair_queue import FairQueue, Priority

T = TypeVar("T")

_Work = tuple[Callable[[], Any], asyncio.Future[Any], asyncio.AbstractEventLoop]


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

        Does not run it where the caller is cancelled before its turn.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._unfinished += 1
        with self._changed:
            self._queue.push(priority, client, (function, future, loop))
            self._changed.notify()
        return await future

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
                function, future, loop = self._queue.pop()
            result: Any = None
            error: BaseException | None = None
            started_s = time.perf_counter()
            try:
                if not future.cancelled():
                    result = function()
            except BaseException as raised:  # noqa: BLE001  # raised again in `run`
                error = raised
            with self._changed:
                self._queue.charge(time.perf_counter() - started_s)
            loop.call_soon_threadsafe(self._settle, future, result, error)
            del function, future, result, error  # or a request's tensors would live until the next one comes

    def _settle(self, future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        self._unfinished -= 1
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)
