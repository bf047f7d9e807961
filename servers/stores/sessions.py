"""Caches of clients that generate, each reserved in full when its session is opened."""

from __future__ import annotations

import itertools

from petals_tune.blocks.adapters import Adapter
from petals_tune.blocks.generation.session import Session
from petals_tune.blocks.generation.sizes import CacheSizes
from petals_tune.errors import RequestRefused, ServerBusy, SessionLost
from petals_tune.wire.messages import OpenSession
from servers.stores.budgeted_store import BudgetedStore


class SessionStore(BudgetedStore[int, Session]):
    """Sessions by id."""

    def __init__(self, *, max_bytes: int, max_idle_s: float, sizes: CacheSizes):
        super().__init__(max_bytes=max_bytes, max_idle_s=max_idle_s)
        self._sizes = sizes
        self._ids = itertools.count(1)

    def open(self, client: str, request: OpenSession, adapter: Adapter | None, now_s: float) -> int:
        """Reserve a session and return its id.

        Raises ServerBusy where it does not fit now and RequestRefused where it never will, both with the `max_length`
        that would.
        """
        self.drop_expired(now_s)
        adapter_bytes = 0 if adapter is None else adapter.bytes  # the session keeps it
        size_bytes = self._sizes.bytes(request.span, request.rows, request.max_length) + adapter_bytes

        def longest(available_bytes: int) -> int:
            return self._sizes.longest(request.span, request.rows, available_bytes - adapter_bytes)

        if size_bytes > self.max_bytes:
            max_length = longest(self.max_bytes)
            raise RequestRefused(
                f"{request.rows} rows of {request.max_length} positions need {size_bytes / 2**20:.0f} MB of cache on "
                f"blocks {request.span}, and this server has {self.max_bytes / 2**20:.0f} MB in all: "
                f"max_length={max_length} would fit",
                max_length=max_length,
                limit="max_cache_gb",
            )
        session = Session(
            client=client,
            span=request.span,
            rows=request.rows,
            max_length=request.max_length,
            adapter=adapter,
            adapter_version=request.adapter,
        )
        session_id = next(self._ids)
        if not self.insert(client, session_id, session, size_bytes, now_s=now_s):
            max_length = longest(self.available_bytes(client))
            raise ServerBusy(
                f"no room for {size_bytes / 2**20:.0f} MB of cache now: max_length={max_length} would fit",
                max_length=max_length,
                limit="max_cache_gb",
            )
        return session_id

    def get(self, client: str, session_id: int, now_s: float) -> Session:
        """Return an open session. Raises SessionLost where this client has no such session (any more)."""
        session = self.lookup(client, session_id, now_s=now_s)
        if session is None:
            raise SessionLost(f"session {session_id} is not kept here (any more)")
        return session

    def close(self, client: str, session_id: int) -> None:
        self.remove(client, session_id)
