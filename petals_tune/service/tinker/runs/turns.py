"""The order of a run's requests: they arrive in any order, and are done in that of their numbers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from petals_tune.errors import ConfigError
from petals_tune.service.errors import ServiceError, stopping


class Turns:
    """Lets requests through one by one, in the order of their numbers, from 1 on. Used by one event loop."""

    def __init__(self, done: int = 0) -> None:
        self.done = done  # the last request with whose number all are over
        self._taken: set[int] = set()  # numbers beyond `done` that requests have
        self._over: set[int] = set()  # of these, the ones that were done or cancelled
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._is_stopped = False

    @asynccontextmanager
    async def turn(self, number: int) -> AsyncIterator[None]:
        """Wait for the turn of request `number`, which the block is.

        A request that is cancelled while it waits is passed over. Raises ConfigError for a number that a request had
        already, and ServiceError (503) after `stop`.
        """
        if self._is_stopped:
            raise stopping()
        if number <= self.done or number in self._taken:
            raise ConfigError(
                f"request {number} of this model was made already; {self.done + 1} is the next one",
                key="seq_id",
                seen=number,
            )
        self._taken.add(number)
        try:
            if number > self.done + 1:
                await self._its_turn(number)
        except ServiceError:  # the service stops
            self._taken.discard(number)
            raise
        except asyncio.CancelledError:
            self._pass(number)
            raise
        try:
            yield
        finally:
            self._pass(number)

    def stop(self) -> None:
        """Let nobody through any more: whose turn it is goes on to its end, and all who wait get an error."""
        self._is_stopped = True
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(stopping())
                waiting.exception()  # or one whose task was cancelled too would be told of at exit

    async def _its_turn(self, number: int) -> None:
        waiting = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            await waiting
        finally:
            del self._waiting[number]

    def _pass(self, number: int) -> None:
        self._over.add(number)
        while self.done + 1 in self._over:
            self.done += 1
            self._over.discard(self.done)
            self._taken.discard(self.done)
        waiting = self._waiting.get(self.done + 1)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)


async def in_thread(work: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Run `work` in a thread, and wait for its end also where who waits is cancelled: a run stays whole."""
    task = asyncio.ensure_future(asyncio.to_thread(work, *args, **options))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()
        raise
