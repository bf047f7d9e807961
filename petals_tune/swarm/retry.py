"""When failed work is tried again, and when it is given up. Pure: the clock is an argument."""

from __future__ import annotations

import math
from dataclasses import dataclass

from petals_tune.errors import Diverged, NotFinite, Retriable, SwarmTimeout, UncoveredBlocks

NOTICE_AFTER_S = 5.0  # what is repaired sooner is not logged
NOTICE_EVERY_S = 30.0


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How long work that does not move on is tried again."""

    timeout_s: float = 600.0  # without any server completing its part, or while nobody holds some of the blocks
    attempts: int | None = None  # servers that may fail in a row, the first included; None: timeout_s alone decides
    reply_s: float = 120.0  # for one server's answer; long, since a stopped server is noticed by its heartbeat
    connect_s: float = 10.0  # to open a stream
    first_pause_s: float = 0.2
    longest_pause_s: float = 5.0

    def pause_s(self, attempt: int) -> float:
        """Seconds before attempt number `attempt` (0 is the first, which does not wait)."""
        return 0.0 if attempt == 0 else min(self.first_pause_s * 2 ** min(attempt - 1, 32), self.longest_pause_s)


@dataclass
class Attempts:
    """The attempts at one piece of work since it last moved on."""

    policy: RetryPolicy
    since_s: float
    count: int = 0
    failures: int = 0  # of servers; waiting for blocks that nobody holds is none
    server_error: Retriable | None = None  # the last of them
    not_finite: NotFinite | None = None  # the first of them

    def made_progress(self, now_s: float) -> None:
        self.since_s, self.count, self.failures = now_s, 0, 0
        self.server_error = self.not_finite = None

    def failed(self, error: Retriable, now_s: float) -> float:
        """Seconds to wait before the next attempt.

        When there shall be none, raises `error`, or SwarmTimeout, or Diverged for numbers that were not finite twice.
        """
        if isinstance(error, NotFinite):
            if self.not_finite is not None:
                raise Diverged(
                    f"{error}\n  and before that: {self.not_finite}\n  training diverged (lower optimizer.lr, or "
                    "clip), or the blocks of these servers are broken"
                ) from error
            self.not_finite = error
        self.count += 1
        if not isinstance(error, UncoveredBlocks):
            self.failures += 1
            self.server_error = error
        if self.policy.attempts is not None and self.failures >= self.policy.attempts:
            raise self._timeout(f"swarm.attempts={self.policy.attempts}", error, now_s) from error
        if now_s - self.since_s >= self.policy.timeout_s:
            if self.server_error is None:
                raise error
            raise self._timeout(f"swarm.timeout_s={self.policy.timeout_s:g}", error, now_s) from error
        return self.policy.pause_s(self.count)

    def _timeout(self, option: str, error: Retriable, now_s: float) -> SwarmTimeout:
        before = None if error is self.server_error else self.server_error
        return SwarmTimeout(
            f"no server could do the work in {now_s - self.since_s:.0f} s and {self.count} attempts ({option}); "
            f"the last error: {error}" + ("" if before is None else f"\nbefore that: {before}"),
            limit=option.partition("=")[0],
            attempts=self.count,
            last=error,
            before=before,
        )


@dataclass
class Notices:
    """When to log that work makes no progress: not at once, not often, and once for all that waits together."""

    last_s: float = -math.inf

    def due(self, since_s: float, now_s: float) -> bool:
        """Whether to log now that work makes no progress since `since_s`."""
        if now_s - since_s < NOTICE_AFTER_S or now_s - self.last_s < NOTICE_EVERY_S:
            return False
        self.last_s = now_s
        return True
