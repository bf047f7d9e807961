"""How much of the server each client may have: bytes, streams, requests. Pure bookkeeping; the clock is an argument."""

from __future__ import annotations

from dataclasses import dataclass

from petals_tune.errors import ServerBusy


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
