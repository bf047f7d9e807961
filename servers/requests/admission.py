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
    max_positions: int | None
    max_tokens: int | None
    max_compute_bytes: int


class Admission:
    """Admits streams, and counts what all clients together have in flight."""

    def __init__(self, limits: RequestLimits):
        self.limits = limits
        self.streams = 0
        self.receiving_bytes = 0
        self._quotas: dict[str, ClientQuota] = {}  # of clients with an open stream, or whose messages take memory still

    def __contains__(self, client: str) -> bool:
        """Whether `client` has an open stream."""
        return client in self._quotas and self._quotas[client].streams > 0

    @property
    def is_full(self) -> bool:
        return self.streams >= self.limits.max_streams

    def open_stream(self, client: str) -> ClientQuota:
        """Count one more stream of `client`; its streams share the quota. Raises ServerBusy."""
        limits = self.limits
        if self.is_full:
            raise ServerBusy(f"this server has {limits.max_streams} streams open", limit="max_streams")
        quota = self._quotas.get(client) or ClientQuota(self, client)
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
        quota = self._quotas[client]
        quota.streams -= 1
        self.forget_unused(quota)

    def forget_unused(self, quota: ClientQuota) -> None:
        """Forget a quota of which nothing is used. One who leaves and comes again has what he left behind in it."""
        if not (quota.streams or quota.in_flight or quota.receiving_bytes):
            self._quotas.pop(quota.client, None)


class ClientQuota:
    """Counts what one client has in flight on all its streams."""

    def __init__(self, admission: Admission, client: str):
        self._admission, self.client, self.limits = admission, client, admission.limits
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
        self._admission.forget_unused(self)

    def fits(self, size_bytes: int) -> bool:
        """Whether `reserve` would find room for so many bytes now.

        A client may have as much in flight as would be left free, so that whoever comes next always finds room.
        Source: dynamic thresholds, Choudhury and Hahne 1998 (IEEE/ACM Trans. Networking 6:2), with a factor of one.
        """
        left = self.limits.max_receiving_bytes - self._admission.receiving_bytes - size_bytes
        return self.receiving_bytes + size_bytes <= left

    def reserve(self, size_bytes: int) -> bool:
        """Reserve memory for a message; False where there is none for this client."""
        if not self.fits(size_bytes):
            return False
        self.receiving_bytes += size_bytes
        self._admission.receiving_bytes += size_bytes
        return True

    def release(self, size_bytes: int) -> None:
        self.receiving_bytes -= size_bytes
        self._admission.receiving_bytes -= size_bytes
        self._admission.forget_unused(self)


class Reservation:
    """Memory of one message in its client's quota: of the request, while it is in flight, and then of its reply.

    It lasts as long as the message does. The end of the client's stream does not release it.
    """

    def __init__(self, quota: ClientQuota, size_bytes: int):
        """Take over `size_bytes` that were reserved in `quota`."""
        self._quota, self.size_bytes = quota, size_bytes

    def resize(self, size_bytes: int) -> bool:
        """Reserve `size_bytes` in place of what is reserved; False, and no change, where there is no room for more."""
        more_bytes = size_bytes - self.size_bytes
        if more_bytes > 0 and not self._quota.reserve(more_bytes):
            return False
        if more_bytes < 0:
            self._quota.release(-more_bytes)
        self.size_bytes = size_bytes
        return True

    def release(self) -> None:
        """Release all of it. Idempotent."""
        self._quota.release(self.size_bytes)
        self.size_bytes = 0
