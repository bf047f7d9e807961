"""Plot of a run's learning curves."""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from petals_tune.files import replacing

UNITS = {"loss": "loss (nats per learned token)", "accuracy": "accuracy (share of rows)"}
LABELS = {"train": "training batches", "val": "validation", "zero_shot": "zero-shot, nothing trained"}


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Read a metrics.csv as metric -> (step, value) points."""
    points: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    points.setdefault(name, []).append((int(row["step"]), float(value)))
    return points


def draw_curves(metrics: Path, picture: Path, *, title: str) -> None:
    """Plot training and validation metrics over the steps, with one panel for each kind of metric."""
    points = read_metrics(metrics)
    kinds = [kind for kind in UNITS if f"val/{kind}" in points]
    if not kinds:  # a run that goes on, stopped before its first validation
        return
    # Figure, not pyplot, which would look for a display and keep the figure open.
    figure = Figure(figsize=(8, 1.2 + 3.2 * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), sharex=True, squeeze=False)[:, 0]
    for panel, kind in zip(panels, kinds, strict=True):
        _plot_kind(panel, kind, points)
    panels[0].legend(frameon=False)
    panels[-1].set_xlabel("optimizer steps")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title)
    with replacing(picture) as partial:
        figure.savefig(partial, dpi=120)


def _plot_kind(panel: Axes, kind: str, points: dict[str, list[tuple[int, float]]]) -> None:
    if train := points.get(f"train/{kind}"):
        steps, values = zip(*train, strict=True)
        panel.plot(steps, values, color="tab:blue", alpha=0.35, linewidth=1, label=LABELS["train"])
        panel.plot(steps, _smooth(values), color="tab:blue", linewidth=1.5, label=f"{LABELS['train']}, smoothed")
    steps, values = zip(*points[f"val/{kind}"], strict=True)
    panel.plot(steps, values, color="tab:orange", marker="o", label=LABELS["val"])
    if zero_shot := points.get(f"zero_shot/{kind}"):
        panel.axhline(zero_shot[-1][1], color="tab:gray", linestyle="--", label=LABELS["zero_shot"])
    panel.set_ylabel(UNITS[kind])
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def _smooth(values: tuple[float, ...], *, keep: float = 0.85) -> list[float]:
    """Return the exponential moving average, bias-corrected for the first values."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(total / weight)
    return smoothed
