"""Fairness between keys: requests in flight, and tokens a minute. The clock is an argument."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from petals_tune.service.errors import too_many

MINUTE_S = 60.0


@dataclass
class _Bucket:
    """Tokens that an owner may still use; it fills up steadily, to a minute's worth."""

    left: float
    at_s: float


@dataclass
class Fairness:
    """Limits of each owner alike. Used by one event loop."""

    most_in_flight: int
    tokens_a_minute: int | None  # None: no limit
    _in_flight: Counter[str] = field(default_factory=Counter)
    _buckets: dict[str, _Bucket] = field(default_factory=dict)

    @contextmanager
    def in_flight(self, owner: str, now_s: float) -> Iterator[None]:
        """A request of `owner` runs within the block. Raises ServiceError (429) where it has too many, or no tokens."""
        if self._in_flight[owner] >= self.most_in_flight:
            raise too_many(
                f"{self.most_in_flight} requests of this key run already: wait for one to end", retry_after_s=1
            )
        if self.tokens_a_minute is not None and (missing := -self._bucket(owner, now_s).left) >= 0:
            wait_s = (missing + 1) * MINUTE_S / self.tokens_a_minute
            raise too_many(f"this key may use {self.tokens_a_minute} tokens a minute", retry_after_s=wait_s)
        self._in_flight[owner] += 1
        try:
            yield
        finally:
            self._in_flight[owner] -= 1
            if not self._in_flight[owner]:
                del self._in_flight[owner]

    def charge(self, owner: str, tokens: int, now_s: float) -> None:
        """Count tokens that were read or written for `owner`; an answer that takes more than are left is a debt."""
        if self.tokens_a_minute is not None:
            self._bucket(owner, now_s).left -= tokens

    def _bucket(self, owner: str, now_s: float) -> _Bucket:
        assert self.tokens_a_minute is not None
        most = float(self.tokens_a_minute)
        bucket = self._buckets.setdefault(owner, _Bucket(left=most, at_s=now_s))
        bucket.left = min(most, bucket.left + (now_s - bucket.at_s) * most / MINUTE_S)
        bucket.at_s = now_s
        return bucket
