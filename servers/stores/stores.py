"""All that a server keeps for its clients between requests."""

from __future__ import annotations

from dataclasses import dataclass

from petals_tune.blocks.generation.sizes import CacheSizes
from servers.stores.adapters import AdapterCache, GradientSums
from servers.stores.budgets import Budgets
from servers.stores.leases import LeaseStore
from servers.stores.sessions import SessionStore


@dataclass(frozen=True, kw_only=True)
class Stores:
    """One store of each kind. What a client holds is dropped when its last stream ends."""

    leases: LeaseStore
    sessions: SessionStore
    adapters: AdapterCache
    sums: GradientSums

    @classmethod
    def within(
        cls, budgets: Budgets, *, max_lease_age_s: float, max_session_idle_s: float, sizes: CacheSizes
    ) -> Stores:
        """Make empty stores; `sizes` are those of the blocks' caches."""
        return cls(
            leases=LeaseStore(max_bytes=budgets.leases, max_age_s=max_lease_age_s),
            sessions=SessionStore(max_bytes=budgets.sessions, max_idle_s=max_session_idle_s, sizes=sizes),
            adapters=AdapterCache(max_bytes=budgets.adapters),
            sums=GradientSums(max_bytes=budgets.sums),
        )

    def drop_expired(self, now_s: float) -> None:
        """Drop the graphs and sessions that are too old or were not used for too long."""
        self.leases.drop_expired(now_s)
        self.sessions.drop_expired(now_s)

    def drop_client(self, client: str) -> None:
        for store in (self.leases, self.sessions, self.adapters, self.sums):
            store.drop_client(client)
