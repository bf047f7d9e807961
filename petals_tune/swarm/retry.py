"""When to try again, and whom to leave alone meanwhile. Pure: the clock is an argument."""

from __future__ import annotations

from dataclasses import dataclass, field

from petals_tune.errors import PetalsTuneError, SwarmTimeout, UncoveredBlocks
from petals_tune.wire.records import ServerRecord

SMOOTHING = 0.3  # weight of the newest measurement
FIRST_BAN_S = 5.0  # a server that restarts under its address is back in about this time
LONGEST_BAN_S = 300.0


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How long work that does not move on is tried again."""

    timeout_s: float = 300.0  # without any server completing its part
    reply_s: float = 120.0  # for one server's answer; long, since a stopped server is noticed by its heartbeat
    connect_s: float = 10.0  # to open a stream
    uncovered_s: float = 30.0  # while nobody holds some of the blocks
    first_pause_s: float = 0.2
    longest_pause_s: float = 5.0

    def pause_s(self, attempt: int) -> float:
        """Seconds before attempt number `attempt` (0 is the first, which does not wait)."""
        return 0.0 if attempt == 0 else min(self.first_pause_s * 2 ** min(attempt - 1, 32), self.longest_pause_s)


@dataclass
class Bans:
    """Servers that failed lately. Each further failure in a row doubles the ban; an answer ends it."""

    until_s: dict[str, float] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)

    def failed(self, peer: str, now_s: float) -> None:
        count = self.failures[peer] = self.failures.get(peer, 0) + 1
        self.until_s[peer] = now_s + min(FIRST_BAN_S * 2 ** min(count - 1, 32), LONGEST_BAN_S)

    def answered(self, peer: str) -> None:
        self.failures.pop(peer, None)
        self.until_s.pop(peer, None)

    def active(self, now_s: float) -> frozenset[str]:
        return frozenset(peer for peer, until in self.until_s.items() if until > now_s)


@dataclass
class Attempts:
    """The attempts at one piece of work since it last moved on."""

    policy: RetryPolicy
    since_s: float
    count: int = 0

    def moved_on(self, now_s: float) -> None:
        self.since_s, self.count = now_s, 0

    def failed(self, error: PetalsTuneError, now_s: float) -> float:
        """Seconds to wait before the next attempt. Raises `error`, or SwarmTimeout, when there shall be none."""
        stuck_s = now_s - self.since_s
        if isinstance(error, UncoveredBlocks) and stuck_s >= self.policy.uncovered_s:
            raise error
        if stuck_s >= self.policy.timeout_s:
            raise SwarmTimeout(
                f"no server could do the work within swarm.timeout_s={self.policy.timeout_s:g} s "
                f"({self.count + 1} attempts); the last error: {error}"
            ) from error
        self.count += 1
        return self.policy.pause_s(self.count)


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
