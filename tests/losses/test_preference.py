"""Preference losses against hand computations."""

import math

import pytest
import torch

from petals_tune.losses.preference import dpo, ipo

CHOSEN, REJECTED = torch.tensor([-4.0, -5.0]), torch.tensor([-6.0, -3.0])
REFERENCE = torch.tensor([-5.0, -5.0]), torch.tensor([-5.0, -5.0])
MARGINS = (2.0, -2.0)


def test_dpo():
    expected = [-math.log(1 / (1 + math.exp(-0.5 * margin))) for margin in MARGINS]
    assert dpo(CHOSEN, REJECTED, *REFERENCE, beta=0.5).tolist() == pytest.approx(expected)


def test_dpo_with_smoothed_labels():
    plain, turned = dpo(CHOSEN, REJECTED, *REFERENCE), dpo(REJECTED, CHOSEN, *REFERENCE)
    smooth = dpo(CHOSEN, REJECTED, *REFERENCE, label_smoothing=0.25)
    torch.testing.assert_close(smooth, 0.75 * plain + 0.25 * turned)


def test_dpo_at_the_reference_is_log_2():
    assert dpo(*REFERENCE, *REFERENCE).tolist() == pytest.approx([math.log(2)] * 2)


def test_ipo():
    assert ipo(CHOSEN, REJECTED, *REFERENCE, beta=0.25).tolist() == pytest.approx([(m - 2) ** 2 for m in MARGINS])
