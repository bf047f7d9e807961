"""Graphs of forward passes, kept until the client asks for the backward pass."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from petals_tune.blocks.recompute import KeptGraph
from petals_tune.errors import LeaseLost
from servers.stores.budgeted_store import BudgetedStore


class LeaseStore(BudgetedStore[int, KeptGraph]):
    """Graphs by lease id."""

    def __init__(self, *, max_bytes: int, max_age_s: float):
        super().__init__(max_bytes=max_bytes, max_idle_s=max_age_s)  # a lease is used once, when it ends
        self._ids = itertools.count(1)

    @contextmanager
    def room(self, client: str, size_bytes: int, now_s: float) -> Iterator[int | None]:
        """Reserve room for a graph that the block computes and `fill`s; gives its lease, None where it will not fit.

        A client's lease never makes room for another of its own: of forwards 0..M and then backwards 0..M, each
        backward would find its graph evicted.
        """
        self.drop_expired(now_s)
        lease = next(self._ids)
        with self.room_for(client, lease, size_bytes, now_s=now_s) as fits:
            yield lease if fits else None

    def take(self, client: str, lease: int, now_s: float) -> KeptGraph:
        """Return the graph of a lease, once; its bytes stay counted until `release`.

        Raises LeaseLost, for a lease of another client too.
        """
        self.drop_expired(now_s)
        if (graph := self.lend(client, lease, now_s=now_s)) is None:
            raise LeaseLost(f"lease {lease} is not kept here (any more)")
        return graph

    def release(self, client: str, leases: Iterable[int]) -> None:
        """End those of `leases` that are the client's."""
        for lease in leases:
            self.remove(client, lease)
