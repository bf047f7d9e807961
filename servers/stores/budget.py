"""A budget of bytes in fair shares. Pure bookkeeping."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

MAX_HOLDINGS = 4096  # of one client in one budget: small ones cost memory too


class Shares(Generic[Key]):
    """One budget of bytes, and who holds what of it.

    A client that is alone may hold all of it. When others come, each has a right to an equal share: whoever holds most
    beyond that makes room, the newest first, since the oldest is needed soonest.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._held: dict[str, dict[Key, int]] = {}  # by client, oldest first
        self._bytes: Counter[str] = Counter()
        self._holders: dict[Key, str] = {}

    def make_room(self, client: str, size: int) -> list[Key] | None:
        """What others have to give up before `client` may hold `size` bytes more; None: it has to do without."""
        if len(self._held.get(client, ())) >= MAX_HOLDINGS:
            return None
        missing = self.used_bytes + size - self.max_bytes
        if missing > 0 and self._bytes[client] + size > self._share(client):
            return None
        leaving: list[Key] = []
        others = {other: self._bytes[other] for other in self._held if other != client}
        newest = {other: reversed(self._held[other].items()) for other in others}
        while missing > 0:
            greediest = max(others, key=lambda other: others[other])  # beyond its share, or there were room
            key, held = next(newest[greediest])
            leaving.append(key)
            others[greediest] -= held
            missing -= held
        return leaving

    def room_for(self, client: str) -> int:
        """Bytes that `client` could hold more, others giving up what is beyond their shares."""
        return max(self.max_bytes - self.used_bytes, self._share(client) - self._bytes[client])

    def hold(self, key: Key, client: str, size: int) -> None:
        self._held.setdefault(client, {})[key] = size
        self._holders[key] = client
        self._bytes[client] += size
        self.used_bytes += size

    def drop(self, key: Key) -> None:
        client = self._holders.pop(key)
        size = self._held[client].pop(key)
        self._bytes[client] -= size
        self.used_bytes -= size
        if not self._held[client]:
            del self._held[client], self._bytes[client]

    def holder(self, key: Key) -> str | None:
        """The client that holds `key`; None where nobody does."""
        return self._holders.get(key)

    def of(self, client: str) -> list[Key]:
        """What `client` holds, oldest first."""
        return list(self._held.get(client, ()))

    def _share(self, client: str) -> int:
        return self.max_bytes // len({*self._held, client})
