"""Cross entropy."""

from __future__ import annotations

from typing import ClassVar

import torch

from petals_tune.losses.base import Inputs, Loss, Options


class CrossEntropy(Loss):
    """- sum_t w_t log p(y_t), in nats. A loss that is computed elsewhere has the gradient -w_t here (see `surrogate`).

    Source: the negative log-likelihood of Bishop 2006, equation 4.108, with a weight for each token.
    """

    name: ClassVar[str] = "cross_entropy"
    needs: ClassVar[tuple[str, ...]] = ("weights",)

    def of_text(self, logprobs: torch.Tensor, inputs: Inputs, options: Options) -> torch.Tensor:
        return -(inputs["weights"] * logprobs).sum()


def surrogate(logprobs: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A loss () whose gradient at `logprobs` (any shape) is `gradient`: of a loss that was computed somewhere else."""
    return (logprobs * gradient.to(logprobs).detach()).sum()
