"""Adapters on their way to the servers that need them.

An adapter travels by version: once to each server, before the first request that names it.
"""

from __future__ import annotations

import asyncio

from petals_tune.errors import AdapterMissing
from petals_tune.swarm.client import SwarmClient
from petals_tune.swarm.route import Hop
from petals_tune.swarm.trace import CallContext
from petals_tune.wire.messages import Message, PutAdapter

KEPT_UPLOADS = 8  # versions of adapters that a stream remembers to have carried; servers keep fewer


class AdapterUploads:
    """Gives servers the adapter of a call. All methods run on the background loop."""

    def __init__(self, client: SwarmClient):
        self._client = client
        self._running: set[asyncio.Task[asyncio.Task[None]]] = set()  # asyncio keeps no strong reference to a task

    async def ask(self, hop: Hop, request: Message, context: CallContext) -> Message:
        """Ask the server of `hop`, which is given the adapter before, and again if it forgot it."""
        if not context.adapter_on(hop.span):
            return await self._client.ask(hop.server, request)
        upload = await self._upload(hop, context)
        try:
            return await self._client.ask(hop.server, request)
        except AdapterMissing:
            await self._upload(hop, context, instead_of=upload)
            return await self._client.ask(hop.server, request)

    async def _upload(
        self, hop: Hop, context: CallContext, *, instead_of: asyncio.Task[None] | None = None
    ) -> asyncio.Task[None]:
        """Give the server the adapter: once, however many micro-batches need it at the same time."""
        assert context.adapter is not None
        stream = await self._client.stream(hop.server)
        name = (context.adapter.version, hop.span)
        upload = stream.adapters.get(name)
        if upload is None or upload is instead_of or (upload.done() and (upload.cancelled() or upload.exception())):
            put = PutAdapter(version=context.adapter.version, span=hop.span, parts=context.adapter_on(hop.span))
            upload = stream.adapters[name] = asyncio.create_task(self._put(hop, put))
            if len(stream.adapters) > KEPT_UPLOADS:
                del stream.adapters[next(iter(stream.adapters))]
        await asyncio.shield(upload)
        return upload

    async def _put(self, hop: Hop, put: PutAdapter) -> None:
        await self._client.ask(hop.server, put)

    def begin(self, hop: Hop, context: CallContext) -> None:
        """Start to give the adapter to a server further down the route, while those before it compute."""
        if context.adapter_on(hop.span):
            task = asyncio.create_task(self._upload(hop, context))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # `ask` meets the error itself
