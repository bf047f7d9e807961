"""The servers of one model as arrays, laid out once for each snapshot so that routes are planned fast."""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
Mask = NDArray[np.bool_]


class ServerTable:
    """Servers, ordered by their blocks and peer ids, with what a planner needs of them. Arrays are in that order.

    `cuts` are the blocks where some server's blocks begin or end. Between two neighbouring cuts a server holds all of
    the blocks or none. `slots[i]` are the servers that hold the blocks between cuts i and i + 1: one column for each
    server as long as it holds blocks, `len(servers)` where a column is empty. A column is empty at least once between
    two servers that use it after each other.
    """

    def __init__(self, servers: Iterable[ServerRecord]):
        """`servers` of one model; the last record of a peer counts."""
        latest = {server.peer: server for server in servers}
        self.servers: tuple[ServerRecord, ...] = tuple(
            sorted(latest.values(), key=lambda server: (server.blocks, server.peer))
        )
        self.dtypes = frozenset(server.dtype for server in self.servers)
        self.places = {server.peer: place for place, server in enumerate(self.servers)}
        speeds = [server.throughput for server in self.servers]
        self.step_s: Floats = np.array([1 / speed.step for speed in speeds], dtype=np.float64)  # a token, a block
        self.batch_s: Floats = np.array([1 / speed.batch for speed in speeds], dtype=np.float64)
        self.sending_s: Floats = np.array([speed.sending_s(1) for speed in speeds], dtype=np.float64)  # a token
        spans = [server.blocks for server in self.servers]
        self.cuts: list[int] = sorted({cut for span in spans for cut in (span.start, span.stop)})
        number = {cut: index for index, cut in enumerate(self.cuts)}
        self.first: list[int] = [number[span.start] for span in spans]  # cut where a server's blocks begin
        self.last: list[int] = [number[span.stop] for span in spans]
        self.columns: Indices = np.array(_columns(self.first, self.last), dtype=np.intp)
        width = int(self.columns.max()) + 1 if spans else 0
        self.slots: Indices = np.full((max(len(self.cuts) - 1, 0), width), len(spans), dtype=np.intp)
        for place, column in enumerate(self.columns):
            self.slots[self.first[place] : self.last[place], column] = place

    def mask(self, peers: Collection[str]) -> Mask:
        """Which of the servers are among `peers`."""
        mask = np.zeros(len(self.servers), dtype=np.bool_)
        mask[[place for peer in peers if (place := self.places.get(peer)) is not None]] = True
        return mask

    def covers(self, usable: Mask, span: BlockSpan) -> bool:
        """Whether the `usable` servers hold all blocks of `span`."""
        first, last = bisect_right(self.cuts, span.start) - 1, bisect_left(self.cuts, span.stop)
        if first < 0 or last >= len(self.cuts):
            return False
        return bool(np.append(usable, False).take(self.slots[first:last]).any(axis=1).all())

    def holds(self, span: BlockSpan) -> Mask:
        """Which servers hold any block of `span`."""
        first, last = np.array(self.first, dtype=np.intp), np.array(self.last, dtype=np.intp)
        return (first < bisect_left(self.cuts, span.stop)) & (last > bisect_right(self.cuts, span.start) - 1)

    @cached_property
    def neighbours(self) -> Neighbours:
        """The pairs of servers of which one announced the round trip to the other, which may follow it."""
        found: list[tuple[int, int, int, float]] = []
        for giver, server in enumerate(self.servers):
            for peer, seconds in server.round_trips_s.items():
                if (taker := self.places.get(peer)) is None:
                    continue
                begin, end = self.first[taker], self.last[giver]
                found += [
                    (cut, giver, taker, seconds)
                    for cut in {begin, end}
                    if self.first[giver] < cut <= end and begin <= cut < self.last[taker]
                ]
        found.sort()
        return Neighbours(
            cut=np.array([each[0] for each in found], dtype=np.intp),
            giver=np.array([each[1] for each in found], dtype=np.intp),
            taker=np.array([each[2] for each in found], dtype=np.intp),
            round_trip_s=np.array([each[3] for each in found], dtype=np.float64),
        )

    def handing(self, saved_s: Floats) -> Handing:
        """The `neighbours` as a plan needs them, where handing on saves this much."""
        pairs, found = self.neighbours, np.flatnonzero(saved_s > 0)
        giver, taker = pairs.giver[found], pairs.taker[found]
        return Handing(
            cut=pairs.cut[found],
            giver=giver,
            taker=taker,
            giver_column=self.columns[giver],
            taker_column=self.columns[taker],
            saved_s=saved_s[found],
        )


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Pairs of servers, ordered by the `cut` where the taker follows the giver.

    A pair stands here for the cut where the giver's blocks end and for the one where the taker's begin: a chain that
    changes between them anywhere else would cost as much or less if it changed at one of these.
    """

    cut: Indices
    giver: Indices
    taker: Indices
    round_trip_s: Floats


@dataclass(frozen=True, kw_only=True)
class Handing:
    """Pairs of servers that cost `saved_s` less after each other than both of them; ordered by `cut`."""

    cut: Indices
    giver: Indices
    taker: Indices
    giver_column: Indices
    taker_column: Indices
    saved_s: Floats


def _columns(first: Sequence[int], last: Sequence[int]) -> list[int]:
    """A column for each of the servers, which are in the order of `first`; free again one interval after `last`."""
    columns: list[int] = []
    free: list[int] = []
    busy: list[tuple[int, int]] = []  # (cut from which on it is free, column)
    for begin, end in zip(first, last, strict=True):
        while busy and busy[0][0] <= begin:
            heapq.heappush(free, heapq.heappop(busy)[1])
        column = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (end + 1, column))
        columns.append(column)
    return columns
