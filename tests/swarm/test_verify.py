"""Spot checks: which work is checked, how far honest answers are apart, and who is outvoted.

Whole checks, over servers of which one lies, are in tests/faults/test_liars.py.
"""

import pytest
import torch

from petals_tune.swarm.verify import COMPUTED, Answer, Deviation, choose_outvoted, deviation, is_selected, tolerance
from petals_tune.wire.span import BlockSpan
from petals_tune.wire.tensors import WIRE_FORMATS, as_received

SPAN = BlockSpan(3, 6)


def answer(*values: float) -> Answer:
    return Answer(servers=(), tensors=(torch.tensor(values),))


def test_the_share_that_is_checked_is_the_one_that_was_asked_for_and_follows_from_the_seed():
    inputs = torch.randn(4000, 1, 8, 40, generator=torch.Generator().manual_seed(0))
    inputs[:, :, :7] = 1.0  # all texts begin alike

    def chosen(seed: int, share: float, kind: str = "forward") -> list[bool]:
        return [is_selected(share, seed=seed, kind=kind, span=SPAN, hidden=hidden) for hidden in inputs]

    assert sum(chosen(0, 0.02)) == pytest.approx(80, abs=30)
    assert chosen(0, 0.02) == chosen(0, 0.02)
    assert chosen(0, 0.02) != chosen(1, 0.02)
    assert chosen(0, 0.02) != chosen(0, 0.02, "backward")
    assert not any(chosen(0, 0.0))
    assert all(chosen(0, 1.0))


def test_a_third_answer_tells_who_is_wrong_or_that_nobody_knows():
    good, bad, worse = answer(1.0, 2.0), answer(1.01, 2.02), answer(9.0, 9.0)
    close, wide = Deviation(largest=1e-3, typical=1e-3), Deviation(largest=6e-3, typical=6e-3)
    assert choose_outvoted(bad, good, good, close) is bad
    assert choose_outvoted(good, bad, good, close) is bad
    assert choose_outvoted(good, bad, worse, close) is None
    assert choose_outvoted(good, bad, answer(1.005, 2.01), wide) is None, "the third one agrees with both"


def rounded(values: torch.Tensor, wire_format: str) -> Answer:
    return Answer(servers=(), tensors=(as_received(values, wire_format),))


@pytest.fixture
def hidden() -> torch.Tensor:
    """Like those of a language model: two values outweigh all others together."""
    drawn = torch.randn(2, 32, 96, generator=torch.Generator().manual_seed(0))
    drawn[:, 0, 7] = torch.tensor([900.0, 700.0])
    return drawn


@pytest.mark.parametrize("wire_format", WIRE_FORMATS)
@pytest.mark.parametrize("dtype", COMPUTED)
def test_honest_answers_are_within_the_tolerance_of_every_format(hidden, dtype, wire_format):
    norms = hidden.norm(dim=-1, keepdim=True)
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)) * norms / hidden.shape[-1] ** 0.5
    other = hidden + 0.5 * COMPUTED[dtype] * noise
    apart = deviation(rounded(hidden, wire_format), rounded(other, wire_format))
    assert apart.within(tolerance(dtype, [wire_format])), apart


@pytest.mark.parametrize("wire_format", WIRE_FORMATS)
def test_a_lie_of_one_in_a_hundred_is_beyond_the_tolerance_of_every_format(hidden, wire_format):
    apart = deviation(rounded(hidden * 1.01, wire_format), rounded(hidden, wire_format))
    assert apart.typical == pytest.approx(0.01, rel=0.1)
    assert not apart.within(tolerance("float32", [wire_format])), apart


def test_a_lie_about_few_positions_shows_in_the_largest_error_and_no_gradient_is_no_deviation(hidden):
    lie = hidden.clone()
    lie[0, 0] *= 1.1
    apart = deviation(rounded(lie, "float32"), rounded(hidden, "float32"))
    assert apart.largest == pytest.approx(0.1)
    assert apart.typical == 0
    nothing = torch.zeros(1, 3, 4)
    assert deviation(rounded(nothing, "float32"), rounded(nothing, "float32")) == Deviation(largest=0.0, typical=0.0)
    assert deviation(rounded(nothing + 1e-3, "float32"), rounded(nothing, "float32")).typical > 1
