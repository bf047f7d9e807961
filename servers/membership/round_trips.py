"""Round trips from this server to servers whose blocks may follow its own in a route."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from petals_tune.errors import PetalsTuneError
from petals_tune.net.background import begin
from petals_tune.net.peer import Peer
from petals_tune.net.stream import ServerStream
from petals_tune.wire.messages import Ping
from petals_tune.wire.records import LONGEST_ROUND_TRIP_S, MAX_ROUND_TRIPS, ServerRecord
from petals_tune.wire.span import BlockSpan

logger = logging.getLogger(__name__)

PERIOD_S = 240.0  # between two measurements, on average
FIRST_AFTER_S = 5.0  # servers that start together begin with one another
ANSWER_S = 5.0  # for a stream, and for a ping
PINGS = 3  # to each server; the quickest counts, since the others waited for something


class RoundTrips:
    """Measures a random sample of the servers that may follow, every few minutes. Used by the event loop alone."""

    def __init__(self, peer: Peer, model: str):
        self._peer, self._model = peer, model
        self.to_followers_s: dict[str, float] = {}  # by peer id; at most MAX_ROUND_TRIPS

    @asynccontextmanager
    async def measuring(self, span: BlockSpan) -> AsyncIterator[None]:
        """Measure in the background, while this server hosts `span`."""
        task = begin(self._keep_measuring(span), "the measuring of round trips")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})
            self.to_followers_s = {}

    async def measure(self, span: BlockSpan) -> None:
        """Measure the round trips to a sample of the servers that may follow blocks `span`."""
        try:
            around = BlockSpan(span.start, span.stop + 1)
            servers = (await self._peer.directory.snapshot(self._model, around)).servers
        except PetalsTuneError as error:
            logger.info("no round trips were measured: %s", error)
            return
        ours = [each for each in servers if each.peer != self._peer.id]
        measured = {server.peer: await self._round_trip_s(server) for server in sample_followers(ours, span)}
        self.to_followers_s = {peer: seconds for peer, seconds in measured.items() if seconds is not None}

    async def _keep_measuring(self, span: BlockSpan) -> None:
        await asyncio.sleep(FIRST_AFTER_S * random.SystemRandom().uniform(0.5, 1.5))
        while True:
            await self.measure(span)
            await asyncio.sleep(PERIOD_S * random.SystemRandom().uniform(0.5, 1.5))

    async def _round_trip_s(self, server: ServerRecord) -> float | None:
        """Seconds of the quickest of a few pings; None where the server cannot be reached."""
        try:
            stream = await ServerStream.open(
                self._peer.transport,
                server.peer,
                server.addresses,
                model=self._model,
                members=self._peer.members,
                timeout_s=ANSWER_S,
            )
            try:
                seconds = min([await _ping_s(stream) for _ in range(PINGS)])
            finally:
                await stream.close()
        except PetalsTuneError as error:
            logger.info("the round trip to server %s was not measured: %s", server.peer, error)
            return None
        return min(max(seconds, 1e-6), LONGEST_ROUND_TRIP_S)


def sample_followers(servers: Sequence[ServerRecord], span: BlockSpan) -> list[ServerRecord]:
    """A random sample of the servers that can go on where `span` ends, or from a block inside it."""
    followers = [server for server in servers if span.start < server.blocks.start <= span.stop < server.blocks.stop]
    return random.SystemRandom().sample(followers, min(len(followers), MAX_ROUND_TRIPS))


async def _ping_s(stream: ServerStream) -> float:
    started_s = time.perf_counter()
    await stream.call(Ping(), timeout_s=ANSWER_S)
    return time.perf_counter() - started_s
