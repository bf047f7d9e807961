"""Kept graphs: a forward's graph waits here for its backward, inside a budget of bytes and an age limit."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from petals_tune.blocks.graphs import Graph
from petals_tune.errors import LeaseLost
from servers.stores.budget import Shares


class LeaseStore:
    """Graphs by lease id, in fair shares. Used by the event loop alone; the clock is an argument."""

    def __init__(self, *, max_bytes: int, max_age_s: float):
        self.max_age_s = max_age_s
        self._shares: Shares[int] = Shares(max_bytes)
        self._leases: dict[int, tuple[Graph, float]] = {}  # graph, since when; oldest first
        self._ids = itertools.count(1)

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def used_bytes(self) -> int:
        return self._shares.used_bytes

    def keep(self, client: str, graph: Graph, size_bytes: int, now_s: float) -> int | None:
        """Keep `graph`; None where it does not fit. A client's lease never makes room for another of its own:

        forwards 0..M, then backwards 0..M would find the first ones evicted every time.
        """
        self.drop_old(now_s)
        leaving = self._shares.make_room(client, size_bytes)
        if leaving is None:
            return None
        for lease in leaving:
            self._drop(lease)
        lease = next(self._ids)
        self._leases[lease] = (graph, now_s)
        self._shares.hold(lease, client, size_bytes)
        return lease

    def take(self, client: str, lease: int, now_s: float) -> Graph:
        """The graph of a lease, which ends with this. Raises LeaseLost, for another client's lease too."""
        self.drop_old(now_s)
        if self._shares.holder(lease) != client:
            raise LeaseLost(f"lease {lease} is not kept here (any more)")
        return self._drop(lease)

    def release(self, client: str, leases: Iterable[int]) -> None:
        for lease in leases:
            if self._shares.holder(lease) == client:
                self._drop(lease)

    def drop_client(self, client: str) -> None:
        for lease in self._shares.of(client):
            self._drop(lease)

    def drop_old(self, now_s: float) -> None:
        while self._leases:
            oldest = next(iter(self._leases))
            if now_s - self._leases[oldest][1] <= self.max_age_s:
                return
            self._drop(oldest)

    def _drop(self, lease: int) -> Graph:
        self._shares.drop(lease)
        return self._leases.pop(lease)[0]
