"""The number of drafts follows the measured times and the acceptance."""

from __future__ import annotations

import random

import pytest

from petals_tune.remote.speculative.length import LONGEST_GAP, MOST_DRAFTS, DraftLength, LatestDraft


def simulated(*, rate: float, base_s: float, slope_s: float, draft_s: float, steps: int, noise: float = 0.0):
    """Steps on a line with these times, with drafts of this acceptance: the lengths chosen, tokens and seconds."""
    length, chosen, tokens, seconds = DraftLength(), [], 0, 0.0
    draw = random.Random(0)
    for _ in range(steps):
        count = length.choose("made", 100)
        right = next((number for number in range(count) if draw.random() >= rate), count)
        step_s = (base_s + slope_s * (count + 1)) * (1 + noise * draw.uniform(-1, 1))
        length.step.observe(count + 1, step_s)
        if count:
            length.observe_drafting(count, count * draft_s)
            length.observe_drafts("made", right, rejected=right < count)
        chosen.append(count)
        tokens += right + 1
        seconds += step_s + count * draft_s
    return chosen, tokens / seconds


def best(*, rate: float, base_s: float, slope_s: float, draft_s: float) -> tuple[int, float]:
    """The best constant length, and its tokens a second, by the formula of Leviathan et al., theorem 3.8."""

    def speed(count: int) -> float:
        tokens = (1 - rate ** (count + 1)) / (1 - rate)
        return tokens / (base_s + slope_s * (count + 1) + count * draft_s)

    count = max(range(MOST_DRAFTS + 1), key=speed)
    return count, speed(count)


SLOW = {"base_s": 0.1, "slope_s": 0.004, "draft_s": 0.005}


@pytest.mark.parametrize("rate", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_on_a_slow_line_it_comes_near_the_best_length(rate, noise):
    chosen, speed = simulated(rate=rate, **SLOW, steps=400, noise=noise)
    count, most = best(rate=rate, **SLOW)
    later = sorted(chosen[50:])
    assert abs(later[len(later) // 2] - count) <= 2
    assert speed > 0.9 * most


def test_a_longer_line_and_a_better_draft_mean_more_drafts():
    def count(rate: float, base_s: float) -> int:
        return sorted(simulated(rate=rate, base_s=base_s, slope_s=0.004, draft_s=0.005, steps=200)[0])[100]

    assert count(0.3, 0.1) < count(0.6, 0.1) < count(0.9, 0.1)
    assert count(0.6, 0.02) < count(0.6, 0.2)


@pytest.mark.parametrize(
    "times",
    [
        {"rate": 0.6, "base_s": 0.003, "slope_s": 0.001, "draft_s": 0.005},  # loopback, and a draft as slow as a step
        {"rate": 0.0, "base_s": 0.1, "slope_s": 0.004, "draft_s": 0.005},
    ],
)
def test_where_no_draft_pays_there_is_a_trial_now_and_then(times):
    chosen, speed = simulated(**times, steps=1000)
    plain = 1 / (times["base_s"] + times["slope_s"])
    tried = [number for number, count in enumerate(chosen) if count and number > 50]
    assert speed > 0.97 * plain
    assert all(chosen[number] == 1 for number in tried)
    assert 2 <= len(tried) <= 1000 / LONGEST_GAP + 3


def test_a_line_that_gets_slow_is_noticed():
    length = DraftLength()
    for base_s, expected in ((0.002, 0), (0.1, 2)):
        for _ in range(100):
            count = length.choose("made", 100)
            length.step.observe(count + 1, base_s + 0.002 * (count + 1))
            if count:
                length.observe_drafting(count, count * 0.01)
                length.observe_drafts("made", min(count, 1), rejected=count > 1)
        assert min(length.choose("made", 100), 2) == expected


def test_a_step_that_was_disturbed_changes_little():
    length = DraftLength()
    for count in (1, 4, 1, 4, 1):
        length.step.observe(count, 0.1 + 0.004 * count)
    before = length.step.predict(4)
    length.step.observe(4, 100.0)
    assert length.step.predict(4) < 2 * before


def test_each_kind_of_drafts_has_its_own_acceptance():
    length = DraftLength()
    length.step.observe(1, 0.1)
    for _ in range(50):
        length.observe_drafts("good", 3, rejected=False)
        length.observe_drafts("bad", 0, rejected=True)
    assert length.choose("good", 100) > 8
    assert length.choose("bad", 100) <= 1
    assert length.choose("good", 2) == 2
    assert length.choose("good", 0) == 0


def test_a_draft_model_that_reads_the_text_first_is_not_taken_for_slow():
    length = DraftLength()
    length.observe_drafting(4, 2.0, catches_up=True)
    assert length.draft_s is None
    length.observe_drafting(4, 0.04)
    length.observe_drafting(4, 2.0, catches_up=True)
    assert length.draft_s == pytest.approx(0.01)
    for _ in range(50):
        length.observe_drafting(1, 0.005, catches_up=True)  # it got faster meanwhile
    assert length.draft_s == pytest.approx(0.005, rel=0.01)


def test_what_was_measured_serves_later_calls_with_the_same_draft():
    latest = LatestDraft()
    first = latest.length_for("lookup")
    assert latest.length_for("lookup") is first
    assert latest.length_for("another") is not first
    assert latest.length_for("lookup") is not first


def test_the_first_step_has_no_drafts():
    assert DraftLength().choose("made", 100) == 0
