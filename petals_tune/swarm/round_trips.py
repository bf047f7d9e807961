"""Round trips: those that a client measured to its servers, and those that servers announced between each other."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Literal

import numpy as np

from petals_tune.swarm.table import Floats, Handing, ServerTable
from petals_tune.wire.records import ServerRecord

HandOverRule = Literal["auto", "always", "never"]

FAR_S = 0.010  # servers whose round trip takes longer hand on by themselves: nearer ones are as fast through us
KEPT = 5  # measurements to each server; the least counts, since the others waited for something


class RoundTrips:
    """What is known of the way to each server, and from one to the next. A server can only seem to be farther away."""

    def __init__(self) -> None:
        self._measured: dict[str, deque[float]] = {}
        self._handing: tuple[ServerTable, HandOverRule, Handing] | None = None  # the last one, while it is true

    def add(self, peer: str, seconds: float) -> None:
        """Note that a message to `peer` was answered after `seconds`."""
        before = self.to(peer)
        self._measured.setdefault(peer, deque(maxlen=KEPT)).append(seconds)
        if self.to(peer) != before:
            self._handing = None

    def to(self, peer: str) -> float | None:
        """Seconds to `peer` and back; None: never measured."""
        return min(self._measured[peer]) if peer in self._measured else None

    def to_all(self, table: ServerTable) -> Floats:
        """Seconds to each server and back. One that was never measured is as far as the median of the others."""
        known = {peer: min(seconds) for peer, seconds in self._measured.items()}
        all_s = np.full(len(table.servers), statistics.median(known.values()) if known else 0.0)
        for peer, seconds in known.items():
            if (place := table.places.get(peer)) is not None:
                all_s[place] = seconds
        return all_s

    def handing(self, table: ServerTable, rule: HandOverRule) -> Handing | None:
        """What pairs of servers save where the first hands its output straight to the second; None: nothing."""
        if rule == "never" or not self._measured:
            return None
        if self._handing is None or self._handing[0] is not table or self._handing[1] != rule:
            pairs, way_s = table.neighbours, self.to_all(table) / 2
            able = table.mask([peer for peer in self._measured if rule == "always" or (self.to(peer) or 0.0) > FAR_S])
            saved_s = way_s[pairs.giver] + way_s[pairs.taker] - pairs.round_trip_s / 2
            self._handing = table, rule, table.handing(np.where(able[pairs.giver] & able[pairs.taker], saved_s, 0.0))
        return self._handing[2]

    def waited_s(self, server: ServerRecord, giver: ServerRecord | None) -> float:
        """Seconds of an answer of `server` that are not its own: the way, from us or from the `giver` of its input."""
        way_s = self.to(server.peer) or 0.0
        announced_s = None if giver is None else giver.round_trips_s.get(server.peer)
        if giver is None or announced_s is None:
            return way_s
        return max((way_s - (self.to(giver.peer) or 0.0) + announced_s) / 2, 0.0)
