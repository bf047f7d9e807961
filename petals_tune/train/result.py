"""What came out of a run, as figures: for its last lines, its adapter's card, result.json, and a sweep's table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from petals_tune.files import write_text

FILE = "result.json"

Measured = dict[str, dict[str, float]]  # "zero_shot", "before", "after" -> metric -> value


@dataclass(kw_only=True)
class Result:
    """Figures of one run, filled in as they become known."""

    name: str
    base: str  # model.source, as it was asked for
    data: str  # one line: which data, how it is split
    headline: str  # the metric that the run is judged by
    seed: int
    blocks: str = "on this machine"  # where and how the frozen blocks ran
    started_from: str | None = None  # an adapter
    steps: int = 0
    trained_parameters: int = 0
    parameters: int = 0
    measured: Measured = field(default_factory=dict)
    minutes: float = 0.0
    tokens_per_s: float = 0.0  # of the training steps, padding left out
    sent_mb: float = 0.0
    received_mb: float = 0.0
    retries: int = 0
    adapter_bytes: int = 0

    def save(self, folder: Path) -> None:
        write_text(folder / FILE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Result:
        return cls(**json.loads((folder / FILE).read_text(encoding="utf-8")))

    @property
    def trained_share(self) -> str:
        return f"{self.trained_parameters:,} of {self.parameters:,} parameters"

    def said(self) -> str:
        """All of it in a sentence: the headline metric and the loss, before -> after, and what that took."""
        before, after = self.measured["before"], self.measured["after"]
        learned = [f"{name} {before[name]:.3f} -> {after[name]:.3f}" for name in (self.headline, "loss")]
        if zero_shot := self.measured.get("zero_shot"):
            learned.append(f"zero-shot {self.headline} {zero_shot[self.headline]:.3f}")
        return (
            f"{', '.join(learned)} in {self.minutes:.1f} min; {self.tokens_per_s:.0f} tokens/s; "
            f"sent {self.sent_mb:.0f} MB, received {self.received_mb:.0f} MB; trained {self.trained_share}"
        )


def shown(metrics: dict[str, float]) -> str:
    """`loss 3.909  perplexity 49.826`."""
    return "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
