"""One computing thread: torch lets go of the interpreter lock, so the event loop goes on answering meanwhile."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import Callable
from enum import IntEnum
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Priority(IntEnum):
    """What goes first. A backward frees memory that a forward would take, so it goes before it."""

    STEP = 0
    BACKWARD = 1
    FORWARD = 2
    STOP = 9


class ComputeThread:
    """Runs functions one after the other, the most urgent first, the older first among equals."""

    def __init__(self, threads: int | None = None):
        self._queue: queue.PriorityQueue[tuple[Priority, int, Any]] = queue.PriorityQueue()
        self._order = itertools.count()
        if threads is not None:
            torch.set_num_threads(threads)  # of the thread below, and of the event loop's, which computes short steps
        self._unfinished = 0
        self._thread = threading.Thread(target=self._work, name="compute", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Nothing runs or waits. It stays so while the event loop, which alone hands work over, does something else."""
        return not self._unfinished

    async def run(self, priority: Priority, function: Callable[[], T]) -> T:
        """Run `function` on the thread. Where the caller is cancelled before its turn, it does not run."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._unfinished += 1
        self._queue.put((priority, next(self._order), (function, future, loop)))
        return await future

    def stop(self) -> None:
        """End the thread after the work that is queued."""
        self._queue.put((Priority.STOP, next(self._order), None))
        self._thread.join()

    def _work(self) -> None:
        while True:
            _, _, item = self._queue.get()
            if item is None:
                return
            function, future, loop = item
            result: Any = None
            error: BaseException | None = None
            try:
                if not future.cancelled():
                    result = function()
            except BaseException as raised:  # noqa: BLE001  # it is raised again where it was asked for
                error = raised
            loop.call_soon_threadsafe(self._settle, future, result, error)

    def _settle(self, future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        self._unfinished -= 1
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)
