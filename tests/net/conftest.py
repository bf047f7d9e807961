from collections.abc import AsyncIterator, Callable

import pytest_asyncio

from petals_tune.net.stream import ServerStream
from tests.net.played_peer import PlayedPeer, opening


@pytest_asyncio.fixture
async def connect() -> AsyncIterator[Callable]:
    """Opens streams to a played server; ends them after the test."""
    opened: list[ServerStream] = []

    async def make(**welcome: int) -> tuple[ServerStream, PlayedPeer]:
        task, peer = await opening()
        await peer.welcome(**welcome)
        opened.append(await task)
        return opened[-1], peer

    yield make
    for stream in opened:
        await stream.close()
