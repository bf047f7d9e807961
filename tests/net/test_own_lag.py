import asyncio
import time

import pytest

from petals_tune.net import own_lag
from petals_tune.net.own_lag import awake_s, patience


class Clock:
    now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


async def test_the_clock_stands_still_where_the_loop_does(monkeypatch):
    monkeypatch.setattr(own_lag, "time", clock := Clock())
    monkeypatch.setattr(own_lag, "TICK_S", tick_s := 2**-7)
    began_s = awake_s()
    clock.now_s += tick_s / 2
    assert awake_s() - began_s == tick_s / 2
    clock.now_s += 7.0
    assert awake_s() - began_s == tick_s, "also before the loop has run again"
    while own_lag._clocks[asyncio.get_running_loop()]._ticked_s < clock.now_s:
        await asyncio.sleep(0.001)
    assert awake_s() - began_s == tick_s
    clock.now_s += tick_s / 2
    assert awake_s() - began_s == 1.5 * tick_s


async def test_a_deadline_does_not_count_the_time_for_which_the_loop_stood_still(monkeypatch):
    monkeypatch.setattr(own_lag, "TICK_S", tick_s := 0.05)
    arrives = asyncio.Event()
    asyncio.get_running_loop().call_later(1.2 * tick_s, arrives.set)
    async with patience(1.1 * tick_s):
        time.sleep(2 * tick_s)  # which is the point
        await arrives.wait()


async def test_a_deadline_ends_what_others_do_not_do():
    with pytest.raises(TimeoutError):
        async with patience(0.01):
            await asyncio.Event().wait()
    async with patience(None):
        await asyncio.sleep(0)


async def test_a_deadline_that_was_kept_ends_nothing():
    async with patience(0.01):
        pass
    await asyncio.sleep(0.03)
