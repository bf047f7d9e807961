"""Read-only swarm monitor: reads the directory and pings every server."""

from __future__ import annotations

import asyncio
import time

from petals_tune.errors import PetalsTuneError
from petals_tune.net.directory import Directory
from petals_tune.net.peer import Joined
from petals_tune.net.stats import SwarmStats
from petals_tune.net.stream import ServerStream
from petals_tune.wire.messages import Ping
from petals_tune.wire.records import ServerRecord
from servers.health.report import Answer, Report, report

ANSWER_S = 3.0  # timeout of a ping; a server that takes longer is silent
MOST_AT_ONCE = 64  # pings at the same time


class Watch:
    """Read-only swarm monitor. Keeps one stream to each server open between looks."""

    def __init__(self, here: Joined):
        self._here = here
        self._directory = Directory(here.node)
        self._streams: dict[str, ServerStream] = {}
        self._asking = asyncio.Semaphore(MOST_AT_ONCE)

    async def look(self) -> Report:
        """Return the state of the swarm now."""
        snapshot = await self._directory.snapshot()
        answers = await asyncio.gather(*(self._ask(server) for server in snapshot.servers))
        online = {server.peer: answer for server, answer in zip(snapshot.servers, answers, strict=True)}
        for peer in self._streams.keys() - online.keys():
            await self._streams.pop(peer).close()
        records = sorted((*snapshot.servers, *snapshot.joining), key=lambda server: (server.blocks, server.peer))
        return report(records, online, now_unix_s=time.time())

    async def close(self) -> None:
        for stream in self._streams.values():
            await stream.close()
        self._streams.clear()

    async def _ask(self, server: ServerRecord) -> Answer:
        async with self._asking:
            try:
                stream = await self._stream(server)
                started_s = time.perf_counter()
                await stream.call(Ping(), timeout_s=ANSWER_S)
                return Answer(latency_s=time.perf_counter() - started_s)
            except PetalsTuneError as error:
                return Answer(problem=str(error).partition("\n")[0])

    async def _stream(self, server: ServerRecord) -> ServerStream:
        stream = self._streams.get(server.peer)
        if stream is None or not stream.alive:
            stream = self._streams[server.peer] = await ServerStream.open(
                self._here.p2p,
                server.peer,
                server.addresses,
                None,
                members=self._here.members,
                timeout_s=ANSWER_S,
                stats=SwarmStats(),
            )
        return stream
