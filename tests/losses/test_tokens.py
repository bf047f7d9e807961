"""Cross entropy against the library's, and the surrogate of a gradient."""

import torch
from torch.nn import functional as F

from petals_tune.losses import LOSSES
from petals_tune.losses.tokens import surrogate


def test_cross_entropy_is_the_librarys_with_weights():
    torch.manual_seed(0)
    logits, targets = torch.randn(5, 7), torch.tensor([0, 3, 6, 1, 1])
    weights = torch.tensor([0.0, 1.0, 0.5, -2.0, 1.0])
    logprobs = logits.log_softmax(-1).gather(1, targets[:, None]).flatten()
    each = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(LOSSES["cross_entropy"](logprobs, {"weights": weights}), (weights * each).sum())


def test_surrogate_has_the_gradient_that_it_is_given():
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)

    def custom(x):
        return (x.exp() * x).sum()

    (gradient,) = torch.autograd.grad(custom(logprobs), logprobs)
    (found,) = torch.autograd.grad(surrogate(logprobs, gradient), logprobs)
    assert torch.equal(found, gradient)
