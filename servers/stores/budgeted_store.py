"""Values that a server keeps for its clients, in fair shares of a budget of bytes. No I/O; the clock is an argument."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

MAX_VALUES = 4096  # of one client in one store: small ones cost memory too


@dataclass(slots=True)
class _Entry(Generic[V]):
    value: V | None  # None: its memory is taken, by a computation that makes the value or uses it
    size_bytes: int
    used_s: float


class BudgetedStore(Generic[K, V]):
    """Values by client and key, inside a budget of bytes. Used by the event loop alone.

    A client that is alone may hold all of the budget. Once others come, each has a right to an equal share: whoever
    holds most beyond that makes room, its newest values first, since the oldest are needed soonest. Values of one
    client never make room for another value of the same client.

    Memory is counted from before it is taken until it is free: room is reserved for a value that is still computed, and
    a value that is lent to a computation stays counted. Neither is evicted, which would free nothing.
    """

    def __init__(self, *, max_bytes: int, max_idle_s: float = math.inf):
        """`drop_expired` drops values that were not used for longer than `max_idle_s`."""
        self.max_bytes, self._max_idle_s = max_bytes, max_idle_s
        self.used_bytes = 0
        self._held: dict[str, dict[K, _Entry[V]]] = {}  # by client, oldest first
        self._client_bytes: Counter[str] = Counter()
        self._by_use: dict[tuple[str, K], None] = {}  # of all clients, least recently used first

    def __len__(self) -> int:
        return len(self._by_use)

    @property
    def free_bytes(self) -> int:
        return self.max_bytes - self.used_bytes

    def insert(self, client: str, key: K, value: V | None, size_bytes: int, *, now_s: float = 0.0) -> bool:
        """Keep `value` as the newest one of `client`, evicting what others hold beyond their shares. None reserves.

        Returns False, and keeps and evicts nothing, where it does not fit.
        """
        assert key not in self._held.get(client, ())
        evicted = self._choose_evictions(client, size_bytes)
        if evicted is None or len(self._held.get(client, ())) >= MAX_VALUES:
            return False
        for other, other_key in evicted:
            self.remove(other, other_key)
        self._held.setdefault(client, {})[key] = _Entry(value, size_bytes, now_s)
        self._by_use[client, key] = None
        self._client_bytes[client] += size_bytes
        self.used_bytes += size_bytes
        return True

    @contextmanager
    def room_for(self, client: str, key: K, size_bytes: int, *, now_s: float = 0.0) -> Iterator[bool]:
        """Reserve room, where there is some, for a value that the block computes and `fill`s, or it is free again."""
        fits = self.insert(client, key, None, size_bytes, now_s=now_s)
        entry = self._held[client][key] if fits else None
        try:
            yield fits
        finally:
            if entry is not None and entry.value is None and self._held.get(client, {}).get(key) is entry:
                self.remove(client, key)

    def fill(self, client: str, key: K, value: V, size_bytes: int, *, now_s: float = 0.0) -> bool:
        """Keep `value`, for which room was reserved, and count the bytes that it has in the end.

        Returns False, and keeps nothing, where the client left meanwhile or the room does not suffice.
        """
        entry = self._held.get(client, {}).get(key)
        if entry is None or entry.value is not None:
            return False
        more = size_bytes - entry.size_bytes
        if more > max(self.free_bytes, 0):
            self.remove(client, key)
            return False
        entry.value, entry.size_bytes, entry.used_s = value, size_bytes, now_s
        self._client_bytes[client] += more
        self.used_bytes += more
        return True

    def resize(self, client: str, key: K, size_bytes: int) -> bool:
        """Count `size_bytes` for the value under `key`, which grows or shrinks, evicting as `insert` does.

        Returns False, and changes nothing, where it does not fit.
        """
        entry = self._held[client][key]
        more = size_bytes - entry.size_bytes
        evicted = self._choose_evictions(client, more) if more > 0 else []
        if evicted is None:
            return False
        for other, other_key in evicted:
            self.remove(other, other_key)
        entry.size_bytes = size_bytes
        self._client_bytes[client] += more
        self.used_bytes += more
        return True

    def size_of(self, client: str, key: K) -> int:
        """How many bytes are counted for the value under `key`."""
        return self._held[client][key].size_bytes

    def lend(self, client: str, key: K, *, now_s: float = 0.0) -> V | None:
        """Return the value under `key`, once: its bytes stay counted until it is removed. None where there is none."""
        value = self.lookup(client, key, now_s=now_s)
        if value is not None:
            self._held[client][key].value = None
        return value

    def lookup(self, client: str, key: K, *, now_s: float = 0.0) -> V | None:
        """Return the value that `client` holds under `key`, which counts as a use of it; None where there is none."""
        entry = self._held.get(client, {}).get(key)
        if entry is None:
            return None
        entry.used_s = now_s
        del self._by_use[client, key]
        self._by_use[client, key] = None
        return entry.value

    def remove(self, client: str, key: K) -> V | None:
        """Drop and return the value that `client` holds under `key`; None where there is none."""
        held = self._held.get(client, {})
        entry = held.pop(key, None)
        if entry is None:
            return None
        del self._by_use[client, key]
        self._client_bytes[client] -= entry.size_bytes
        self.used_bytes -= entry.size_bytes
        if not held:
            del self._held[client], self._client_bytes[client]
        return entry.value

    def keys_of(self, client: str) -> list[K]:
        """Return the keys that `client` holds, oldest first."""
        return list(self._held.get(client, ()))

    def available_bytes(self, client: str) -> int:
        """Return how much more `client` could hold, others giving up what is beyond their shares."""
        return max(self.free_bytes, self._share_bytes(client) - self._client_bytes[client])

    def drop_client(self, client: str) -> None:
        for key in self.keys_of(client):
            self.remove(client, key)

    def drop_expired(self, now_s: float) -> None:
        while self._by_use:
            client, key = next(iter(self._by_use))
            if now_s - self._held[client][key].used_s <= self._max_idle_s:
                return
            self.remove(client, key)

    def _choose_evictions(self, client: str, size_bytes: int) -> list[tuple[str, K]] | None:
        """Return what others give up before `client` may hold `size_bytes` more; None where it does not fit."""
        missing = size_bytes - self.free_bytes
        if missing > 0 and self._client_bytes[client] + size_bytes > self._share_bytes(client):
            return None
        evicted: list[tuple[str, K]] = []
        others = {other: self._client_bytes[other] for other in self._held if other != client}
        newest = {other: reversed(self._held[other].items()) for other in others}
        while missing > 0:
            # The greediest is beyond its share: were all others within theirs, this client's share would be free.
            greediest = max(others, key=lambda other: others[other])
            key, entry = next(
                ((key, entry) for key, entry in newest[greediest] if entry.value is not None), (None, None)
            )
            if key is None or entry is None:
                return None  # a computation has it, and will give it back
            evicted.append((greediest, key))
            others[greediest] -= entry.size_bytes
            missing -= entry.size_bytes
        return evicted

    def _share_bytes(self, client: str) -> int:
        return self.max_bytes // len({*self._held, client})
