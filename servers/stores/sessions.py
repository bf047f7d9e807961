"""Caches of clients that generate. A session counts what it holds, and grows step by step."""

from __future__ import annotations

import itertools

from petals_tune.blocks.adapters import Adapter
from petals_tune.blocks.generation.memory import Beginning, capacity
from petals_tune.blocks.generation.session import Session
from petals_tune.blocks.generation.sizes import CacheSizes
from petals_tune.errors import RequestRefused, ServerBusy, SessionLost
from petals_tune.wire.messages import OpenSession, Step
from servers.stores.budgeted_store import BudgetedStore


class SessionStore(BudgetedStore[int, Session]):
    """Sessions by id. A beginning that several sessions share is counted once, for the oldest of them."""

    def __init__(self, *, max_bytes: int, max_idle_s: float, sizes: CacheSizes):
        super().__init__(max_bytes=max_bytes, max_idle_s=max_idle_s)
        self._sizes = sizes
        self._ids = itertools.count(1)
        self._owners: dict[Beginning, int] = {}  # the session that a shared beginning is counted for

    def check(self, request: OpenSession, adapter: Adapter | None) -> None:
        """Raises RequestRefused for a session that would not fit in full, with the `max_length` that would."""
        adapter_bytes = 0 if adapter is None else adapter.bytes  # the session keeps it
        size_bytes = self._sizes.bytes(request.span, request.rows, request.max_length) + adapter_bytes
        if size_bytes > self.max_bytes:
            max_length = self._sizes.longest(request.span, request.rows, self.max_bytes - adapter_bytes)
            raise RequestRefused(
                f"{request.rows} rows of {request.max_length} positions need {size_bytes / 2**20:.0f} MB of cache on "
                f"blocks {request.span}, and this server has {self.max_bytes / 2**20:.0f} MB in all: "
                f"max_length={max_length} would fit",
                max_length=max_length,
                limit="max_cache_gb",
            )

    def open(self, client: str, request: OpenSession, adapter: Adapter | None, now_s: float) -> int:
        """Keep a new session with room for its first positions; returns its id.

        Raises ServerBusy where there is no room now and RequestRefused where there will never be enough.
        """
        self.check(request, adapter)
        session = Session(
            client=client,
            span=request.span,
            rows=request.rows,
            max_length=request.max_length,
            adapter=adapter,
            adapter_version=request.adapter,
        )
        return self.put(client, session, now_s)

    def put(self, client: str, session: Session, now_s: float) -> int:
        """Keep a session with room for its next position; returns its id. Raises ServerBusy."""
        self.drop_expired(now_s)
        own = capacity(session.position + 1 - session.memory.start, session.max_length - session.memory.start)
        size_bytes = self._sizes.bytes(session.span, session.rows, own) + self._other_bytes(None, session)
        session_id = next(self._ids)
        if not self.insert(client, session_id, session, size_bytes, now_s=now_s):
            raise self._busy(size_bytes)
        self._count_beginnings(session_id, session)
        return session_id

    def make_room(self, client: str, session_id: int, step: Step) -> None:
        """Count what a session will hold behind `step`, before it does. Raises ServerBusy where there is no room."""
        session = self._held[client][session_id].value
        assert session is not None
        self._count_beginnings(session_id, session)
        if len(step.hidden) > session.most_rows or step.position + step.hidden.shape[1] > session.max_length:
            return  # it will be refused
        size_bytes = session.bytes_at(step, self._sizes) + self._other_bytes(session_id, session)
        if not self.resize(client, session_id, size_bytes):
            raise self._busy(size_bytes - self.size_of(client, session_id))

    def recount(self, client: str, session_id: int) -> None:
        """Count what a session holds now, part of which others may share."""
        if session_id not in self._held.get(client, {}):
            return  # its client left meanwhile
        session = self._held[client][session_id].value
        assert session is not None
        self._count_beginnings(session_id, session)
        own_bytes = session.memory.tail_bytes + self._sizes.bytes(session.span, session.rows, 0)
        self.resize(client, session_id, own_bytes + self._other_bytes(session_id, session))

    def get(self, client: str, session_id: int, now_s: float) -> Session:
        """Return an open session. Raises SessionLost where this client has no such session (any more)."""
        session = self.lookup(client, session_id, now_s=now_s)
        if session is None:
            raise SessionLost(f"session {session_id} is not kept here (any more)")
        return session

    def remove(self, client: str, key: int) -> Session | None:
        """Drop a session. What others share with it is counted for the oldest of them."""
        session = super().remove(client, key)
        if session is not None:
            for beginning in [each for each, owner in self._owners.items() if owner == key]:
                del self._owners[beginning]
                self._hand_on(client, beginning)
        return session

    def close(self, client: str, session_id: int) -> None:
        self.remove(client, session_id)

    def _hand_on(self, client: str, beginning: Beginning) -> None:
        for other in self.keys_of(client):
            session = self._held[client][other].value
            if session is not None and any(each.beginning is beginning for each in session.memory.shared):
                self._owners[beginning] = other
                self.resize(client, other, self.size_of(client, other) + beginning.bytes)  # as much was freed
                return

    def _count_beginnings(self, session_id: int, session: Session) -> None:
        """Note whose beginnings those are that sessions made of their caches since."""
        held = [each.beginning for each in session.memory.shared]
        for beginning in [each for each, owner in self._owners.items() if owner == session_id and each not in held]:
            del self._owners[beginning]
            self._hand_on(session.client, beginning)
        for beginning in held:
            self._owners.setdefault(beginning, session_id)

    def _other_bytes(self, session_id: int | None, session: Session) -> int:
        """What a session holds beside its own keys and values: its adapter, and beginnings that are counted for it."""
        shared = [each.beginning for each in session.memory.shared]
        counted = sum(each.bytes for each in shared if self._owners.get(each, session_id) == session_id)
        return counted + (0 if session.adapter is None else session.adapter.bytes)

    def _busy(self, missing_bytes: int) -> ServerBusy:
        return ServerBusy(f"no room for {missing_bytes / 2**20:.0f} MB of cache now", limit="max_cache_gb")
