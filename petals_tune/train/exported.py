"""Choice of the tensors that a run exports: the best checkpoint by a monitored metric, or else the last step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The step that exported tensors are of."""

    step: int
    best_of: str | None = None  # the metric that it is the best by; None: it is the last step

    def describe(self) -> str:
        if self.best_of is None:
            return f"step {self.step}, the last"
        return f"step {self.step}, the best kept checkpoint by {self.best_of}"


def best_checkpoint(trainer: Trainer) -> tuple[Exported, dict[str, Any]] | None:
    """Read the best checkpoint of the first `ModelCheckpoint` that monitors a metric; None where there is none."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
            checkpoint = trainer.strategy.load_checkpoint(callback.best_model_path, weights_only=True)
            value = callback.best_model_score
            score = "" if value is None else f" ({value:.4f})"
            return Exported(step=checkpoint["global_step"], best_of=f"{callback.monitor}{score}"), checkpoint
    return None
