"""The writing end of a stream on uvloop, which the client and the servers use and whose errors are its own."""

import asyncio
import socket

import torch
import uvloop

from petals_tune.net.writer import MessageWriter
from petals_tune.wire.codec import decode
from petals_tune.wire.frames import BROKEN, HEADER, Assembler, read_header
from petals_tune.wire.messages import Forward, Message, Ping
from petals_tune.wire.span import BlockSpan

LARGE = Forward(span=BlockSpan(0, 1), hidden=torch.zeros(1, 64, 2**18))  # 64 MB: more than a socket takes at once


async def ends() -> tuple[MessageWriter, asyncio.StreamReader, asyncio.StreamWriter]:
    ours, theirs = socket.socketpair()
    _, writer = await asyncio.open_connection(sock=ours)
    return MessageWriter(writer), *await asyncio.open_connection(sock=theirs)


async def received(reader: asyncio.StreamReader, count: int) -> dict[int, Message]:
    """The next `count` messages by id, in the order in which they were complete."""
    assembler, found = Assembler(max_message_bytes=2**30, max_open_bytes=2**30), {}
    while len(found) < count:
        length, message_id, remaining = read_header(await reader.readexactly(HEADER.size))
        body = assembler.feed(message_id, await reader.readexactly(length), remaining)
        if body is not None:
            found[message_id] = decode(body)
    return found


def test_a_small_message_overtakes_a_large_one_and_bytes_are_counted():
    async def check() -> None:
        writer, reader, _ = await ends()
        large, small = (asyncio.create_task(writer.send(*each)) for each in ((1, LARGE), (2, Ping())))
        assert list(await received(reader, 2)) == [2, 1]
        assert await large > 2**26 > 100 > await small

    uvloop.run(check())


def test_writers_that_wait_for_a_slow_reader_fail_with_a_stream_error_when_the_stream_is_closed():
    async def check() -> None:
        writer, _, _ = await ends()
        sends = [asyncio.create_task(writer.send(number, LARGE)) for number in range(3)]
        await asyncio.sleep(0.01)
        assert not any(task.done() for task in sends), "the reader reads nothing"
        writer.close()
        writer._writer.transport.abort()
        errors = await asyncio.gather(*sends, return_exceptions=True)
        assert all(isinstance(error, BROKEN) for error in errors), errors

    uvloop.run(check())
