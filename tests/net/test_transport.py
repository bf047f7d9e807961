"""Connections of both kinds on real sockets and both event loops: whatever ends one is a ConnectionLost."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
import uvloop

from petals_tune.errors import ConnectionLost
from petals_tune.net.transport import Connection, StreamConnection
from tests.net.direct.pairs import direct_pair
from tests.raising import raises

LARGE = bytes(2**24)  # more than a socket takes at once


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, None]], None]:
    return request.param


async def stream_pair() -> tuple[Connection, Connection]:
    left, right = [await asyncio.open_connection(sock=end) for end in socket.socketpair()]
    return StreamConnection("right", *left), StreamConnection("left", *right)


@pytest.fixture(params=[stream_pair, direct_pair], ids=["streams", "direct"])
def pair(request: pytest.FixtureRequest) -> Callable[[], Awaitable[tuple[Connection, Connection]]]:
    return request.param


def test_what_one_end_writes_the_other_reads(run, pair):
    async def check() -> None:
        left, right = await pair()
        await left.write(b"abc", memoryview(b"def"))
        assert [await right.read_exactly(count) for count in (2, 0, 4)] == [b"ab", b"", b"cdef"]

    run(check())


def test_the_end_comes_after_all_that_was_written_and_reading_goes_on(run, pair):
    async def check() -> None:
        left, right = await pair()
        writing = asyncio.create_task(left.write(LARGE))
        await asyncio.sleep(0)
        left.finish()
        assert await right.read_exactly(len(LARGE)) == LARGE
        await writing
        with raises(ConnectionLost, peer="left"):
            await right.read_exactly(1)
        with raises(ConnectionLost, peer="right"):
            await left.write(b"more")
        await right.write(b"answer")
        assert await left.read_exactly(6) == b"answer"
        right.close()
        left.finish()  # again, and after the other end has gone
        left.close()
        left.finish()

    run(check())


@pytest.mark.parametrize("end", ["close", "abort", "finish"])
def test_half_of_what_was_due_is_a_lost_connection(run, pair, end):
    async def check() -> None:
        left, right = await pair()
        await right.write(b"ab")
        getattr(right, end)()
        with raises(ConnectionLost, peer="right"):
            await left.read_exactly(3)

    run(check())


@pytest.mark.parametrize("end", ["close", "abort"])
def test_who_writes_to_an_end_that_is_gone_is_told(run, pair, end):
    async def check() -> None:
        left, right = await pair()
        getattr(right, end)()
        with raises(ConnectionLost, peer="right"):
            while True:
                await left.write(b"x")
                await asyncio.sleep(0)

    run(check())


def test_a_slow_reader_stops_the_writer_until_its_own_end_is_closed(run, pair):
    async def check() -> None:
        left, _right = await pair()
        writing = [asyncio.create_task(left.write(LARGE)) for _ in range(2)]
        reading = asyncio.create_task(left.read_exactly(1))
        await asyncio.sleep(0.01)
        assert not any(task.done() for task in (*writing, reading))
        assert not left.closed
        left.abort()
        assert left.closed
        await asyncio.gather(*writing, return_exceptions=True)  # asyncio's streams raise nothing there
        for work in (reading, left.read_exactly(1), left.write(b"x")):
            with raises(ConnectionLost, peer="right"):
                await work

    run(check())


def test_a_bug_of_ours_is_not_taken_for_a_lost_connection(run, pair):
    async def check() -> None:
        left, _right = await pair()
        with pytest.raises(ValueError, match="less than zero"):
            await left.read_exactly(-1)
        reading = asyncio.create_task(left.read_exactly(1))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="another coroutine"):
            await left.read_exactly(1)
        reading.cancel()
        with pytest.raises(TypeError):
            await left.write("text")  # type: ignore[arg-type]

    run(check())
