"""A directory in memory, and records for it."""

import time
from collections.abc import Awaitable, Callable
from typing import Any

from petals_tune.net.directory import Snapshot
from petals_tune.wire.records import ServerRecord, Throughput
from petals_tune.wire.span import BlockSpan

MODEL = "digest"


def record(peer: str, blocks: str, rate: float = 60.0, **fields: Any) -> ServerRecord:
    given = {"model": MODEL, "model_name": "tiny", "total_blocks": 12, "quantization": "none", "dtype": "float32"}
    speed = Throughput(step=rate, batch=rate)
    return ServerRecord(
        **{**given, "peer": peer, "addresses": (), "blocks": BlockSpan.parse(blocks), "throughput": speed, **fields}
    )


class MemoryDirectory:
    """What a Directory offers, without a DHT; keeps what was announced and withdrawn."""

    def __init__(self, *records: ServerRecord):
        self.records = {each.peer: each for each in records}
        self.announced: list[ServerRecord] = []
        self.at_snapshot: Callable[[], Awaitable[None]] | None = None

    async def announce(self, record: ServerRecord, *, lasts_s: float) -> None:
        self.announced.append(record)
        self.records[record.peer] = record

    async def withdraw(self, record: ServerRecord) -> None:
        del self.records[record.peer]

    async def snapshot(self, model: str, blocks: BlockSpan, *, thorough: bool = False) -> Snapshot:
        if self.at_snapshot is not None:
            await self.at_snapshot()
        online, joining = (
            tuple(each for each in self.records.values() if each.state == state and each.model == model)
            for state in ("online", "joining")
        )
        return Snapshot(servers=online, joining=joining, taken_at_s=time.monotonic())
