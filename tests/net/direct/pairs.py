"""Two ends of a direct connection, over TCP on 127.0.0.1."""

from __future__ import annotations

import asyncio

from petals_tune.net.direct.connection import DirectConnection
from petals_tune.net.direct.records import new_key


async def direct_pair() -> tuple[DirectConnection, DirectConnection]:
    """The ends of peer "left", which leads to "right", and of peer "right"."""
    one, other = new_key(), new_key()
    left = DirectConnection("right", sends=one, receives=other)
    right = DirectConnection("left", sends=other, receives=one)
    await connect(left, right)
    return left, right


async def connect(near: asyncio.BaseProtocol, far: asyncio.BaseProtocol) -> None:
    """Connect two protocols of asyncio."""
    loop, accepted = asyncio.get_running_loop(), asyncio.Event()

    def accept() -> asyncio.BaseProtocol:
        loop.call_soon(accepted.set)
        return far

    server = await loop.create_server(accept, "127.0.0.1", 0)
    await loop.create_connection(lambda: near, *server.sockets[0].getsockname())
    await accepted.wait()
    server.close()


class RawEnd(asyncio.Protocol):
    """An end that sends and receives bytes as they are on the line."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.received = bytearray()
        self.came, self.ended = asyncio.Event(), asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's has another base

    def data_received(self, data: bytes) -> None:
        self.received += data
        self.came.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()
