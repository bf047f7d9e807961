"""A recipe over a local swarm against plain transformers + PEFT in one process: same seed, data and steps.

    python tests/benchmarks/parity.py recipe=sst2 [key=value ...] [--picture curves.png]

Runs the recipe in this process in float32, then over two server processes with float32 blocks and with int8 blocks, and
compares the validation metrics before and after, and the training loss of every step. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Two threads that wait for each other are slower than one where other processes want the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from petals_tune.cli import report_errors
from petals_tune.config import composed
from petals_tune.train.curves import read_metrics
from petals_tune.train.objective import load_model
from petals_tune.train.parts import Parts
from petals_tune.train.run import remote_model, run

PLAIN = "in-process, float32"
SIDES = {
    PLAIN: [],
    "swarm, float32 blocks": ["swarm.quantization=none"],
    "swarm, int8 blocks": ["swarm.quantization=int8"],
}


@contextmanager
def local_model(parts: Parts) -> Iterator[PreTrainedModel]:
    model = load_model(
        parts.objective, parts.source, causal_lm=AutoModelForCausalLM, classifier=AutoModelForSequenceClassification
    )
    yield model.requires_grad_(False).eval()


def print_losses(losses: dict[str, list[float]], *, rows: int = 10) -> None:
    """The training loss of about so many steps, and how far each side is from the plain one over all of them."""
    steps = len(losses[PLAIN])
    print(f"\n{'step':<6}" + "".join(f"{side:>24}" for side in losses))
    for step in range(0, steps, max(1, steps // rows)):
        print(f"{step + 1:<6}" + "".join(f"{values[step]:>24.6f}" for values in losses.values()))
    for side in list(losses)[1:]:
        print(f"{side}: the loss of a step differs by {largest_difference(losses, side):.6f} at most")


def largest_difference(losses: dict[str, list[float]], side: str) -> float:
    return max(abs(one - other) for one, other in zip(losses[side], losses[PLAIN], strict=True))


def draw_losses(losses: dict[str, list[float]], picture: Path, *, title: str) -> None:
    """The losses side by side, and below them their distance from the plain ones."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    curves, distances = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for (side, values), style in zip(losses.items(), ("-", "--", ":"), strict=True):
        steps = range(1, len(values) + 1)
        curves.plot(steps, values, style, label=side, linewidth=2)
        if side != PLAIN:
            apart = [abs(one - other) for one, other in zip(values, losses[PLAIN], strict=True)]
            distances.plot(steps, apart, ".", color=curves.lines[-1].get_color(), linewidth=2)
    curves.set_ylabel("training loss (nats)")
    curves.legend(frameon=False)
    distances.set_yscale("log")
    distances.set_ylabel("distance from in-process")
    distances.set_xlabel("optimizer steps")
    for panel in (curves, distances):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(picture, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", help="as of python -m petals_tune")
    parser.add_argument("--picture", type=Path, help="draw the training losses there")
    asked = parser.parse_args()
    measured, minutes, losses = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder, report_errors():
        for side, overrides in SIDES.items():
            out = Path(folder, side)
            arguments = [*asked.overrides, *overrides, "logger=csv", f"output_dir='{out}'"]
            started_s = time.monotonic()
            print(f"--- {side}", flush=True)
            measured[side] = run(composed(arguments), remote_model if overrides else local_model)
            minutes[side] = (time.monotonic() - started_s) / 60
            losses[side] = [loss for _, loss in read_metrics(out / "metrics.csv")["train/loss"]]
    first = measured[PLAIN]
    metrics = list(first["after"])
    print(f"\n{'':<24}" + "".join(f"{f'{name} before':>20}{f'{name} after':>20}" for name in metrics) + f"{'min':>8}")
    for side, values in measured.items():
        cells = "".join(f"{values['before'][name]:>20.5f}{values['after'][name]:>20.5f}" for name in metrics)
        print(f"{side:<24}{cells}{minutes[side]:>8.1f}")
    differences = {
        side: {name: abs(values["after"][name] - first["after"][name]) for name in metrics}
        for side, values in measured.items()
    }
    print_losses(losses)
    if asked.picture:
        draw_losses(losses, asked.picture, title=" ".join(asked.overrides[:1]))
    found = {"arguments": asked.overrides, "measured": measured, "difference_after": differences, "train_loss": losses}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
