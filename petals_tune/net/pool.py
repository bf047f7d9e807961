"""Open streams to servers, one for each, shared by all who talk to them."""

from __future__ import annotations

import asyncio

from petals_tune.errors import ServerUnreachable
from petals_tune.net.peer import Peer
from petals_tune.net.stats import SwarmStats
from petals_tune.net.stream import ServerStream
from petals_tune.wire.records import ServerRecord


class StreamPool:
    """One stream for each server, opened by the first who asks for it; one that ended or failed is opened anew."""

    def __init__(self, peer: Peer, *, model: str | None, timeout_s: float, stats: SwarmStats | None = None):
        """Servers have to serve `model` (None: any) and greet within `timeout_s`; `stats` counts what goes through."""
        self._peer, self._model, self._timeout_s, self._stats = peer, model, timeout_s, stats or SwarmStats()
        self._streams: dict[str, asyncio.Task[ServerStream]] = {}

    async def get(self, server: ServerRecord) -> ServerStream:
        """The stream to `server`. Raises as `ServerStream.open` does; all who wait for one opening share its error."""
        opening = self._streams.get(server.peer)
        if opening is None or (opening.done() and _living(opening) is None):
            opening = self._streams[server.peer] = asyncio.create_task(self._open(server))
            # Those who waited may be cancelled; asyncio would complain of an error that nobody asked for.
            opening.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            if opening.cancelled() and not asyncio.current_task().cancelling():  # type: ignore[union-attr]  # in a task
                raise ServerUnreachable(f"the stream to server {server.peer} was closed", peer=server.peer) from None
            raise

    def living(self, peer_id: str) -> ServerStream | None:
        """The stream to a server if it is open; never opens one."""
        opening = self._streams.get(peer_id)
        return None if opening is None else _living(opening)

    @property
    def peers(self) -> frozenset[str]:
        """Ids of the servers to which a stream was opened or tried."""
        return frozenset(self._streams)

    async def close(self, peer_id: str | None = None) -> None:
        """End the stream to one server, or all streams."""
        for peer in [peer_id] if peer_id is not None else list(self._streams):
            if (opening := self._streams.pop(peer, None)) is not None:
                opening.cancel()
                for stream in await asyncio.gather(opening, return_exceptions=True):
                    if isinstance(stream, ServerStream):
                        await stream.close()

    async def _open(self, server: ServerRecord) -> ServerStream:
        return await ServerStream.open(
            self._peer.transport,
            server.peer,
            server.addresses,
            model=self._model,
            members=self._peer.members,
            timeout_s=self._timeout_s,
            stats=self._stats,
        )


def _living(opening: asyncio.Task[ServerStream]) -> ServerStream | None:
    if not opening.done() or opening.cancelled() or opening.exception() is not None or not opening.result().alive:
        return None
    return opening.result()
