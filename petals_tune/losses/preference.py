"""Preference losses: of pairs of answers to one prompt, of which the first was preferred.

Their inputs are log-probabilities of whole answers, sums over tokens: of the model that is trained, and of the one it
began as (the reference). Shapes: B pairs.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def dpo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """(B,) - (1 - e) log sigmoid(beta m) - e log sigmoid(-beta m), of log-probabilities (B,) of whole answers.

    m = (log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected)), and e the share of labels that
    are expected to be wrong. Source: Rafailov et al. 2023, arXiv:2305.18290, equation 7; e from its authors' code.
    """
    margin = beta * _margin(chosen, rejected, reference_chosen, reference_rejected)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def ipo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    *,
    beta: float = 0.1,
) -> torch.Tensor:
    """(B,) (m - 1 / (2 beta))^2, with m as in `dpo`. Source: Azar et al. 2023, arXiv:2310.12036, equation 17."""
    return (_margin(chosen, rejected, reference_chosen, reference_rejected) - 1 / (2 * beta)).square()


def _margin(
    chosen: torch.Tensor, rejected: torch.Tensor, reference_chosen: torch.Tensor, reference_rejected: torch.Tensor
) -> torch.Tensor:
    return (chosen - reference_chosen) - (rejected - reference_rejected)
