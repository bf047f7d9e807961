"""Read-only swarm monitor: reads the directory and pings every server."""

from __future__ import annotations

import asyncio
import time

from petals_tune.errors import PetalsTuneError
from petals_tune.net.peer import Peer
from petals_tune.net.pool import StreamPool
from petals_tune.wire.messages import Ping
from petals_tune.wire.records import ServerRecord
from servers.health.report import Answer, Report, report

ANSWER_S = 3.0  # timeout of a ping; a server that takes longer is silent
MOST_AT_ONCE = 64  # pings at the same time


class Watch:
    """Read-only swarm monitor. Keeps one stream to each server open between looks."""

    def __init__(self, peer: Peer):
        self._directory = peer.directory
        self._pool = StreamPool(peer, model=None, timeout_s=ANSWER_S)
        self._asking = asyncio.Semaphore(MOST_AT_ONCE)

    async def look(self) -> Report:
        """Return the state of the swarm now."""
        snapshot = await self._directory.snapshot()
        answers = await asyncio.gather(*(self._ask(server) for server in snapshot.servers))
        online = {server.peer: answer for server, answer in zip(snapshot.servers, answers, strict=True)}
        for peer in self._pool.peers - online.keys():
            await self._pool.close(peer)
        records = sorted((*snapshot.servers, *snapshot.joining), key=lambda server: (server.blocks, server.peer))
        return report(records, online, now_unix_s=time.time())

    async def close(self) -> None:
        await self._pool.close()

    async def _ask(self, server: ServerRecord) -> Answer:
        async with self._asking:
            try:
                stream = await self._pool.get(server)
                started_s = time.perf_counter()
                await stream.call(Ping(), timeout_s=ANSWER_S)
                return Answer(latency_s=time.perf_counter() - started_s)
            except PetalsTuneError as error:
                return Answer(problem=str(error).partition("\n")[0])
