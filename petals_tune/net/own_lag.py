"""Time during which this process's event loop ran: a deadline for another peer does not count our own standstill.

A loop that decodes a large message, or a process that is stopped or swapped out, reads nothing and answers nothing.
What others sent meanwhile is still to be read when it goes on, and none of that time is theirs.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

TICK_S = 0.25


class LagClock:
    """The clock of one event loop, which stands still where the loop does. Exact to TICK_S."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = weakref.ref(loop)
        self._lost_s, self._ticked_s = 0.0, time.monotonic()
        loop.call_later(TICK_S, self._tick)

    def now_s(self) -> float:
        """`time.monotonic()` less the time for which the loop stood still, also where it goes on just now."""
        return self._ticked_s + min(time.monotonic() - self._ticked_s, TICK_S) - self._lost_s

    def _tick(self) -> None:
        now_s = time.monotonic()
        self._lost_s += max(now_s - self._ticked_s - TICK_S, 0.0)
        self._ticked_s = now_s
        if (loop := self._loop()) is not None and not loop.is_closed():
            loop.call_later(TICK_S, self._tick)


_clocks: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LagClock] = weakref.WeakKeyDictionary()


def awake_s() -> float:
    """Seconds on the clock of the running loop; only differences mean anything."""
    loop = asyncio.get_running_loop()
    if (clock := _clocks.get(loop)) is None:
        clock = _clocks[loop] = LagClock(loop)
    return clock.now_s()


@asynccontextmanager
async def patience(seconds: float | None) -> AsyncIterator[None]:
    """As `asyncio.timeout`, in seconds during which this loop ran; None: without end. Raises TimeoutError."""
    if seconds is None:
        yield
        return
    loop, ends_s = asyncio.get_running_loop(), awake_s() + seconds
    async with asyncio.timeout(None) as limit:
        looking: asyncio.TimerHandle

        def look() -> None:
            nonlocal looking
            if (left_s := ends_s - awake_s()) > 0:
                looking = loop.call_later(left_s, look)
            else:
                limit.reschedule(loop.time())

        looking = loop.call_later(seconds, look)
        try:
            yield
        finally:
            looking.cancel()
