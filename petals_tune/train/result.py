"""Figures of a run, for its last line, the adapter's model card, result.json, and a sweep's table."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from petals_tune.files import write_json

FILE = "result.json"

StageMetrics = dict[str, dict[str, float]]  # "zero_shot", "before", "after" -> metric -> value


@dataclass(kw_only=True)
class Result:
    """Figures of one run, set as they become known."""

    name: str
    base: str  # the base model, as the configuration names it
    data: str  # the data and its splits, in one line
    headline: str  # the main metric of the run's objective
    seed: int
    data_digest: str = ""  # SHA-256 of the data's content
    rows: dict[str, Any] = field(default_factory=dict)  # split -> rows in the data, used, and left out by reason
    blocks: str = "on this machine"  # where and how the frozen blocks ran
    started_from: str | None = None  # adapter that the training started from
    steps: int = 0
    exported: str = ""  # which step's tensors the adapter has
    trained_parameters: int = 0
    parameters: int = 0
    measured: StageMetrics = field(default_factory=dict)
    minutes: float = 0.0
    tokens: int = 0  # of training steps, without padding
    tokens_per_s: float = 0.0  # of these
    sent_mb: float = 0.0
    received_mb: float = 0.0
    retries: int = 0
    formats: str = ""  # wire formats of training, where they were chosen by the measured line, and why
    adapter_bytes: int = 0

    def save(self, folder: Path) -> None:
        write_json(folder / FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Result:
        """Read a saved result; a metric that is null there, since it was not finite, is NaN."""
        result = cls(**json.loads((folder / FILE).read_text(encoding="utf-8")))
        for metrics in result.measured.values():
            metrics.update({name: math.nan for name, value in metrics.items() if value is None})
        return result

    @property
    def trained_share(self) -> str:
        return f"{self.trained_parameters:,} of {self.parameters:,} parameters"

    def format_summary(self) -> str:
        """Format the main metric and the loss, before -> after, with time, traffic and parameters, in one line."""
        before, after = self.measured["before"], self.measured["after"]
        metrics = [f"{name} {before[name]:.3f} -> {after[name]:.3f}" for name in (self.headline, "loss")]
        if zero_shot := self.measured.get("zero_shot"):
            metrics.append(f"zero-shot {self.headline} {zero_shot[self.headline]:.3f}")
        return (
            f"{', '.join(metrics)} in {self.minutes:.1f} min; {self.tokens_per_s:.0f} tokens/s; "
            f"sent {self.sent_mb:.0f} MB, received {self.received_mb:.0f} MB; trained {self.trained_share}"
        )


def format_metrics(metrics: dict[str, float]) -> str:
    """Format metrics as `loss 3.909  perplexity 49.826`."""
    return "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
