"""Simulation of a swarm whose servers join, move, leave and die by the servers' own placement rules.

What a server sees of the others is `SEEN_AFTER_S` old, the record of one that dies stays for up to a minute, and a
reload takes ten minutes. Speeds and sizes are drawn at random. The optimum is a bound that no placement can beat: all
throughput spread evenly over all blocks.
"""

from __future__ import annotations

import heapq
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

import numpy as np

from petals_tune.wire.span import BlockSpan
from servers.membership.placement import best_span, better_span

SEEN_AFTER_S = 5.0  # until an announcement is read by others
RECORD_S = 60.0  # how long that of a dead server stays
RELOAD_S = 600.0
LOOKS_AGAIN_S = (1.0, 4.0)  # between announcing a move and making it


@dataclass(eq=False)
class Server:
    """One simulated server. `seen` is what the others know of it, `serving` whether it does."""

    length: int
    batch: float  # tokens/s through one block
    span: BlockSpan
    seen: BlockSpan | None = None
    serving: bool = False
    alive: bool = True
    reload: int = 0  # number of its last load

    @property
    def rate(self) -> float:
        return self.batch / self.length


@dataclass
class Swarm:
    """The servers, their clock, and what is counted."""

    blocks: int
    random: Random  # of the servers' own jitter; who comes and goes is drawn elsewhere, and is the same for all rules
    period_s: float
    quality: float
    now_s: float = 0.0
    seen: np.ndarray = field(init=False)  # throughput of each block, as announcements say
    served: np.ndarray = field(init=False)  # as it is
    replicas: np.ndarray = field(init=False)  # servers of each block
    servers: set[Server] = field(default_factory=set)
    moves: int = 0
    withdrawn_moves: int = 0

    def __post_init__(self) -> None:
        self.seen, self.served = np.zeros(self.blocks), np.zeros(self.blocks)
        self.replicas = np.zeros(self.blocks, dtype=int)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now_s + seconds, next(self._order), event))

    def run_until(self, end_s: float) -> None:
        while self._events and self._events[0][0] <= end_s:
            self.now_s, _, event = heapq.heappop(self._events)
            event()
        self.now_s = end_s

    def join(self, length: int, batch: float, lasts_s: float, *, killed: bool) -> None:
        server = Server(length=length, batch=batch, span=best_span(self.seen, length))
        self.servers.add(server)
        self.announce(server, server.span)
        self.load(server)
        self.after(self.jittered_s(), lambda: self.check(server))
        self.after(lasts_s, lambda: self.leave(server, killed=killed))

    def announce(self, server: Server, span: BlockSpan | None) -> None:
        def arrives() -> None:
            for old, sign in ((server.seen, -1), (span, 1)):
                if old is not None:
                    self.seen[old.start : old.stop] += sign * server.rate
            server.seen = span

        self.after(SEEN_AFTER_S, arrives)

    def load(self, server: Server) -> None:
        self.serve(server, on=False)
        server.reload += 1
        number = server.reload

        def loaded() -> None:
            if server.alive and server.reload == number:
                self.serve(server, on=True)

        self.after(RELOAD_S, loaded)

    def serve(self, server: Server, *, on: bool) -> None:
        if on != server.serving:
            server.serving = on
            self.served[server.span.start : server.span.stop] += server.rate * (1 if on else -1)
            self.replicas[server.span.start : server.span.stop] += 1 if on else -1

    def check(self, server: Server) -> None:
        if not server.alive:
            return
        self.after(self.jittered_s(), lambda: self.check(server))
        target = self.better(server)
        if target is not None and server.serving:
            self.announce(server, target)
            self.after(self.random.uniform(*LOOKS_AGAIN_S) + SEEN_AFTER_S, lambda: self.move(server))

    def move(self, server: Server) -> None:
        if not server.alive:
            return
        target = self.better(server)
        if target is None:
            self.announce(server, server.span)
            self.withdrawn_moves += 1
            return
        self.announce(server, target)
        self.serve(server, on=False)
        server.span = target
        self.load(server)
        self.moves += 1

    def better(self, server: Server) -> BlockSpan | None:
        others = self.seen.copy()
        if server.seen is not None:
            others[server.seen.start : server.seen.stop] -= server.rate
        replicas = self.replicas.copy()
        if server.serving:
            replicas[server.span.start : server.span.stop] -= 1
        # A sum that went up and down again is not quite zero.
        return better_span(others.round(6), replicas, server.span, server.rate, balance_quality=self.quality)

    def leave(self, server: Server, *, killed: bool) -> None:
        server.alive = False
        self.serve(server, on=False)
        self.servers.discard(server)
        self.after(self.random.uniform(0, RECORD_S) if killed else 0.0, lambda: self.announce(server, None))

    def jittered_s(self) -> float:
        return self.period_s * self.random.uniform(0.5, 1.5)

    def optimum(self) -> float:
        """No placement of the serving servers makes the worst block faster."""
        return sum(server.batch for server in self.servers if server.serving) / self.blocks


def simulate(
    *, servers: int, blocks: int, hours: float, period_s: float, quality: float, life_h: float, seed: int = 0
) -> dict[str, Any]:
    """Start `servers` within ten minutes, replace each that goes, and watch from the first half hour on."""
    swarm = Swarm(blocks=blocks, random=Random(seed), period_s=period_s, quality=quality)

    def join_and_be_replaced(fate: Random) -> None:
        lasts_s = fate.expovariate(1 / (3600 * life_h))
        length, batch = fate.choice([2, 4, 6, 8, 12, 16, 24]), fate.lognormvariate(8.0, 1.0)
        swarm.join(length, batch, lasts_s, killed=fate.random() < 0.5)
        swarm.after(lasts_s + fate.uniform(0, 600), lambda: join_and_be_replaced(fate))

    for number in range(servers):
        fate = Random(f"{seed} {number}")
        swarm.after(fate.uniform(0, 600), partial(join_and_be_replaced, fate))
    shares, covered, possible = [], [], []
    swarm.run_until(1800)
    moves_before = swarm.moves
    while swarm.now_s < 3600 * hours:
        swarm.run_until(swarm.now_s + 60)
        worst = float(swarm.served.min())
        covered.append(bool(swarm.replicas.all()))
        possible.append(sum(server.length for server in swarm.servers if server.serving) >= blocks)
        shares.append(max(worst, 0.0) / swarm.optimum())
    watched_h = hours - 0.5
    return {
        "servers": servers,
        "blocks": blocks,
        "quality": quality,
        "covered": statistics.mean(covered),
        "possible": statistics.mean(possible),
        "worst_share_median": statistics.median(shares),
        "worst_share_min": min(shares),
        "moves_per_server_day": (swarm.moves - moves_before) / servers / watched_h * 24,
        "moves": swarm.moves,
        "moves_thought_better_of": swarm.withdrawn_moves,
    }
