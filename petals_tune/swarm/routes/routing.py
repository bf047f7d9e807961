"""Choice of a client's routes: the servers that may be used, and those that are dialled or tried for it."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np

from petals_tune.errors import ServerUnreachable, UncoveredBlocks
from petals_tune.swarm.routes.bans import Bans
from petals_tune.swarm.routes.dialler import A_MINUTE, Dialler
from petals_tune.swarm.routes.known import KnownServers
from petals_tune.swarm.routes.limits import LEAST, Limits, Size
from petals_tune.swarm.routes.load import Load
from petals_tune.swarm.routes.round_trips import HandOverRule, RoundTrips
from petals_tune.swarm.routes.route import Costs, Hop, plan_route
from petals_tune.swarm.routes.table import Mask, ServerTable
from petals_tune.swarm.routes.trials import Trials
from petals_tune.wire.span import BlockSpan

STALE_S = 1.0  # an older reading of the directory is renewed before anybody is told that blocks are missing
EXPLORE_S = 0.5  # between two looks for servers that would be better than those that were reached
MOST_STREAMS = 32  # no server is dialled for a better route where so many were reached


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a route is for."""

    span: BlockSpan
    work: int  # tokens (rows x positions) that go through each block
    latency: HandOverRule | None = None  # the least time for one token, where servers hand on so; None: throughput
    size: Size = LEAST  # of its requests: servers that take less are passed over
    without: Collection[str] = ()  # peers that refused this piece of work


