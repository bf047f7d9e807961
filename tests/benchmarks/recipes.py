"""Every recipe with several seeds, and its adapter measured again in batches of 1 and of 16 rows, as a table.

    python tests/benchmarks/recipes.py [--recipes sst2,sst2_head] [--seeds 0,1,2] [key=value ...]

Further arguments are options of every run. All runs share one local swarm of two int8 servers. The columns `by 1` and
`by 16` are the main metric after training by `petals_tune.evaluate`, whose batches have so many rows: they differ from
the run's own by rounding alone. The last line is JSON. The table is kept in docs/recipes.md; it takes about an hour.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

from petals_tune.config import composed, recipe_names
from petals_tune.evaluate import Evaluation
from petals_tune.files import replace_non_finite
from petals_tune.train.measure import evaluate_adapter
from petals_tune.train.result import Result
from petals_tune.train.run import run
from petals_tune.train.sweep import SharedSwarm

BATCH_ROWS = (1, 16)
COLUMNS = ("recipe", "seed", "metric", "zero-shot", "before", "after", "loss", "by 1", "by 16", "min", "tokens/s", "MB")
ROW = "{:<17}" + "{:>6}" + "{:>12}" + "{:>10}" * 9


def main() -> None:
    options = arguments()
    figures: dict[str, list[dict[str, Any]]] = {}
    swarm = SharedSwarm()
    print(ROW.format(*COLUMNS), flush=True)
    try:
        with tempfile.TemporaryDirectory() as kept:
            for recipe in options.recipes:
                for seed in options.seeds:
                    folder = Path(options.folder or kept, recipe, str(seed))
                    figures.setdefault(recipe, []).append(measure(recipe, seed, folder, options.overrides, swarm))
                    print(ROW.format(*format_row(recipe, seed, figures[recipe][-1])), flush=True)
                print(f"{recipe:<17}{format_spread(figures[recipe])}", flush=True)
    finally:
        swarm.close()
    print(json.dumps(replace_non_finite({"load_average": os.getloadavg(), "recipes": figures}), allow_nan=False))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipes", default=recipe_names(), type=lambda text: text.split(","))
    parser.add_argument("--seeds", default=[0, 1, 2], type=lambda text: [int(seed) for seed in text.split(",")])
    parser.add_argument("--folder", help="where the runs' folders and prints stay; by default nowhere")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options of every run")
    return parser.parse_args()


def measure(recipe: str, seed: int, folder: Path, overrides: list[str], swarm: SharedSwarm) -> dict[str, Any]:
    """Run a recipe, then evaluate its adapter by batches of other sizes; both print into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    given = [f"recipe={recipe}", f"seed={seed}", "logger=csv", *overrides]
    with (folder / "printed.txt").open("w") as printed, contextlib.redirect_stdout(printed):
        started_s = time.monotonic()
        run(composed([*given, f"output_dir='{folder / 'run'}'"]), swarm)
        run_s = time.monotonic() - started_s
        result = Result.load(folder / "run")
        again = {}
        for rows in BATCH_ROWS:
            where = [f"adapter='{folder / 'run' / 'adapter'}'", f"output_dir='{folder / f'by_{rows}'}'"]
            cfg = composed([*given, *where, f"data.batch_size={rows}"], config_name="evaluate")
            again[f"by {rows}"] = evaluate_adapter(cfg, swarm, schema=Evaluation)["adapter"]
    return {
        "metric": result.headline,
        "stages": {**result.measured, **again},
        "minutes": run_s / 60,
        "tokens_per_s": result.tokens_per_s,
        "megabytes": result.sent_mb + result.received_mb,
        "trained_parameters": result.trained_parameters,
        "adapter_bytes": result.adapter_bytes,
    }


def format_row(recipe: str, seed: int, figures: dict[str, Any]) -> list[str]:
    metric, stages = figures["metric"], figures["stages"]
    values = {name: f"{stages[name][metric]:.4f}" for name in stages}
    return [
        recipe,
        str(seed),
        metric,
        values.get("zero_shot", ""),
        values["before"],
        values["after"],
        f"{stages['after']['loss']:.4f}",
        *(values[f"by {rows}"] for rows in BATCH_ROWS),
        f"{figures['minutes']:.1f}",
        f"{figures['tokens_per_s']:.0f}",
        f"{figures['megabytes']:.0f}",
    ]


def format_spread(runs: list[dict[str, Any]]) -> str:
    """Format mean and standard deviation of the metric, and the largest relative difference that batches make."""
    metric = runs[0]["metric"]
    after = [run["stages"]["after"] for run in runs]
    values = [stage[metric] for stage in after]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    off = max(
        abs(run["stages"][f"by {rows}"]["loss"] / stage["loss"] - 1)
        for run, stage in zip(runs, after, strict=True)
        for rows in BATCH_ROWS
    )
    return f"  {metric} {statistics.mean(values):.4f} +- {spread:.4f}; batches of 1 and 16 change the loss by {off:.1e}"


if __name__ == "__main__":
    main()
