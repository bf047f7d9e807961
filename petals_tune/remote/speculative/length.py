"""The number of tokens to draft: the one with the most tokens a second, by what this client measures meanwhile."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

MOST_DRAFTS = 16
FIRST_GAP, LONGEST_GAP = 4, 128  # steps between two trials of a kind of drafts that does not pay
_KEPT = 0.95  # weight of an observation after each later one
_SLOWEST = 3.0  # a step that takes so many times as long as expected was disturbed: a lost server, a busy machine


@dataclass
class StepTime:
    """Seconds of a step of n positions, `base_s + n * slope_s`: a line through the latest steps.

    The base has the round trips; the slope is what a further position costs. Where all steps had the same length, the
    slope stays what it was.
    """

    base_s: float = 0.0
    slope_s: float = 0.0
    _weight: float = 0.0
    _positions: float = 0.0  # means, and central moments
    _seconds: float = 0.0
    _variance: float = 0.0
    _covariance: float = 0.0

    @property
    def is_known(self) -> bool:
        return self._weight > 0

    def predict(self, positions: int) -> float:
        """Return the seconds of a step of so many positions."""
        return self.base_s + self.slope_s * positions

    def observe(self, positions: int, seconds: float) -> None:
        """Take in a step that took so long."""
        if not self.is_known:
            self.slope_s = seconds / 16  # a guess that one longer step corrects
        else:
            seconds = min(seconds, _SLOWEST * self.predict(positions))
        before = _KEPT * self._weight
        self._weight = before + 1
        from_positions, from_seconds = positions - self._positions, seconds - self._seconds
        self._positions += from_positions / self._weight
        self._seconds += from_seconds / self._weight
        share = before / self._weight
        self._variance = _KEPT * self._variance + share * from_positions**2
        self._covariance = _KEPT * self._covariance + share * from_positions * from_seconds
        # Ridge regression towards the slope so far, with the weight of one pair of steps.
        self.slope_s = max(0.0, (self._covariance + self.slope_s) / (self._variance + 1))
        self.slope_s = min(self.slope_s, 0.9 * self._seconds / max(self._positions, 1.0))
        self.base_s = self._seconds - self.slope_s * self._positions


@dataclass
class Acceptance:
    """How often the next token is the drafted one: a running rate, which begins at one half."""

    accepted: float = 1.0
    tried: float = 2.0
    gap: int = FIRST_GAP  # steps to the next trial, where drafts do not pay
    idle: int = 0  # steps without drafts

    @property
    def rate(self) -> float:
        return self.accepted / self.tried

    def observe(self, accepted: int, *, rejected: bool) -> None:
        """Take in a step of which so many drafts were right, and after them one wrong, or none was tried."""
        for right in [1] * accepted + [0] * rejected:
            self.accepted, self.tried = _KEPT * self.accepted + right, _KEPT * self.tried + 1


@dataclass
class DraftLength:
    """Chooses how many tokens to draft, for each kind of drafts (such as the length of a match) by its own acceptance.

    With rate a, k drafts give 1 + a + ... + a^k tokens on average, in the time of a step of k + 1 positions and of k
    drafts. The k with the most tokens a second is chosen; 0 where no draft pays, with a trial now and then.
    Source: Leviathan et al. 2023, arXiv:2211.17192, section 3.2.
    """

    step: StepTime = field(default_factory=StepTime)
    draft_s: float | None = None  # of one token; None: not measured yet
    acceptance: dict[Hashable, Acceptance] = field(default_factory=dict)

    def choose(self, kind: Hashable, most: int) -> int:
        """Return how many tokens to draft, `most` at the most."""
        most = min(most, MOST_DRAFTS)
        if most < 1 or not self.step.is_known:  # the first step is one token, and is measured
            return 0
        of_kind = self.acceptance.setdefault(kind, Acceptance())
        best = max(range(most + 1), key=lambda count: self.tokens_per_s(of_kind.rate, count))
        if best:
            of_kind.gap, of_kind.idle = FIRST_GAP, 0
            return best
        of_kind.idle += 1
        if of_kind.idle < of_kind.gap:
            return 0
        of_kind.gap, of_kind.idle = min(2 * of_kind.gap, LONGEST_GAP), 0
        return 1

    def tokens_per_s(self, rate: float, count: int) -> float:
        """Return the tokens a second that are expected of steps with `count` drafts of acceptance `rate`."""
        tokens = sum(rate**number for number in range(count + 1))
        return tokens / (self.step.predict(count + 1) + count * (self.draft_s or 0.0))

    def observe_drafting(self, count: int, seconds: float, *, catches_up: bool = False) -> None:
        """Take in that `count` tokens were drafted in `seconds`.

        catches_up: the draft model read more of the text first than the last few tokens; that counts as a bound alone
        """
        each_s = seconds / count
        if catches_up and (self.draft_s is None or each_s > self.draft_s):
            return
        self.draft_s = each_s if self.draft_s is None else self.draft_s + 0.2 * (each_s - self.draft_s)

    def observe_drafts(self, kind: Hashable, accepted: int, *, rejected: bool) -> None:
        """Take in what became of the drafts of one step."""
        self.acceptance.setdefault(kind, Acceptance()).observe(accepted, rejected=rejected)


@dataclass
class LatestDraft:
    """What was measured with a model's latest draft, which serves the next calls of generate() with the same one."""

    given: Any = None
    length: DraftLength = field(default_factory=DraftLength)

    def length_for(self, given: Any) -> DraftLength:
        """Return what is known of the draft `given`; nothing, where the latest was another one."""
        if self.given != given:
            self.given, self.length = given, DraftLength()
        return self.length
