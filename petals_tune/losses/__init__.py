"""Losses of texts by the log-probabilities that a model gives their tokens, by name."""

from __future__ import annotations

from petals_tune.losses.base import Loss
from petals_tune.losses.policy import CISPO, DRO, GSPO, PPO, ImportanceSampling
from petals_tune.losses.tokens import CrossEntropy

LOSSES: dict[str, Loss] = {
    loss.name: loss for loss in (CrossEntropy(), ImportanceSampling(), PPO(), CISPO(), DRO(), GSPO())
}
