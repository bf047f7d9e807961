"""Round trips: those that a client measured to its servers, and those that servers announced between each other."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Literal

import numpy as np

from petals_tune.swarm.routes.table import Floats, Handing, ServerTable
from petals_tune.wire.records import ServerRecord

HandOverRule = Literal["auto", "always", "never"]

FAR_S = 0.010  # servers whose round trip takes longer hand on by themselves: nearer ones are as fast through us
KEPT = 5  # measurements to each server; the least counts, since the others waited for something


class RoundTrips:
    """What is known of the way to each server, and from one to the next.

    A server can only seem to be farther from us than it is. Of the way to the next one it could say anything, and is
    believed no less than the difference of both ways from us.
    """

    def __init__(self) -> None:
        self._last: dict[str, deque[float]] = {}
        self._least: dict[str, float] = {}  # of the last ones
        self._handing: tuple[ServerTable, HandOverRule, Handing] | None = None  # the last one, while it is true

    def add(self, peer: str, seconds: float) -> None:
        """Note that a message to `peer` was answered after `seconds`."""
        last = self._last.setdefault(peer, deque(maxlen=KEPT))
        last.append(seconds)
        if (least := min(last)) != self._least.get(peer):
            self._least[peer], self._handing = least, None

    def to(self, peer: str) -> float | None:
        """Seconds to `peer` and back; None: never measured."""
        return self._least.get(peer)

    def to_all(self, table: ServerTable) -> Floats:
        """Seconds to each server and back. One that was never measured is as far as the median of the others."""
        all_s = np.full(len(table.servers), statistics.median(self._least.values()) if self._least else 0.0)
        for peer, seconds in self._least.items():
            if (place := table.places.get(peer)) is not None:
                all_s[place] = seconds
        return all_s

    def handing(self, table: ServerTable, rule: HandOverRule) -> Handing | None:
        """What pairs of servers save where the first hands its output straight to the second; None: nothing."""
        if rule == "never" or not self._least:
            return None
        if self._handing is None or self._handing[0] is not table or self._handing[1] != rule:
            pairs, way_s = table.neighbours, self.to_all(table) / 2
            able = table.mask([peer for peer, seconds in self._least.items() if rule == "always" or seconds > FAR_S])
            between_s = np.maximum(pairs.round_trip_s / 2, np.abs(way_s[pairs.giver] - way_s[pairs.taker]))
            saved_s = way_s[pairs.giver] + way_s[pairs.taker] - between_s
            self._handing = table, rule, table.handing(np.where(able[pairs.giver] & able[pairs.taker], saved_s, 0.0))
        return self._handing[2]

    def waited_s(self, server: ServerRecord, giver: ServerRecord | None) -> float:
        """Seconds of an answer of `server` that are not its own: the way, from us or from the `giver` of its input."""
        way_s = self.to(server.peer) or 0.0
        announced_s = None if giver is None else giver.round_trips_s.get(server.peer)
        if giver is None or announced_s is None:
            return way_s
        giver_s = self.to(giver.peer) or 0.0
        return (way_s - giver_s + max(announced_s, abs(way_s - giver_s))) / 2
