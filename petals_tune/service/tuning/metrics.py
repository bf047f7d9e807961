"""Metrics of a run, read from the file that its trainer writes while it runs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "metrics.csv"
Curves = dict[str, list[tuple[int, float | None]]]

# Names in events, as OpenAI's clients know them.
_NAMES = {
    "train/loss": "train_loss",
    "train/lr": "learning_rate",
    "train/tokens_per_s": "tokens_per_s",
    "val/loss": "full_valid_loss",
    "val/perplexity": "valid_perplexity",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """Metrics that were logged together. `step`: as in the file, before a training step and after a validation."""

    step: int
    values: dict[str, float | None]  # None: not finite

    @property
    def steps_done(self) -> int:
        return self.step + ("train/loss" in self.values)

    @property
    def is_training(self) -> bool:
        return "train/loss" in self.values

    def event(self) -> dict[str, Any]:
        """The metrics of an event; those of the swarm are left to the curves."""
        known = {_NAMES[name]: value for name, value in self.values.items() if name in _NAMES}
        if "full_valid_loss" in known:
            known["valid_loss"] = known["full_valid_loss"]
        return {"step": self.steps_done, **known}


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file that may be written at this moment: a last line without its end is left out."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    whole = text[: text.rfind("\n") + 1]
    for row in csv.DictReader(io.StringIO(whole)):
        values = {name: _number(value) for name, value in row.items() if value and name not in ("step", "epoch")}
        if values and row.get("step"):
            yield Row(step=int(row["step"]), values=values)


def read_curves(path: Path) -> Curves:
    """Return the points (step, value) of each metric; a value that is not finite is None."""
    curves: Curves = {}
    for row in read_rows(path):
        for name, value in row.values.items():
            curves.setdefault(name, []).append((row.step, value))
    return curves


def _number(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None
