"""One background event loop per process, on which synchronous code runs coroutines."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")

_WAKE_S = 1.0
_lock = threading.Lock()
_current: tuple[int, asyncio.AbstractEventLoop] | None = None
_started: set[asyncio.Task[object]] = set()  # asyncio keeps no strong reference to a task
_giving_up: ContextVar[threading.Event | None] = ContextVar("petals_tune_giving_up", default=None)


def background_loop() -> asyncio.AbstractEventLoop:
    """The loop of this process, started at the first call. A forked child gets one of its own."""
    global _current
    with _lock:
        if _current is None or _current[0] != os.getpid():
            loop = uvloop.new_event_loop()
            threading.Thread(target=loop.run_forever, name="petals_tune-loop", daemon=True).start()
            _current = (os.getpid(), loop)
        return _current[1]


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` on the background loop and wait for it. Ctrl-C cancels it."""
    return wait(start(work))


def start(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Start `work` on the background loop; see `wait`."""
    return asyncio.run_coroutine_threadsafe(work, background_loop())


def wait(future: Future[T]) -> T:
    """Wait for work that was started on the background loop. Ctrl-C cancels it."""
    try:
        # Not result() alone: a Ctrl-C that comes just before a thread blocks for good is seen only when it wakes.
        while True:
            try:
                return future.result(_WAKE_S)
            except TimeoutError:
                if future.done():
                    return future.result()  # or the work's own TimeoutError
                if (event := _giving_up.get()) is not None and event.is_set():
                    raise CancelledError from None
    except BaseException:
        future.cancel()
        raise


@contextmanager
def giving_up_on(event: threading.Event) -> Iterator[None]:
    """Within the block, what this thread waits for is cancelled within a second after `event` is set.

    Then CancelledError of concurrent.futures is raised. A step may wait for lost servers for minutes.
    """
    before = _giving_up.set(event)
    try:
        yield
    finally:
        _giving_up.reset(before)


def start_task(work: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """Start `work` on the background loop without waiting; safe from a finalizer and at interpreter exit."""

    def start() -> None:
        task = asyncio.get_running_loop().create_task(work())
        _started.add(task)
        task.add_done_callback(_started.discard)

    if _current is not None and _current[0] == os.getpid() and not _current[1].is_closed():
        _current[1].call_soon_threadsafe(start)
