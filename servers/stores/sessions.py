"""KV caches of clients that generate: each session's rows in storage of their own, inside a budget of bytes."""

from __future__ import annotations

import itertools

from petals_tune.blocks.adapters import Adapter
from petals_tune.blocks.kv_cache import Session
from petals_tune.errors import RequestRefused, ServerBusy, SessionLost
from petals_tune.wire.messages import OpenSession
from servers.stores.budget import Shares


class SessionStore:
    """Sessions by id, in fair shares. Used by the event loop alone; the clock is an argument."""

    def __init__(self, *, max_bytes: int, max_idle_s: float, token_bytes: int):
        """`token_bytes`: what one position of one row takes in one block."""
        self.max_idle_s, self._token_bytes = max_idle_s, token_bytes
        self._shares: Shares[int] = Shares(max_bytes)
        self._sessions: dict[int, Session] = {}
        self._ids = itertools.count(1)

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def used_bytes(self) -> int:
        return self._shares.used_bytes

    @property
    def free_bytes(self) -> int:
        return self._shares.max_bytes - self._shares.used_bytes

    def open(self, client: str, request: OpenSession, adapter: Adapter | None, now_s: float) -> int:
        """Reserve a session. Raises ServerBusy with the length that would fit, RequestRefused if none ever will."""
        self._drop_idle(now_s)
        per_position = self._token_bytes * len(request.span) * request.rows
        adapter_bytes = 0 if adapter is None else adapter.bytes  # the session keeps it
        size, max_bytes = per_position * request.max_length + adapter_bytes, self._shares.max_bytes
        if size > max_bytes:
            raise RequestRefused(
                f"{request.rows} rows of {request.max_length} positions need {size / 2**20:.0f} MB of cache on blocks "
                f"{request.span}, and this server has {max_bytes / 2**20:.0f} MB in all: "
                f"max_length={max(max_bytes - adapter_bytes, 0) // per_position} would fit"
            )
        leaving = self._shares.make_room(client, size)
        if leaving is None:
            raise ServerBusy(
                f"no room for {size / 2**20:.0f} MB of cache now: "
                f"max_length={max(self._shares.room_for(client) - adapter_bytes, 0) // per_position} would fit"
            )
        for other in leaving:
            self._drop(other)
        session = next(self._ids)
        self._sessions[session] = Session(
            client=client,
            span=request.span,
            rows=request.rows,
            max_length=request.max_length,
            adapter=adapter,
            adapter_version=request.adapter,
            used_s=now_s,
        )
        self._shares.hold(session, client, size)
        return session

    def get(self, client: str, session: int, now_s: float) -> Session:
        """Raises SessionLost where this client has no such session (any more)."""
        found = self._sessions.get(session)
        if found is None or found.client != client:
            raise SessionLost(f"session {session} is not kept here (any more)")
        found.used_s = now_s
        return found

    def close(self, client: str, session: int) -> None:
        if self._shares.holder(session) == client:
            self._drop(session)

    def drop_client(self, client: str) -> None:
        for session in self._shares.of(client):
            self._drop(session)

    def _drop_idle(self, now_s: float) -> None:
        for session, kept in list(self._sessions.items()):
            if now_s - kept.used_s > self.max_idle_s:
                self._drop(session)

    def _drop(self, session: int) -> None:
        self._shares.drop(session)
        del self._sessions[session]
