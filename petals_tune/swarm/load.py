"""What each server costs a client: expected seconds, from announced and measured speed. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from petals_tune.swarm.route import Hop
from petals_tune.wire.records import ServerRecord

SMOOTHING = 0.3  # weight of the newest measurement


@dataclass
class Load:
    """What each server costs us: what it announces, corrected by what we measured, and our work that it has in hand.

    Work is counted in tokens (rows x positions) x blocks.
    """

    correction: dict[str, float] = field(default_factory=dict)  # measured / announced seconds, smoothed
    in_hand: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def reserved(self, route: Sequence[Hop], work: int) -> Iterator[None]:
        """Meanwhile the servers of `route` count as busy with it, so that the next route may take another way."""
        for hop in route:
            self.in_hand[hop.server.peer] = self.in_hand.get(hop.server.peer, 0) + work * len(hop.span)
        try:
            yield
        finally:
            for hop in route:
                self.in_hand[hop.server.peer] -= work * len(hop.span)

    def add_measurement(self, server: ServerRecord, compute_s: float, tokens: int, blocks: int) -> None:
        new = compute_s / server.throughput.computing_s(tokens, blocks)
        old = self.correction.get(server.peer, new)
        self.correction[server.peer] = old + SMOOTHING * (new - old)

    def cost(self, server: ServerRecord, tokens: float, blocks: float) -> float:
        """Expected seconds until `server` has taken `tokens` more through so many blocks."""
        speed = server.throughput
        computing_s = speed.computing_s(tokens, blocks) + self.in_hand.get(server.peer, 0) / speed.batch
        return computing_s * self.correction.get(server.peer, 1.0) + speed.sending_s(tokens)
