"""Read-only monitor of a network: reads the directory, model by model, and pings the servers that it finds."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Sequence

import msgspec

from petals_tune.errors import PetalsTuneError
from petals_tune.net.directory import Snapshot
from petals_tune.net.peer import Peer
from petals_tune.net.pool import StreamPool
from petals_tune.wire.messages import Ping
from petals_tune.wire.records import ServerRecord, group_by_model, usual_blocks
from petals_tune.wire.span import BlockSpan
from servers.health.report import Answer, Report, report

ANSWER_S = 3.0  # timeout of a ping; a server that takes longer is silent
MOST_AT_ONCE = 128  # pings at the same time
# Strangers can announce as many models and servers as they like.
MOST_MODELS = 32  # that are looked at
MOST_SERVERS = 1_024  # of all models; each has an equal share
MODELS_AT_ONCE = 8


class Watch:
    """Read-only monitor. Keeps one stream to each server open between looks."""

    def __init__(self, peer: Peer):
        self._directory = peer.directory
        self._pool = StreamPool(peer, model=None, timeout_s=ANSWER_S)
        self._salt = secrets.token_bytes(16)  # nobody can choose a peer id that is always looked at
        self._asking = asyncio.Semaphore(MOST_AT_ONCE)
        self._reading = asyncio.Semaphore(MODELS_AT_ONCE)

    async def look(self) -> Report:
        """Return the state of the network now."""
        models = group_by_model(await self._directory.models())
        snapshots = await asyncio.gather(*(self._read(records) for records in models[:MOST_MODELS]))
        snapshots = [self._share(snapshot, MOST_SERVERS // len(snapshots)) for snapshot in snapshots]
        servers = [server for snapshot in snapshots for server in snapshot.servers]
        answers = await asyncio.gather(*(self._ask(server) for server in servers))
        online = {server.peer: answer for server, answer in zip(servers, answers, strict=True)}
        for peer in self._pool.peers - online.keys():
            await self._pool.close(peer)
        return report(snapshots, online, now_unix_s=time.time(), more_models=len(models[MOST_MODELS:]))

    async def _read(self, records: Sequence[ServerRecord]) -> Snapshot:
        """Read the servers of one model, of which `records` are some."""
        async with self._reading:
            return await self._directory.snapshot(records[0].model, BlockSpan(0, usual_blocks(records)))

    def _share(self, snapshot: Snapshot, most: int) -> Snapshot:
        """At most so many servers, the same in each look: first those that hold blocks which no other one has."""
        if len(snapshot.servers) + len(snapshot.joining) <= most:
            return snapshot
        drawn = sorted(snapshot.servers, key=lambda server: self._rank(server.peer))
        needed, covered = [], set[int]()
        for server in drawn:
            if not covered.issuperset(blocks := range(server.blocks.start, server.blocks.stop)):
                needed.append(server)
                covered.update(blocks)
        chosen = list({server.peer: server for server in (*needed, *drawn)}.values())[:most]
        joining = snapshot.joining[: most - len(chosen)]
        sample = Snapshot.of((*chosen, *joining))
        return msgspec.structs.replace(sample, stands_for={chosen[0].peer: len(snapshot.servers) / len(chosen)})

    def _rank(self, peer: str) -> bytes:
        return hashlib.sha256(self._salt + peer.encode()).digest()

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
