"""What each server costs a client: expected seconds, from announced and measured speed. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from petals_tune.swarm.routes.route import Costs, Hop
from petals_tune.swarm.routes.table import Floats, Handing, Mask, ServerTable
from petals_tune.wire.records import ServerRecord, Throughput

SMOOTHING = 0.3  # weight of the newest measurement
# A server that was not measured counts as this many times as fast as the median of those that were, at most: enough to
# be tried, and too little for a lie to pay.
MOST_CLAIMED = 2.0


@dataclass
class Load:
    """What each server costs us: what it announces, corrected by what we measured, and our work that it has in hand.

    Work is counted in tokens (rows x positions) x blocks.
    """

    correction: dict[str, float] = field(default_factory=dict)  # measured / announced seconds, smoothed
    in_hand: dict[str, int] = field(default_factory=dict)  # work of routes that are under way
    sent: dict[str, int] = field(default_factory=dict)  # work of requests that are not answered yet
    _corrected: dict[str, Throughput] = field(default_factory=dict)  # the announcement that the correction is of

    @contextmanager
    def reserved(self, route: Sequence[Hop], work: int) -> Iterator[None]:
        """Meanwhile the servers of `route` count as busy with it, so that the next route may take another way."""
        for hop in route:
            _add(self.in_hand, hop.server.peer, work * len(hop.span))
        try:
            yield
        finally:
            for hop in route:
                _add(self.in_hand, hop.server.peer, -work * len(hop.span))

    @contextmanager
    def sending(self, hop: Hop, work: int) -> Iterator[int]:
        """Meanwhile a request of `work` a block is at the server of `hop`; yields what was there before it."""
        peer = hop.server.peer
        ahead = self.sent.get(peer, 0)
        _add(self.sent, peer, work * len(hop.span))
        try:
            yield ahead
        finally:
            _add(self.sent, peer, -work * len(hop.span))

    def add_measurement(
        self, server: ServerRecord, seconds: float, tokens: int, blocks: int, *, ahead: int = 0
    ) -> None:
        """Note that `server` answered in `seconds`, as the client saw it, while work of ours was `ahead` of this."""
        speed = server.throughput
        announced_s = speed.computing_s(tokens, blocks) + ahead / speed.batch + speed.sending_s(tokens)
        new = seconds / announced_s
        old = self.correction[server.peer] if self._is_measured(server) else new
        self.correction[server.peer] = old + SMOOTHING * (new - old)
        self._corrected[server.peer] = speed

    def forget(self, peer: str) -> None:
        """Trust what `peer` announces no more than that of a server that was never measured."""
        self.correction.pop(peer, None)
        self._corrected.pop(peer, None)

    def measured(self, table: ServerTable) -> Mask:
        """Which servers of `table` were measured since they announced what they announce now."""
        mask = table.mask(self.correction)
        for place in np.flatnonzero(mask).tolist():
            mask[place] = self._is_measured(table.servers[place])
        return mask

    def _is_measured(self, server: ServerRecord) -> bool:
        """A server that announces another speed than before is as good as new: a correction is of one announcement."""
        peer, speed = server.peer, server.throughput
        return peer in self.correction and self._corrected.get(peer, speed) == speed

    def costs(
        self, table: ServerTable, tokens: int, *, round_trip_s: Floats | None = None, handing: Handing | None = None
    ) -> Costs:
        """Expected seconds until each server has taken `tokens` more through its blocks, and sent them.

        With `round_trip_s`, to each server, the time of the way counts too, less what pairs save by `handing` on.
        """
        announced_s = np.maximum(table.step_s, tokens * table.batch_s)
        factor, measured = np.ones(len(table.servers)), self.measured(table)
        for each in np.flatnonzero(measured).tolist():
            factor[each] = self.correction[table.servers[each].peer]
        per_block_s = announced_s * factor
        if len(per_block_s):
            known = per_block_s[measured] if measured.any() else per_block_s
            median_s = np.partition(known, len(known) // 2)[len(known) // 2]
            per_block_s = np.where(measured, per_block_s, np.maximum(per_block_s, median_s / MOST_CLAIMED))
            factor = per_block_s / announced_s
        fixed_s = table.sending_s * factor * tokens
        for peer, work in self.in_hand.items():
            if (place := table.places.get(peer)) is not None:
                fixed_s[place] += work * table.batch_s[place] * factor[place]
        if round_trip_s is not None:
            fixed_s += round_trip_s
        return Costs(per_block_s=per_block_s, fixed_s=fixed_s, handing=handing)


def _add(to: dict[str, int], peer: str, work: int) -> None:
    to[peer] = to.get(peer, 0) + work
    if not to[peer]:
        del to[peer]
