"""The servers of one model that a client knows: the directory's answers, and those that an answer left out."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection

import msgspec

from petals_tune.net.directory import Directory, Snapshot
from petals_tune.swarm.routes.table import ServerTable
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan

REMEMBERED_S = 60.0  # as long as a server's announcement lasts by default
REFRESH_S = 15.0  # an older snapshot is renewed while work goes on with it


class KnownServers:
    """Reads the directory, beside the work where it can."""

    def __init__(
        self,
        directory: Directory,
        model: str,
        blocks: BlockSpan,
        *,
        is_open: Callable[[ServerRecord], bool],
        has_failed: Callable[[ServerRecord], bool],
        quantizations: Collection[str] | None = None,
    ):
        """A server that a reading misses stays known while a stream to it `is_open`, or for a while if it works.

        Servers whose blocks are in none of `quantizations` are passed over; None: all are wanted.
        """
        self._directory, self._model, self._blocks = directory, model, blocks
        self._quantizations = quantizations
        self.passed_over: tuple[ServerRecord, ...] = ()  # of the last reading, for their quantization
        self._is_open, self._has_failed = is_open, has_failed
        self._snapshot: Snapshot | None = None
        self._table: ServerTable | None = None  # of the snapshot
        self._heard_s: dict[str, float] = {}  # when the directory listed a server last, by peer
        self._refreshing: asyncio.Task[None] | None = None

    @property
    def servers(self) -> tuple[ServerRecord, ...]:
        """The servers of our model that are known now."""
        return () if self._snapshot is None else self._snapshot.servers

    @property
    def table(self) -> ServerTable:
        """Those servers, ready for planning."""
        if self._table is None:
            assert self._snapshot is not None, "the directory was never read"
            self._table = ServerTable(self._snapshot.servers)
        return self._table

    @property
    def age_s(self) -> float:
        """Seconds since the directory was read; inf: never."""
        return math.inf if self._snapshot is None else time.monotonic() - self._snapshot.taken_at_s

    async def keep_fresh(self) -> None:
        """Read the directory if it was never read; read it again in the background where that was long ago."""
        if self._snapshot is None:
            await self.refresh()
        elif self.age_s > REFRESH_S:
            self.refresh_soon()

    async def refresh(self) -> None:
        """Read the directory again, all of our blocks; those who ask meanwhile wait for the same answer."""
        await asyncio.shield(self.refresh_soon(thorough=True))

    def refresh_soon(self, *, thorough: bool = False) -> asyncio.Task[None]:
        """Begin to read it again, which takes seconds where its nodes just died; nobody has to wait for it."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._refresh(thorough))
            # asyncio would complain of an error that nobody waited for.
            self._refreshing.add_done_callback(lambda done: done.cancelled() or done.exception())
        return self._refreshing

    async def models(self) -> tuple[ServerRecord, ...]:
        """Read which models there are: some servers of each."""
        return await self._directory.models()

    async def _refresh(self, thorough: bool) -> None:
        new = await self._directory.snapshot(self._model, self._blocks, thorough=thorough)
        wanted = self._quantizations
        if wanted is not None:
            self.passed_over = tuple(server for server in new.servers if server.quantization not in wanted)
            servers = tuple(server for server in new.servers if server.quantization in wanted)
            new = msgspec.structs.replace(new, servers=servers)
        seen = {server.peer for server in (*new.servers, *new.joining, *self.passed_over)} | new.left
        self._heard_s |= {server.peer: new.taken_at_s for server in new.servers}
        kept = [server for server in self.servers if server.peer not in seen and self._is_remembered(server)]
        self._snapshot, self._table = msgspec.structs.replace(new, servers=(*new.servers, *kept)), None
        listed = {server.peer for server in self._snapshot.servers}
        self._heard_s = {peer: heard_s for peer, heard_s in self._heard_s.items() if peer in listed}

    def _is_remembered(self, server: ServerRecord) -> bool:
        """Whether a server stays known that the directory did not show: a reading misses some while nodes are dead."""
        if self._is_open(server):
            return True
        heard_s = self._heard_s.get(server.peer, -math.inf)
        return time.monotonic() - heard_s < REMEMBERED_S and not self._has_failed(server)

    async def close(self) -> None:
        """Read no more."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
