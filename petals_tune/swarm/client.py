"""One client's view of a swarm: the servers that are known, what they cost, whom to pass over, and streams to them."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress

import msgspec

from petals_tune.errors import BadReply, NotFinite, PetalsTuneError, ServerError, SwarmError, UncoveredBlocks
from petals_tune.net.directory import Snapshot
from petals_tune.net.members import Members
from petals_tune.net.peer import Peer, joined
from petals_tune.net.pool import StreamPool
from petals_tune.net.stats import SwarmStats
from petals_tune.net.stream import ServerStream
from petals_tune.swarm.bans import Bans
from petals_tune.swarm.load import Load
from petals_tune.swarm.retry import RetryPolicy
from petals_tune.swarm.route import Hop, plan_route
from petals_tune.wire.records import ServerRecord, same_model
from petals_tune.wire.span import BlockSpan

logger = logging.getLogger(__name__)

REMEMBERED_S = 60.0  # as long as a server's announcement lasts by default
REFRESH_S = 15.0  # an older snapshot is renewed while work goes on with it
STALE_S = 1.0  # an older one is renewed before anybody is told that blocks are missing


class SwarmClient:
    """Knows the servers of one model. All methods run on the background loop."""

    def __init__(self, peer: Peer, model: str, policy: RetryPolicy):
        self.stats = SwarmStats()
        self.policy = policy
        self.load = Load()
        self._peer, self._model = peer, model
        self._snapshot: Snapshot | None = None
        self._heard_s: dict[str, float] = {}  # when the directory listed a server last, by peer
        self._bans = Bans()
        self._streams = StreamPool(peer, model=model, timeout_s=policy.connect_s, stats=self.stats)
        self._refreshing: asyncio.Task[None] | None = None
        self._reaching: dict[str, asyncio.Task[None]] = {}
        self._owned = AsyncExitStack()  # what ends with this client
        self._closed = False

    @classmethod
    async def join(
        cls, initial_peers: Sequence[str], *, model: str, policy: RetryPolicy, members: Members | None = None
    ) -> SwarmClient:
        """Join the swarm, a private one as one of its `members`.

        Raises ConfigError, ServerUnreachable, ClockSkew or AccessDenied.
        """
        async with AsyncExitStack() as stack:
            peer = await stack.enter_async_context(
                joined(initial_peers, members=members, listens=False, connect_s=policy.connect_s)
            )
            client = cls(peer, model, policy)
            client._owned = stack.pop_all()
        return client

    @property
    def servers(self) -> tuple[ServerRecord, ...]:
        """The servers of our model that are known now."""
        known = () if self._snapshot is None else self._snapshot.servers
        return tuple(server for server in known if same_model(server.model, self._model))

    async def refresh(self) -> None:
        """Read the DHT again; all who ask meanwhile wait for the same answer."""
        await asyncio.shield(self.refresh_soon())

    def refresh_soon(self) -> asyncio.Task[None]:
        """Begin to read the DHT again, which takes seconds where its nodes just died; nobody has to wait for it."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._refresh())
            # asyncio would complain of an error that nobody waited for.
            self._refreshing.add_done_callback(lambda done: done.cancelled() or done.exception())
        return self._refreshing

    async def _refresh(self) -> None:
        new = await self._peer.directory.snapshot()
        seen = {server.peer for server in (*new.servers, *new.joining)} | new.left
        self._heard_s |= {server.peer: new.taken_at_s for server in new.servers}
        kept = [server for server in self.servers if server.peer not in seen and self._is_remembered(server)]
        self._snapshot = msgspec.structs.replace(new, servers=(*new.servers, *kept))

    def _is_remembered(self, server: ServerRecord) -> bool:
        """Whether a server stays known that the DHT did not show: a reading misses some while nodes of it are dead."""
        if self.open_stream(server) is not None:
            return True
        return time.monotonic() - self._heard_s.get(server.peer, -math.inf) < REMEMBERED_S and not self.lost(server)

    async def route(self, span: BlockSpan, *, work: int) -> tuple[Hop, ...]:
        """The cheapest chain for `span`, where one block costs `work` (rows x positions).

        Servers that failed are passed over until they were reached again, unless nobody else holds their blocks; those
        that returned NaN, unless not even a failed one holds them. One that returned what cannot be right is not asked
        even then.
        """
        self._check_open()
        if self._snapshot is None:
            await self.refresh()
        elif self._age_s() > REFRESH_S:
            self.refresh_soon()
        self._reach_doubtful()

        def plan(banned: frozenset[str]) -> tuple[Hop, ...]:
            return self.plan(span, work=work, banned=banned)

        try:
            return plan(self.banned())
        except UncoveredBlocks:
            if self._age_s() > STALE_S:
                await self.refresh()
        try:
            return plan(self.banned())
        except UncoveredBlocks:
            now_s = time.monotonic()
            try:
                return plan(self._bans.wrong(now_s))
            except UncoveredBlocks:
                return plan(self._bans.offenders(now_s))

    def plan(self, span: BlockSpan, *, work: int, banned: frozenset[str]) -> tuple[Hop, ...]:
        """The cheapest chain without the `banned`, as the last snapshot has it. Raises UncoveredBlocks."""
        assert self._snapshot is not None
        return plan_route(
            self._snapshot.servers,
            span,
            model=self._model,
            banned=banned,
            cost=lambda server, blocks: self.load.cost(server, work, blocks),
        )

    def banned(self) -> frozenset[str]:
        """Peers to be passed over now."""
        return self._bans.active(time.monotonic())

    def lost(self, server: ServerRecord) -> bool:
        """It failed and has not answered since: what it kept for us is gone, or takes long to come."""
        return server.peer in self._bans.until_s

    def _age_s(self) -> float:
        assert self._snapshot is not None
        return time.monotonic() - self._snapshot.taken_at_s

    def _reach_doubtful(self) -> None:
        """Try to reach servers whose ban has ended. No work waits for it: a host that is gone never answers."""
        assert self._snapshot is not None
        doubtful = self._bans.doubtful(time.monotonic())
        for server in self._snapshot.servers:
            if server.peer in doubtful and server.peer not in self._reaching:
                task = self._reaching[server.peer] = asyncio.create_task(self._reach(server))
                task.add_done_callback(lambda _, peer=server.peer: self._reaching.pop(peer))  # type: ignore[misc]

    async def _reach(self, server: ServerRecord) -> None:
        with suppress(PetalsTuneError):
            await self.stream(server)
            self._bans.reached(server.peer)

    def answered(self, server: ServerRecord) -> None:
        """`server` did what it was asked."""
        self._bans.answered(server.peer)

    def failed(self, server: ServerRecord, error: PetalsTuneError) -> None:
        """Leave `server` alone for a while."""
        logger.info("server %s (blocks %s) failed: %s", server.peer, server.blocks, error)
        now_s = time.monotonic()
        self._bans.failed(server.peer, now_s)
        if isinstance(error, BadReply):
            logger.warning("server %s gave a wrong answer and is left alone: %s", server.peer, error)
            note = self._bans.not_finite if isinstance(error, NotFinite) else self._bans.offended
            note(server.peer, now_s)

    async def stream(self, server: ServerRecord) -> ServerStream:
        """The open stream to `server`; opened by the first who asks, shared by all. One that fails is banned."""
        self._check_open()
        try:
            return await self._streams.get(server)
        except ServerError as error:
            self.failed(server, error)
            raise type(error)(f"blocks {server.blocks}: {error}", **vars(error) | {"peer": server.peer}) from error

    def open_stream(self, server: ServerRecord) -> ServerStream | None:
        """The stream to `server` if there is a living one."""
        return self._streams.living(server.peer)

    def _check_open(self) -> None:
        if self._closed:
            raise SwarmError("this model has left the swarm (remote_blocks.close()); load it again to go on")

    async def close(self) -> None:
        """End all streams, and leave the swarm."""
        self._closed = True
        for task in (*self._reaching.values(), self._refreshing):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await self._streams.close()
        await self._owned.aclose()
