"""When to try again, and whom to leave alone meanwhile. Pure: the clock is an argument."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from petals_tune.errors import Diverged, NotFinite, Retriable, SwarmTimeout, UncoveredBlocks
from petals_tune.wire.records import ServerRecord

SMOOTHING = 0.3  # weight of the newest measurement
FIRST_BAN_S = 5.0  # a server that restarts under its address is back in about this time
LONGEST_BAN_S = 60.0  # knocking at a closed door costs little
OFFENCE_S = 3600.0  # wrong numbers do not come from a bad line
NOT_FINITE_S = 60.0  # NaN may be the request's own doing: the second server that it goes to will tell
SAY_AFTER_S = 5.0  # what is repaired sooner is not worth a line
SAY_EVERY_S = 30.0


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
class Bans:
    """Servers to pass over.

    One that failed is left alone for a while, longer with each ban in a row; then it is `doubtful`, and stays passed
    over until somebody who does not hold up the work has reached it. One that returned NaN stays out for NOT_FINITE_S,
    and one that returned what cannot be right (an offender) for OFFENCE_S, whatever they answer meanwhile.
    """

    until_s: dict[str, float] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)  # bans in a row
    not_finite_until_s: dict[str, float] = field(default_factory=dict)
    offended_until_s: dict[str, float] = field(default_factory=dict)

    def failed(self, peer: str, now_s: float) -> None:
        if self.until_s.get(peer, -math.inf) > now_s:
            return  # requests that were in flight together fail together
        count = self.failures[peer] = self.failures.get(peer, 0) + 1
        self.until_s[peer] = now_s + min(FIRST_BAN_S * 2 ** min(count - 1, 32), LONGEST_BAN_S)

    def not_finite(self, peer: str, now_s: float) -> None:
        self.not_finite_until_s[peer] = now_s + NOT_FINITE_S

    def offended(self, peer: str, now_s: float) -> None:
        self.offended_until_s[peer] = now_s + OFFENCE_S

    def reached(self, peer: str) -> None:
        """It is there; whether it works is still to be seen."""
        self.until_s.pop(peer, None)

    def answered(self, peer: str) -> None:
        self.failures.pop(peer, None)
        self.until_s.pop(peer, None)

    def active(self, now_s: float) -> frozenset[str]:
        """All to be passed over."""
        return self.offenders(now_s) | _later(self.not_finite_until_s, now_s) | self.until_s.keys()

    def doubtful(self, now_s: float) -> frozenset[str]:
        """Those whose ban has ended, and who were not reached since."""
        return frozenset(peer for peer, until in self.until_s.items() if until <= now_s)

    def offenders(self, now_s: float) -> frozenset[str]:
        """Those whom not even the lack of any other server brings back."""
        return _later(self.offended_until_s, now_s)


def _later(until_s: dict[str, float], now_s: float) -> frozenset[str]:
    return frozenset(peer for peer, until in until_s.items() if until > now_s)


@dataclass
class Attempts:
    """The attempts at one piece of work since it last moved on."""

    policy: RetryPolicy
    since_s: float
    count: int = 0
    failures: int = 0  # of servers; waiting for blocks that nobody holds is none
    server_error: Retriable | None = None  # the last of them
    not_finite: NotFinite | None = None  # the first of them

    def moved_on(self, now_s: float) -> None:
        self.since_s, self.count, self.failures = now_s, 0, 0
        self.server_error = self.not_finite = None

    def failed(self, error: Retriable, now_s: float) -> float:
        """Seconds to wait before the next attempt.

        When there shall be none, raises `error`, or SwarmTimeout, or Diverged for numbers that were not finite twice.
        """
        if isinstance(error, NotFinite):
            if self.not_finite is not None:
                raise Diverged(
                    f"{error}\n  and before that: {self.not_finite}\n  training diverged: lower optimizer.lr, "
                    "or clip; or the server is broken"
                ) from error
            self.not_finite = error
        self.count += 1
        if not isinstance(error, UncoveredBlocks):
            self.failures += 1
            self.server_error = error
        if self.policy.attempts is not None and self.failures >= self.policy.attempts:
            raise SwarmTimeout(f"{self._tried(now_s)} (swarm.attempts={self.policy.attempts}); the last error: {error}")
        if now_s - self.since_s >= self.policy.timeout_s:
            if self.server_error is None:
                raise error
            before = "" if error is self.server_error else f"\nbefore that: {self.server_error}"
            raise SwarmTimeout(
                f"{self._tried(now_s)} (swarm.timeout_s={self.policy.timeout_s:g}); the last error: {error}{before}"
            ) from error
        return self.policy.pause_s(self.count)

    def _tried(self, now_s: float) -> str:
        return f"no server could do the work in {now_s - self.since_s:.0f} s and {self.count} attempts"


@dataclass
class Notices:
    """When to say that work stands still: not at once, not often, and once for all that wait together."""

    said_s: float = -math.inf

    def due(self, since_s: float, now_s: float) -> bool:
        """Whether to say now that work stands still since `since_s`."""
        if now_s - since_s < SAY_AFTER_S or now_s - self.said_s < SAY_EVERY_S:
            return False
        self.said_s = now_s
        return True


@dataclass
class Load:
    """What each server costs us: what it announces, corrected by what we measured, and our work that it has in hand.

    Work is counted in tokens (rows x positions) x blocks.
    """

    correction: dict[str, float] = field(default_factory=dict)  # measured / announced seconds, smoothed
    in_hand: dict[str, int] = field(default_factory=dict)

    def take(self, peer: str, work: int) -> None:
        self.in_hand[peer] = self.in_hand.get(peer, 0) + work

    def give_back(self, peer: str, work: int) -> None:
        self.in_hand[peer] -= work

    def measured(self, server: ServerRecord, compute_s: float, tokens: int, blocks: int) -> None:
        new = compute_s / server.throughput.computing_s(tokens, blocks)
        old = self.correction.get(server.peer, new)
        self.correction[server.peer] = old + SMOOTHING * (new - old)

    def cost(self, server: ServerRecord, tokens: float, blocks: float) -> float:
        """Expected seconds until `server` has taken `tokens` more through so many blocks."""
        speed = server.throughput
        computing_s = speed.computing_s(tokens, blocks) + self.in_hand.get(server.peer, 0) / speed.batch
        return computing_s * self.correction.get(server.peer, 1.0) + speed.sending_s(tokens)
