import asyncio

import pytest

from petals_tune.swarm.routes import dialler as module
from petals_tune.swarm.routes.dialler import A_MINUTE, AT_ONCE, KEPT_FREE, KEPT_FREE_A_MINUTE, SLOW_S, Dialler
from petals_tune.wire.records import ServerRecord
from tests.swarm.routes.test_route import server

SERVERS = [server(f"{number:03}", 0, 4) for number in range(2 * A_MINUTE)]


class Line:
    """Servers that answer a dial when the test wants it."""

    def __init__(self) -> None:
        self.dialled: list[str] = []
        self.answer = asyncio.Event()
        self.dialler = Dialler(self.open)

    async def open(self, server: ServerRecord) -> None:
        self.dialled.append(server.peer)
        await self.answer.wait()

    def begin(self, count: int, *, awaited: bool) -> int:
        """How many of so many new dials were begun."""
        first = len(self.dialled)
        return sum(self.dialler.begin(each, awaited=awaited) for each in SERVERS[first : first + count])

    async def finish(self) -> None:
        self.answer.set()
        while self.dialler.busy:
            await self.dialler.wait()
        self.answer.clear()


async def test_so_many_are_dialled_at_once_and_fewer_where_nobody_waits():
    line = Line()
    assert line.begin(AT_ONCE, awaited=False) == AT_ONCE - KEPT_FREE
    await asyncio.sleep(0)
    assert line.begin(2 * AT_ONCE, awaited=True) == KEPT_FREE
    await line.finish()
    assert line.begin(1, awaited=False) == 1
    await line.dialler.close()


async def test_so_many_are_dialled_in_a_minute(monkeypatch):
    now_s = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now_s)
    line, begun = Line(), 0
    line.answer.set()

    async def begin_all(awaited: bool) -> int:
        total = 0
        while count := line.begin(1, awaited=awaited):
            total += count
            while line.dialler.busy:
                await asyncio.sleep(0)
        return total

    begun = await begin_all(False)
    assert begun == A_MINUTE - KEPT_FREE_A_MINUTE
    assert await begin_all(True) == KEPT_FREE_A_MINUTE
    now_s += 60.0
    assert line.begin(1, awaited=False) == 1
    await line.dialler.close()


async def test_a_server_is_dialled_once_at_a_time_and_seems_slow_after_a_while(monkeypatch):
    now_s = 100.0
    monkeypatch.setattr(module, "awake_s", lambda: now_s)
    line = Line()
    assert [line.dialler.begin(SERVERS[0], awaited=True) for _ in range(3)] == [True] * 3
    await asyncio.sleep(0)
    assert line.dialled == ["000"]
    assert not line.dialler.slow()
    now_s += SLOW_S
    assert list(line.dialler.slow()) == ["000"]
    line.answer.set()
    await line.dialler.wait()
    await asyncio.sleep(0)
    assert not line.dialler.slow()
    assert line.dialler.begin(SERVERS[0], awaited=True), "again"
    await line.dialler.close()


@pytest.mark.parametrize("answers", [True, False])
async def test_who_waits_goes_on_when_one_answers_or_seems_slow(monkeypatch, answers):
    monkeypatch.setattr(module, "SLOW_S", 60.0 if answers else 0.01)
    line = Line()
    await line.dialler.wait()
    line.begin(2, awaited=True)
    if answers:
        line.answer.set()
    await asyncio.wait_for(line.dialler.wait(), 30.0)
    await line.dialler.close()


async def test_a_closed_dialler_dials_nobody():
    line = Line()
    line.begin(3, awaited=True)
    await line.dialler.close()
    await asyncio.sleep(0)
    assert not line.dialler.busy
