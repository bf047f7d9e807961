"""Adapters that are being uploaded: requests that name one wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from petals_tune.wire.messages import Backward, Forward, Message, OpenSession, PutAdapter
from petals_tune.wire.span import BlockSpan


class ArrivingAdapters:
    """The uploads that are under way. Used by the event loop alone.

    A client need not wait for the end of an upload before it names the adapter: requests of a stream start in the order
    in which they came.
    """

    def __init__(self) -> None:
        self._arriving: dict[tuple[str, str, BlockSpan], asyncio.Event] = {}

    @contextmanager
    def arrival(self, client: str, put: PutAdapter) -> Iterator[None]:
        """Hold up requests that name the adapter until the end of the block, however it ends."""
        key, arrived = (client, put.version, put.span), asyncio.Event()
        self._arriving[key] = arrived
        try:
            yield
        finally:
            if self._arriving.get(key) is arrived:
                del self._arriving[key]
            arrived.set()

    async def wait(self, client: str, request: Message) -> None:
        """Wait for the adapter that `request` names, where it is under way."""
        asked = request.again if isinstance(request, Backward) else request
        if not isinstance(asked, Forward | OpenSession) or asked.adapter is None:
            return
        for (owner, version, span), arrived in list(self._arriving.items()):
            if owner == client and version == asked.adapter and span.covers(asked.span):
                await arrived.wait()
