"""A client in a swarm whose directory and servers are played by the test."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import Any

import msgspec

from petals_tune.net.directory import Snapshot
from petals_tune.net.in_process import InProcessDirectory, InProcessNetwork, InProcessTransport
from petals_tune.net.stream import ServerStream
from petals_tune.net.transport import Connection
from petals_tune.swarm.client import SwarmClient
from petals_tune.swarm.retry import RetryPolicy
from petals_tune.swarm.routes import known
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan
from tests.net.played_peer import LONG_S, PlayedPeer, accepted, answer_pings

MODEL = "m"
WHOLE = BlockSpan(0, 6)


def record(peer: str, span: str = "0:6", **changes: Any) -> ServerRecord:
    blocks = BlockSpan.parse(span)
    return ServerRecord(
        **{
            "peer": peer,
            "addresses": (),
            "model": MODEL,
            "model_name": "tiny",
            "blocks": blocks,
            "total_blocks": 6,
            "quantization": "none",
            "dtype": "float32",
            **changes,
        }
    )


A, B = record("a"), record("b")


class Shown(InProcessDirectory):
    """Shows what the test wants shown, and counts how often."""

    def __init__(self, *records: ServerRecord):
        super().__init__()
        self.records = records
        self.readings = 0
        self.before: Callable[[], Awaitable[object]] = lambda: asyncio.sleep(0)

    async def snapshot(self, model: str, blocks: BlockSpan, *, thorough: bool = False) -> Snapshot:
        self.readings += 1
        await self.before()
        ours = [record for record in self.records if record.model == model]
        return msgspec.structs.replace(Snapshot.of(ours), taken_at_s=known.time.monotonic())


class Lines(InProcessNetwork):
    """Notes who is dialled; those that are `silent` never answer that."""

    def __init__(self) -> None:
        super().__init__()
        self.silent: Collection[str] = ()
        self.dialled: list[str] = []

    def find(self, peer_id: str) -> InProcessTransport:
        self.dialled.append(peer_id)
        return super().find(peer_id)

    async def connect(self, dialling: str, accepting: str) -> tuple[Connection, Connection]:
        if accepting in self.silent:
            await asyncio.Event().wait()
        return await super().connect(dialling, accepting)


class Swarm:
    """A client, a directory that shows `records`, and servers that greet and answer pings."""

    def __init__(self, *records: ServerRecord, **options: Any):
        self.network = Lines()
        self.directory = self.network.directory = Shown(*records)
        self.client = SwarmClient(self.network.peer("client"), MODEL, RetryPolicy(connect_s=LONG_S), WHOLE, **options)
        self._played: list[PlayedPeer] = []

    @classmethod
    async def up(cls, *records: ServerRecord, without: Collection[str] = (), **options: Any) -> Swarm:
        """A swarm whose servers can be reached, all but those `without`."""
        swarm = cls(*records, **options)
        for each in records:
            if each.peer not in without:
                await answer_pings(swarm.network, each.peer)
        return swarm

    async def opened(self, server: ServerRecord) -> ServerStream:
        """A stream to `server`, which begins to accept with this."""
        ends = await accepted(self.network, server.peer)
        opening = asyncio.create_task(self.client.stream(server))
        self._played.append(await ends.get())
        await self._played[-1].welcome()
        return await opening

    async def peers(self, span: BlockSpan = WHOLE, **wish: Any) -> list[str]:
        return [hop.server.peer for hop in await self.client.route(span, **{"work": 1, **wish})]

    def known(self) -> list[str]:
        return [server.peer for server in self.client.servers]


class Clock:
    """The time as the client sees it."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s
