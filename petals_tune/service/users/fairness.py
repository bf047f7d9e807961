"""Fairness between keys: answers in flight, tokens a minute, equal shares of what runs. The clock is an argument."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from petals_tune.service.errors import too_many
from petals_tune.service.users.slots import Slots

MINUTE_S = 60.0
QUEUE_S = 5.0  # when to ask again, where too many wait


@dataclass
class _Bucket:
    """Tokens that an owner may still use; it fills up steadily, to a minute's worth."""

    left: float
    at_s: float


@dataclass
class Fairness:
    """Limits of each owner alike. Used by one event loop."""

    slots: Slots  # of answers that are made, and of training
    most_in_flight: int  # answers of one owner, those that wait included
    most_waiting: int  # answers that wait for a slot, of all owners
    tokens_a_minute: int | None = None  # None: no limit
    _in_flight: Counter[str] = field(default_factory=Counter)
    _running: int = 0  # pieces of work, those without answers included
    _buckets: dict[str, _Bucket] = field(default_factory=dict)

    @property
    def busy(self) -> bool:
        """Whether any work is in flight."""
        return self._running > 0

    def check(self, owner: str, answers: int, now_s: float) -> None:
        """Raise ServiceError (429) where `owner` may not begin so many answers now; 0: work that has no answers.

        An owner with none in flight may begin any number, and one of whom none waits is let into a full queue.
        """
        already = self._in_flight[owner]
        if answers and already and already + answers > self.most_in_flight:
            raise too_many(
                f"{already} answers of this key are in flight, and it may have {self.most_in_flight}: wait for one to "
                "end",
                retry_after_s=1,
            )
        if self.tokens_a_minute is not None and (missing := -self._bucket(owner, now_s).left) >= 0:
            wait_s = (missing + 1) * MINUTE_S / self.tokens_a_minute
            raise too_many(f"this key may use {self.tokens_a_minute} tokens a minute", retry_after_s=wait_s)
        if answers and self.slots.waiting() >= self.most_waiting and self.slots.waiting(owner):
            raise too_many(f"{self.slots.waiting()} answers wait already", retry_after_s=QUEUE_S)

    @contextmanager
    def in_flight(self, owner: str, answers: int = 1) -> Iterator[None]:
        """Work of `owner` that was checked is in flight within the block."""
        self._in_flight[owner] += answers
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            self._in_flight[owner] -= answers

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
