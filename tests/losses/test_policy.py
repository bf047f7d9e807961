"""Policy losses against hand computations, their gradients against those of the formulas."""

import math

import pytest
import torch

from petals_tune.errors import ConfigError
from petals_tune.losses import LOSSES
from tests.raising import raises

# Two sampled tokens behind a prompt token: ratios 2 (above 1.2), 0.5 (below 0.8) and 1.
RATIOS = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
SAMPLED = torch.tensor([-0.7, -1.0, -2.0], dtype=torch.float64)
ADVANTAGES = torch.tensor([0.0, 3.0, -1.0], dtype=torch.float64)
INPUTS = {"logprobs": SAMPLED, "advantages": ADVANTAGES}


def result(name, inputs=INPUTS, ratios=RATIOS, **options):
    """The loss, and its gradient at the log-probabilities."""
    logprobs = (inputs["logprobs"] + ratios.log()).requires_grad_()
    loss = LOSSES[name](logprobs, inputs, options)
    (grad,) = torch.autograd.grad(loss, logprobs)
    return loss.item(), grad.tolist()


def test_importance_sampling():
    loss, grad = result("importance_sampling")
    assert loss == pytest.approx(-(2 * 3 - 0.5))
    assert grad == pytest.approx([0, -6, 0.5])


def test_ppo_takes_the_smaller_of_both():
    # 2 x 3 is clipped to 1.2 x 3, without a gradient; 0.5 x -1 against 0.8 x -1: the smaller one is clipped too.
    loss, grad = result("ppo")
    assert loss == pytest.approx(-(1.2 * 3 - 0.8))
    assert grad == pytest.approx([0, 0, 0])


def test_ppo_keeps_the_gradient_of_what_gets_worse():
    # A ratio of 2 with a negative advantage: min(-2, -1.2) is the unclipped one.
    inputs = {"logprobs": SAMPLED, "advantages": -ADVANTAGES}
    loss, grad = result("ppo", inputs)
    assert loss == pytest.approx(-(-6 + 0.5))
    assert grad == pytest.approx([0, 6, -0.5])


def test_ppo_with_thresholds_of_its_own():
    assert result("ppo", clip_low_threshold=0.1, clip_high_threshold=3.0) == result("importance_sampling")


def test_cispo_clips_the_weight_and_keeps_the_gradient():
    loss, grad = result("cispo")
    logprobs = (SAMPLED + RATIOS.log()).tolist()
    assert loss == pytest.approx(-(1.2 * 3 * logprobs[1] + 0.8 * -1 * logprobs[2]))
    assert grad == pytest.approx([0, -3.6, 0.8])


def test_dro():
    loss, grad = result("dro", beta=0.5)
    logs = [0.0, math.log(2), -math.log(2)]
    logprobs = (SAMPLED + RATIOS.log()).tolist()
    assert loss == pytest.approx(-(3 * logprobs[1] - logprobs[2] - 0.25 * sum(x * x for x in logs)))
    assert grad == pytest.approx([0, -3 + 0.5 * logs[1], 1 + 0.5 * logs[2]])


def test_gspo_has_one_ratio_for_the_sampled_tokens():
    # log ratios log 2 and log 1/2: their mean is 0, the ratio 1, and nothing is clipped.
    loss, grad = result("gspo")
    assert loss == pytest.approx(-(3 - 1))
    assert grad == pytest.approx([0, -3, 1])
    # With ratios 2 and 2 it is 2: clipped for the advantage 3, not for -1.
    loss, grad = result("gspo", ratios=torch.tensor([5.0, 2.0, 2.0], dtype=torch.float64))
    assert loss == pytest.approx(-(1.2 * 3 - 2))
    assert grad == pytest.approx([0, 0, 2])


def test_gspo_takes_its_mask_over_the_advantages():
    mask = torch.tensor([0.0, 1.0, 0.0])
    loss, grad = result("gspo", INPUTS | {"sequence_ratio_mask": mask}, clip_high_threshold=9.0)
    assert loss == pytest.approx(-2 * 3)
    assert grad == pytest.approx([0, -6, 0])


def test_gspo_without_an_advantage_is_0():
    inputs = {"logprobs": SAMPLED, "advantages": torch.zeros(3)}
    assert result("gspo", inputs) == (0, [0, 0, 0])
    with raises(ConfigError, key="sequence_ratio_mask"):
        result("gspo", inputs | {"sequence_ratio_mask": torch.zeros(3)})


@pytest.mark.parametrize("name", ["ppo", "cispo", "gspo"])
def test_thresholds_that_cross_are_refused(name):
    with raises(ConfigError, key="clip_low_threshold", seen=1.5):
        result(name, clip_low_threshold=1.5)