@dataclass
class Routing:
    """Plans routes over the servers that a client knows. On the background loop."""

    known: KnownServers
    dialler: Dialler
    open_peers: Callable[[], Collection[str]]  # servers to which a stream is open
    load: Load = field(default_factory=Load)
    bans: Bans = field(default_factory=Bans)
    trials: Trials = field(default_factory=Trials)
    round_trips: RoundTrips = field(default_factory=RoundTrips)
    limits: Limits = field(default_factory=Limits)
    _explored_s: float = -math.inf

    async def route(self, wish: Wish) -> tuple[Hop, ...]:
        """The cheapest chain of servers that were reached; others are dialled where these do not hold all blocks.

        Servers that failed are passed over until they were reached again, unless nobody else holds their blocks; those
        that returned NaN, unless not even a failed one holds them. One that returned what cannot be right, or takes
        less at once than the wish brings, is not asked even then.
        Raises UncoveredBlocks, ServerUnreachable; RequestTooLarge where all servers of some blocks take less.
        """
        await self.known.keep_fresh()
        self._reach_doubtful()
        try:
            route = await self._reached(wish)
        except UncoveredBlocks:
            if self.known.age_s > STALE_S:
                await self.known.refresh()
            try:
                route = await self._reached(wish)
            except UncoveredBlocks:
                return self._last_resort(wish)
        self._explore(wish)
        return route

    async def others(self, span: BlockSpan, *, without: Collection[str]) -> bool:
        """Whether servers other than those `without` hold all blocks of `span`; the directory is asked before a no."""

        def are_known() -> bool:
            table = self.known.table
            return table.covers(self._there(table, without), span)

        if not are_known() and self.known.age_s > STALE_S:
            await self.known.refresh()
        return are_known()

    def _there(self, table: ServerTable, without: Collection[str] = ()) -> Mask:
        """Servers that may come into question at some time."""
        return ~table.mask(self.bans.offenders(time.monotonic())) & ~table.mask(without)

    def _able(self, table: ServerTable, wish: Wish) -> Mask:
        """Servers that may be asked for this wish."""
        return ~table.mask(wish.without) & ~self.limits.smaller(table, wish.size)

    def _check_size(self, wish: Wish) -> None:
        """Raises RequestTooLarge where servers hold the blocks of `wish`, and all of some blocks take less."""
        table = self.known.table
        if not self.limits.smaller(table, wish.size).any():
            return
        there = self._there(table, wish.without)
        if table.covers(there, wish.span) and not table.covers(there & self._able(table, wish), wish.span):
            error = self.limits.too_large(table, there, wish.span, wish.size)
            assert error is not None, "some servers take less"
            raise error

    def plan(self, wish: Wish, *, without: Collection[str]) -> tuple[Hop, ...]:
        """The cheapest chain `without` some peers, and of servers that were reached if these hold all blocks."""
        table = self.known.table
        usable = ~table.mask(without) & self._able(table, wish)
        return self._first(wish, usable & table.mask(self.open_peers()), usable)

    async def _reached(self, wish: Wish) -> tuple[Hop, ...]:
        """The cheapest chain of servers that were reached, once there is one; those that are missing are dialled.

        Several at once, and others beside those that are slow to answer: what is announced may not be there.
        """
        while True:
            table, now_s = self.known.table, time.monotonic()
            self._check_size(wish)  # more is known of each that is reached
            usable = ~table.mask(self.bans.active(now_s)) & self._able(table, wish)
            reached = usable & table.mask(self.open_peers())
            try:
                return self._choose(table, wish, usable, reached, now_s)
            except UncoveredBlocks:
                slow = self.dialler.slow()
                quick = usable & ~table.mask(slow)
                elsewhere = quick & ~self.trials.suspects(table, slow)
                hops = self._first(wish, reached | elsewhere, reached | quick, usable)
            missing = [hop.server for hop in hops if not reached[table.places[hop.server.peer]]]
            begun = [self.dialler.begin(server, awaited=True) for server in missing]
            if not any(begun) and not self.dialler.busy:
                raise ServerUnreachable(
                    f"{A_MINUTE} servers were dialled in a minute, and those that were reached do not hold all of "
                    f"blocks {wish.span}",
                    peer=missing[0].peer,
                )
            await self.dialler.wait()

    def _choose(self, table: ServerTable, wish: Wish, usable: Mask, reached: Mask, now_s: float) -> tuple[Hop, ...]:
        """The cheapest chain of `reached` servers. Newcomers are in it where that is allowed, or nobody else is there.

        A newcomer has to answer soon where other `usable` servers could do its work.
        """
        costs, measured = self._costs(table, wish), self.load.measured(table)
        trusted = measured | ~self.trials.suspects(table) if self.trials.allowed(now_s) else measured
        try:
            route = plan_route(table, wish.span, costs, usable=reached & trusted)
        except UncoveredBlocks:
            route = plan_route(table, wish.span, costs, usable=reached)
        for hop in route:
            place = table.places[hop.server.peer]
            if not measured[place]:
                others = usable.copy()
                others[place] = False
                if table.covers(others, hop.span):
                    expected_s = costs.per_block_s[place] * len(hop.span) + costs.fixed_s[place]
                    self.trials.begin(hop.server.peer, float(expected_s))
        return route

    def _last_resort(self, wish: Wish) -> tuple[Hop, ...]:
        """A chain with servers that failed lately, those that worked before first. Raises UncoveredBlocks."""
        table, now_s = self.known.table, time.monotonic()
        tried = table.mask(self.open_peers()) | self.load.measured(table)
        able = self._able(table, wish)
        failed, wrong = (able & ~table.mask(peers) for peers in (self.bans.wrong(now_s), self.bans.offenders(now_s)))
        return self._first(wish, failed & tried, failed, wrong)

    def _first(self, wish: Wish, *usable: Mask) -> tuple[Hop, ...]:
        """The cheapest chain of the first of several sets of servers that hold all blocks. Raises UncoveredBlocks."""
        table = self.known.table
        held = next((each for each in usable if table.covers(each, wish.span)), usable[-1])
        return plan_route(table, wish.span, self._costs(table, wish), usable=held)

    def _costs(self, table: ServerTable, wish: Wish) -> Costs:
        if wish.latency is None:
            return self.load.costs(table, wish.work)
        return self.load.costs(
            table,
            wish.work,
            round_trip_s=self.round_trips.to_all(table),
            handing=self.round_trips.handing(table, wish.latency),
        )

    def _reach_doubtful(self) -> None:
        """Dial servers whose ban has ended. No work waits for that: a host that is gone never answers."""
        table = self.known.table
        for peer in self.bans.doubtful(time.monotonic()):
            if (place := table.places.get(peer)) is not None:
                self.dialler.begin(table.servers[place], awaited=False)

    def _explore(self, wish: Wish) -> None:
        """Dial servers that a route might use once they were reached. No work waits for that: they may not be there."""
        table, now_s, reached = self.known.table, time.monotonic(), self.open_peers()
        if now_s - self._explored_s < EXPLORE_S or len(reached) >= MOST_STREAMS:
            return
        self._explored_s = now_s
        usable = ~table.mask(self.bans.active(now_s)) & ~self.trials.suspects(table) & self._able(table, wish)
        if not table.covers(usable, wish.span):
            return
        for hop in plan_route(table, wish.span, self._costs(table, wish), usable=usable):
            if hop.server.peer not in reached:
                self.dialler.begin(hop.server, awaited=False)
        if wish.latency is not None:  # which one is near shows only once it was reached
            others = np.flatnonzero(usable & ~table.mask(reached) & table.holds(wish.span))
            if len(others):
                self.dialler.begin(table.servers[secrets.choice(others.tolist())], awaited=False)
