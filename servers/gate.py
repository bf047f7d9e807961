"""How much of the server each client may have: bytes, streams, requests. Pure bookkeeping; the clock is an argument."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from petals_tune.errors import ServerBusy

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


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What a server lets its clients ask; conf/serve.yaml says what each is for."""

    max_streams: int
    max_streams_per_client: int
    max_in_flight: int
    max_requests_per_s: float
    max_request_s: float
    max_receiving_bytes: int
    max_message_bytes: int
    max_positions: int
    max_tokens: int


class Gate:
    """What the clients of a server have under way, all together."""

    def __init__(self, limits: RequestLimits):
        self.limits = limits
        self.streams = 0
        self.receiving_bytes = 0
        self._guests: dict[str, Guest] = {}  # those that have a stream

    def __contains__(self, client: str) -> bool:
        return client in self._guests

    @property
    def is_full(self) -> bool:
        return self.streams >= self.limits.max_streams

    def enter(self, client: str) -> Guest:
        """One more stream of `client`. Raises ServerBusy."""
        if self.is_full:
            raise ServerBusy(f"this server has {self.limits.max_streams} streams open")
        guest = self._guests.get(client) or Guest(self)
        if guest.streams >= self.limits.max_streams_per_client:
            raise ServerBusy(f"more than {self.limits.max_streams_per_client} streams of one client")
        self._guests[client] = guest
        guest.streams += 1
        self.streams += 1
        return guest

    def leave(self, client: str) -> None:
        """One stream less."""
        self.streams -= 1
        self._guests[client].streams -= 1
        if not self._guests[client].streams:
            del self._guests[client]


class Guest:
    """What one client has under way, on all its streams."""

    def __init__(self, gate: Gate):
        self._gate, self.limits = gate, gate.limits
        self.streams = 0
        self.in_flight = 0
        self.receiving_bytes = 0
        self._due_s = 0.0  # when the next request may be served, were there no burst

    def pause_s(self, now_s: float) -> float:
        """Seconds to wait before the next request is served; a second's worth of them may come at once."""
        self._due_s = max(self._due_s, now_s - 1.0) + 1.0 / self.limits.max_requests_per_s
        return max(0.0, self._due_s - now_s)

    def begin(self) -> None:
        """One more request under way. Raises ServerBusy."""
        if self.in_flight >= self.limits.max_in_flight:
            raise ServerBusy(f"more than {self.limits.max_in_flight} requests in flight")
        self.in_flight += 1

    def end(self) -> None:
        self.in_flight -= 1

    def take(self, size: int) -> bool:
        """Whether a request of `size` bytes may be read.

        A client may have as much under way as would be left free, so that whoever comes next always finds room.
        Source: dynamic thresholds, Choudhury and Hahne 1998 (IEEE/ACM Trans. Networking 6:2), with a factor of one.
        """
        left = self.limits.max_receiving_bytes - self._gate.receiving_bytes - size
        if self.receiving_bytes + size > left:
            return False
        self.receiving_bytes += size
        self._gate.receiving_bytes += size
        return True

    def give_back(self, size: int) -> None:
        self.receiving_bytes -= size
        self._gate.receiving_bytes -= size
