"""The writer of messages, against a reader that is played by the test."""

import asyncio

import torch
import uvloop

from petals_tune.errors import ConnectionLost
from petals_tune.net.in_process import InProcessNetwork
from petals_tune.net.writer import MessageWriter
from petals_tune.wire.messages import Forward, Ping
from petals_tune.wire.span import BlockSpan
from tests.net.played_peer import PlayedPeer

LARGE = Forward(span=BlockSpan(0, 1), hidden=torch.zeros(1, 64, 2**18))  # 64 MB: more than a socket takes at once


async def writer_and_peer() -> tuple[MessageWriter, PlayedPeer]:
    near, far = await InProcessNetwork().connect("here", "there")
    return MessageWriter(near), PlayedPeer(far)


def test_a_small_message_overtakes_a_large_one_and_bytes_are_counted():
    """On uvloop, as clients and servers run."""

    async def check() -> None:
        writer, peer = await writer_and_peer()
        large, small = (asyncio.create_task(writer.write(*each)) for each in ((1, LARGE), (2, Ping())))
        assert [(await peer.read())[0] for _ in range(2)] == [2, 1]
        assert await large > 2**26 > 100 > await small
        assert await large + await small == peer.read_bytes

    uvloop.run(check())


def test_writers_that_wait_for_a_slow_reader_fail_when_the_connection_is_closed():
    async def check() -> None:
        writer, _peer = await writer_and_peer()
        sends = [asyncio.create_task(writer.write(number, LARGE)) for number in range(3)]
        while writer.blocked_since_s is None:
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        assert not any(task.done() for task in sends), "the reader reads nothing"
        writer.connection.abort()
        errors = await asyncio.gather(*sends, return_exceptions=True)
        assert [type(error) for error in errors] == [ConnectionLost] * 3

    uvloop.run(check())
