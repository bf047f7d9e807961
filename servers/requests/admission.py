"""Per-client quotas for bytes, streams and requests. No I/O; the clock is an argument."""

from __future__ import annotations

from dataclasses import dataclass

from petals_tune.errors import ServerBusy


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """Limits of what clients may ask; conf/serve.yaml describes each."""

    max_streams: int
    max_streams_per_client: int
    max_in_flight: int
    max_requests_per_s: float
    max_request_s: float
    max_receiving_bytes: int
    max_message_bytes: int
    max_positions: int
    max_tokens: int
    max_compute_bytes: int


class Admission:
    """Admits streams, and counts what all clients together have in flight."""

    def __init__(self, limits: RequestLimits):
        self.limits = limits
        self.streams = 0
        self.receiving_bytes = 0
        self._quotas: dict[str, ClientQuota] = {}  # of clients with an open stream

    def __contains__(self, client: str) -> bool:
        return client in self._quotas

    @property
    def is_full(self) -> bool:
        return self.streams >= self.limits.max_streams

    def open_stream(self, client: str) -> ClientQuota:
        """Count one more stream of `client`; its streams share the quota. Raises ServerBusy."""
        limits = self.limits
        if self.is_full:
            raise ServerBusy(f"this server has {limits.max_streams} streams open", limit="max_streams")
        quota = self._quotas.get(client) or ClientQuota(self)
        if quota.streams >= limits.max_streams_per_client:
            raise ServerBusy(
                f"more than {limits.max_streams_per_client} streams of one client", limit="max_streams_per_client"
            )
        self._quotas[client] = quota
        quota.streams += 1
        self.streams += 1
        return quota

    def close_stream(self, client: str) -> None:
        """Count one stream of `client` less."""
        self.streams -= 1
        self._quotas[client].streams -= 1
        if not self._quotas[client].streams:
            del self._quotas[client]


class ClientQuota:
    """Counts what one client has in flight on all its streams."""

    def __init__(self, admission: Admission):
        self._admission, self.limits = admission, admission.limits
        self.streams = 0
        self.in_flight = 0
        self.receiving_bytes = 0
        self._due_s = 0.0  # when the next request may be served, were there no burst

    def delay_s(self, now_s: float) -> float:
        """Return the seconds to wait before the next request is served: max_requests_per_s, in bursts of a second."""
        self._due_s = max(self._due_s, now_s - 1.0) + 1.0 / self.limits.max_requests_per_s
        return max(0.0, self._due_s - now_s)

    def start_request(self) -> None:
        """Count one more request in flight. Raises ServerBusy."""
        if self.in_flight >= self.limits.max_in_flight:
            raise ServerBusy(f"more than {self.limits.max_in_flight} requests in flight", limit="max_in_flight")
        self.in_flight += 1

    def finish_request(self) -> None:
        self.in_flight -= 1

    def reserve(self, size_bytes: int) -> bool:
        """Reserve memory for a request that arrives; False where there is none for this client.

        A client may have as much in flight as would be left free, so that whoever comes next always finds room.
        Source: dynamic thresholds, Choudhury and Hahne 1998 (IEEE/ACM Trans. Networking 6:2), with a factor of one.
        """
        left = self.limits.max_receiving_bytes - self._admission.receiving_bytes - size_bytes
        if self.receiving_bytes + size_bytes > left:
            return False
        self.receiving_bytes += size_bytes
        self._admission.receiving_bytes += size_bytes
        return True

    def release(self, size_bytes: int) -> None:
        self.receiving_bytes -= size_bytes
        self._admission.receiving_bytes -= size_bytes
