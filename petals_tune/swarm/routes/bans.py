"""Servers that a client passes over for a while. Pure: the clock is an argument."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

FIRST_BAN_S = 5.0  # a server that restarts under its address is back in about this time
LONGEST_BAN_S = 60.0  # reconnect attempts are cheap
OFFENCE_S = 3600.0  # wrong numbers do not come from a bad line
NOT_FINITE_S = 60.0  # NaN may be the request's own doing: the second server that it goes to will tell


@dataclass
class Bans:
    """Servers to pass over.

    One that failed is passed over for a while, longer with each ban in a row. Then it is `doubtful`, and stays passed
    over until a connection to it was opened, for which no work waits. One that returned NaN stays out for NOT_FINITE_S,
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
        return self.wrong(now_s) | self.until_s.keys()

    def wrong(self, now_s: float) -> frozenset[str]:
        """Those that returned numbers that were not finite or cannot be right: asked after those that only failed."""
        return self.offenders(now_s) | _later(self.not_finite_until_s, now_s)

    def doubtful(self, now_s: float) -> frozenset[str]:
        """Those whose ban has ended, and who were not reached since."""
        return frozenset(peer for peer, until in self.until_s.items() if until <= now_s)

    def offenders(self, now_s: float) -> frozenset[str]:
        """Those whom not even the lack of any other server brings back."""
        return _later(self.offended_until_s, now_s)


def _later(until_s: dict[str, float], now_s: float) -> frozenset[str]:
    return frozenset(peer for peer, until in until_s.items() if until > now_s)
