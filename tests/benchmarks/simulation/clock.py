"""A clock that jumps: an event loop whose time goes on to the next timer as soon as nothing else is to be done.

The modules of the directory read `time` and hivemind's clock: within `virtual_time` they read this one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

EPOCH_S = 1.7e9


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in virtual time."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0

    def time(self) -> float:
        return self._now_s

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self._now_s = max(self._now_s, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


class _Clock:
    """In place of the module `time`."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.monotonic = loop.time

    def time(self) -> float:
        return EPOCH_S + self.monotonic()


@contextmanager
def _patched(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    clock = _Clock(loop)
    with ExitStack() as stack:
        for module in ("net.dht.node", "net.dht.reader", "net.dht.directory", "net.directory", "swarm.routes.known"):
            stack.enter_context(patch(f"petals_tune.{module}.time", clock))
        for name in ("hivemind.utils.timed_storage", "hivemind.dht.node", "hivemind.dht.routing"):
            stack.enter_context(patch(f"{name}.get_dht_time", clock.time))
        yield


async def _end(tasks: set[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def run_virtual(main: Coroutine[Any, Any, Any]) -> Any:
    """Run `main` in virtual time."""
    loop = VirtualLoop()
    try:
        with _patched(loop):
            result = loop.run_until_complete(main)
            loop.run_until_complete(_end(asyncio.all_tasks(loop)))  # requests whose search is over
            return result
    finally:
        loop.close()
