"""A thread for encoding and decoding large messages, which clients share fairly. The event loop goes on meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from servers.scheduling.fair_queue import FairScheduler

T = TypeVar("T")


class Turns:
    """Runs functions in a thread, one at a time: the client with the least time there is next.

    One at a time, so that no more than one message is in memory twice. Used by the event loop alone.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # by client
        self._scheduler: FairScheduler[str] = FairScheduler()
        self._busy = False

    async def run(self, client: str, function: Callable[[], T]) -> T:
        """Run `function` on behalf of `client`; not where the caller is cancelled before its turn."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        self._begin_next()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # its turn came at the same moment
                self._end(0.0)
            raise
        began_s = time.perf_counter()
        running = asyncio.get_running_loop().run_in_executor(None, function)
        try:
            return await asyncio.shield(running)
        finally:
            if running.done():
                self._end(time.perf_counter() - began_s)
            else:  # cancelled: what it holds is in memory until it has ended

                def end(running: asyncio.Future[T]) -> None:
                    running.exception()  # nobody else asks for it
                    self._end(time.perf_counter() - began_s)

                running.add_done_callback(end)

    def _end(self, elapsed_s: float) -> None:
        self._scheduler.charge(elapsed_s)
        self._busy = False
        self._begin_next()

    def _begin_next(self) -> None:
        while self._waiting and not self._busy:
            turns = self._waiting[client := self._scheduler.choose(self._waiting)]
            turn = turns.popleft()
            if not turns:
                del self._waiting[client]
            if not turn.cancelled():
                self._busy = True
                turn.set_result(None)
