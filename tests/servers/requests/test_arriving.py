"""Requests wait for the adapter that they name, and for no other. With real adapters: test_execution.py."""

from __future__ import annotations

import asyncio

from petals_tune.wire.span import BlockSpan
from servers.requests.arriving import ArrivingAdapters
from tests.servers.peers import forward, put


async def test_only_requests_of_the_same_client_for_the_same_version_wait():
    arriving = ArrivingAdapters()
    with arriving.arrival("me", put()):
        await arriving.wait("me", forward())
        await arriving.wait("me", forward(adapter="other"))
        await arriving.wait("another", forward(adapter="v"))
        waiting = asyncio.create_task(arriving.wait("me", forward(adapter="v")))
        await asyncio.sleep(0)
        assert not waiting.done()
    await waiting
    await arriving.wait("me", forward(adapter="v"))


async def test_a_second_upload_of_a_version_takes_the_place_of_the_first():
    arriving, first = ArrivingAdapters(), asyncio.Event()

    async def slow() -> None:
        with arriving.arrival("me", put()):
            await first.wait()

    uploading = asyncio.create_task(slow())
    await asyncio.sleep(0)
    with arriving.arrival("me", put()):
        first.set()
        await uploading
        waiting = asyncio.create_task(arriving.wait("me", forward(adapter="v")))
        await asyncio.sleep(0)
        assert not waiting.done(), "the second one is still under way"
    await waiting


async def test_an_upload_of_other_blocks_is_not_waited_for():
    arriving = ArrivingAdapters()
    with arriving.arrival("me", put(span=BlockSpan(5, 6))):
        await arriving.wait("me", forward(adapter="v"))
