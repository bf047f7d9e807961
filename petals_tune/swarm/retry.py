"""When failed work is tried again, and when it is given up. Pure: the clock is an argument."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from petals_tune.errors import Diverged, NotFinite, OverLimit, Refused, Retriable, SwarmTimeout, UncoveredBlocks
from petals_tune.net.verdict import verdict
from petals_tune.wire.span import BlockSpan, gaps

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
class Refusals:
    """What servers refused of one piece of work, each until others have done it."""

    by_peer: dict[str, Refused] = field(default_factory=dict)  # the last of each, the newest last
    _done: list[BlockSpan] = field(default_factory=list)  # blocks for which others did the work since

    @property
    def peers(self) -> frozenset[str]:
        """Servers that are not asked again for this work."""
        return frozenset(self.by_peer)

    def add(self, refused: Refused) -> None:
        if isinstance(refused, OverLimit) and refused.fits is not None:
            return  # known by its limits from now on, and asked for less
        self.by_peer.pop(refused.peer, None)
        self.by_peer[refused.peer] = refused

    def done(self, span: BlockSpan) -> list[Refused]:
        """Take note that the work is done for the blocks of `span`; returns the refusals that this contradicts."""
        if not self.by_peer:
            return []
        self._done.append(span)
        denied = [
            each
            for each in self.by_peer.values()
            if not isinstance(each.span, BlockSpan) or not gaps(self._done, each.span)
        ]
        for each in denied:
            del self.by_peer[each.peer]
        if not self.by_peer:
            self._done.clear()
        return denied


@dataclass
class Attempts:
    """The attempts at one piece of work since it last moved on."""

    policy: RetryPolicy
    since_s: float
    count: int = 0
    failures: int = 0  # of servers; waiting for blocks that nobody holds is none
    server_error: Retriable | None = None  # the last of them
    not_finite: NotFinite | None = None  # the first of them
    refusals: Refusals = field(default_factory=Refusals)
    lacked: set[str] = field(default_factory=set)  # servers that did not keep what they were to keep

    def made_progress(self, now_s: float) -> None:
        self.since_s, self.count, self.failures = now_s, 0, 0
        self.server_error = self.not_finite = None

    def failed(self, error: Retriable, now_s: float, *, alone: bool = False) -> float:
        """Seconds to wait before the next attempt. `alone`: only servers that refused, or returned NaN, are there.

        When there shall be none, raises `error`, or SwarmTimeout; what servers refuse, where two agree or nobody else
        is there; Diverged for numbers that were not finite at two servers, or twice at the only one.
        """
        if isinstance(error, Refused):
            self.refusals.add(error)
        if isinstance(error, Refused | UncoveredBlocks):
            final = verdict(list(self.refusals.by_peer.values()), alone=alone)
            if final is not None:
                raise final from error
        if isinstance(error, OverLimit):
            return 0.0  # no failure: it is asked for less, or not again
        if isinstance(error, NotFinite):
            before = self.not_finite
            if before is not None and (alone or before.peer != error.peer):
                raise Diverged(
                    f"{error}\n  and before that: {before}\n  training diverged (lower optimizer.lr, or clip), or the "
                    "blocks of these servers are broken"
                ) from error
            self.not_finite = before or error
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
