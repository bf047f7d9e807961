"""Bounded dialling: so many servers at a time and so many a minute, however many are announced."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine
from typing import Any

from petals_tune.net.own_lag import awake_s
from petals_tune.wire.records import ServerRecord

AT_ONCE = 32
KEPT_FREE = 28  # of them for work that waits: nobody waits for the others
A_MINUTE = 240
KEPT_FREE_A_MINUTE = 200
SLOW_S = 0.5  # a server that did not answer a dial in this time is waited for beside others


class Dialler:
    """Runs `opening` for servers, each once at a time. On the background loop."""

    def __init__(self, opening: Callable[[ServerRecord], Coroutine[Any, Any, None]]):
        """`opening` opens a stream; what goes wrong there is its own business."""
        self._opening = opening
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._began_s: dict[str, float] = {}
        self._begun_s: deque[float] = deque()  # of the last minute

    @property
    def busy(self) -> bool:
        """Whether any server is being dialled."""
        return bool(self._tasks)

    def slow(self) -> Collection[str]:
        """Peers that are being dialled and should have answered."""
        now_s = awake_s()
        return [peer for peer, began_s in self._began_s.items() if now_s - began_s >= SLOW_S]

    def begin(self, server: ServerRecord, *, awaited: bool) -> bool:
        """Dial `server`, or go on with it; False where no more dials are allowed now (fewer if nobody waits)."""
        if server.peer in self._tasks:
            return True
        now_s = time.monotonic()
        while self._begun_s and now_s - self._begun_s[0] >= 60.0:
            self._begun_s.popleft()
        at_once, a_minute = AT_ONCE - len(self._tasks), A_MINUTE - len(self._begun_s)
        if at_once <= (0 if awaited else KEPT_FREE) or a_minute <= (0 if awaited else KEPT_FREE_A_MINUTE):
            return False
        self._begun_s.append(now_s)
        self._began_s[server.peer] = awake_s()
        task = self._tasks[server.peer] = asyncio.create_task(self._opening(server))
        task.add_done_callback(lambda _: self._end(server.peer))
        return True

    async def wait(self) -> None:
        """Wait until a dial ends, or until one may be slow."""
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=SLOW_S, return_when=asyncio.FIRST_COMPLETED)

    async def close(self) -> None:
        """End all dials."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _end(self, peer: str) -> None:
        del self._tasks[peer], self._began_s[peer]
