"""A recipe over a local swarm against plain transformers + PEFT in one process: same seed, data and steps.

    python tests/benchmarks/parity.py recipe=sst2 [key=value ...]

Runs the recipe in this process in float32, then over two server processes with float32 blocks and with int8 blocks, and
compares the validation metrics before and after. The last line is JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Two threads that wait for each other are slower than one where other processes want the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from petals_tune.cli import errors_reported
from petals_tune.config import composed
from petals_tune.train.objective import load_model
from petals_tune.train.parts import Parts
from petals_tune.train.run import remote_model, run

SIDES = {
    "in-process, float32": [],
    "swarm, float32 blocks": ["swarm.quantization=none"],
    "swarm, int8 blocks": ["swarm.quantization=int8"],
}


@contextmanager
def local_model(parts: Parts) -> Iterator[PreTrainedModel]:
    model = load_model(
        parts.objective, parts.source, causal_lm=AutoModelForCausalLM, classifier=AutoModelForSequenceClassification
    )
    yield model.requires_grad_(False).eval()


def main() -> None:
    measured, minutes = {}, {}
    with tempfile.TemporaryDirectory() as folder, errors_reported():
        for side, overrides in SIDES.items():
            out = Path(folder, side)
            arguments = [*sys.argv[1:], *overrides, "logger=csv", f"output_dir='{out}'"]
            started_s = time.monotonic()
            print(f"--- {side}", flush=True)
            measured[side] = run(composed(arguments), remote_model if overrides else local_model)
            minutes[side] = (time.monotonic() - started_s) / 60
    first = measured["in-process, float32"]
    metrics = list(first["after"])
    print(f"\n{'':<24}" + "".join(f"{f'{name} before':>20}{f'{name} after':>20}" for name in metrics) + f"{'min':>8}")
    for side, values in measured.items():
        cells = "".join(f"{values['before'][name]:>20.5f}{values['after'][name]:>20.5f}" for name in metrics)
        print(f"{side:<24}{cells}{minutes[side]:>8.1f}")
    differences = {
        side: {name: abs(values["after"][name] - first["after"][name]) for name in metrics}
        for side, values in measured.items()
    }
    print(json.dumps({"arguments": sys.argv[1:], "measured": measured, "difference_after": differences}))


if __name__ == "__main__":
    main()
