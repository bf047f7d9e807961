"""Choice of the blocks that this server hosts, from the directory and against what others choose meanwhile."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from petals_tune.errors import AccessDenied
from petals_tune.net.directory import Directory
from petals_tune.wire.records import ServerState
from petals_tune.wire.span import BlockSpan
from servers.membership import placement
from servers.membership.plan import Plan

ROUNDS = 5  # how often a server changes its choice before it loads
RECHECK_S = (0.5, 2.0)  # after announcing a choice, the least and the most

Announce = Callable[[BlockSpan, ServerState], Awaitable[None]]


class Placer:
    """Chooses which blocks this server hosts, and announces the choice."""

    def __init__(
        self,
        directory: Directory,
        announce: Announce,
        *,
        own_peer: str,
        plan: Plan,
        balance_quality: float,
        alone: bool,
    ):
        """`alone`: this server starts a swarm, so nobody chooses at the same time."""
        self._directory, self._announce, self._own_peer, self._plan = directory, announce, own_peer, plan
        self._balance_quality, self._alone = balance_quality, alone

    async def place(self, here: BlockSpan | None) -> BlockSpan:
        """Return the blocks to host, announced: `here`, those hosted now, or better ones.

        Checks again a random moment after announcing, so that servers that chose the same at the same time part.
        Raises AccessDenied where this server, which hosts nothing yet, is not let into its private swarm.
        """
        announced = here
        for _ in range(ROUNDS):
            try:
                target = await self._choose(here, announced)
            except AccessDenied:  # our token has expired (the announcer says so): we see nobody, and stay
                if here is None:
                    raise
                target = here
            if target == announced:
                break
            announced = target
            await self._announce(target, "online" if target == here else "joining")
            if not self._alone or here is not None:
                await asyncio.sleep(random.SystemRandom().uniform(*RECHECK_S))
        assert announced is not None
        return announced

    async def _choose(self, here: BlockSpan | None, announced: BlockSpan | None) -> BlockSpan:
        snapshot = await self._directory.snapshot(self._plan.model, BlockSpan(0, self._plan.total_blocks))
        online, joining = (
            [server for server in servers if server.peer != self._own_peer]
            for servers in (snapshot.servers, snapshot.joining)
        )
        throughputs = placement.block_throughputs([*online, *joining], self._plan.total_blocks, snapshot.stands_for)
        if here is None:
            return placement.best_span(throughputs, self._plan.length, otherwise=announced)
        better = placement.better_span(
            throughputs,
            placement.block_replicas(online, self._plan.total_blocks),
            here,
            self._plan.throughput.of_span(len(here)),
            balance_quality=self._balance_quality,
        )
        return better or here
