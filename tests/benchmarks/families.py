"""Parity of every tested decoder family with the plain library, as a table.

    python tests/benchmarks/families.py          # the families of tests/models.py
    python tests/benchmarks/families.py --all    # and the self-test of every causal LM that transformers knows

The last line is JSON. What it printed is kept in docs/families.md.
"""

import argparse
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the tests have the families

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from petals_tune.errors import UnsupportedModel
from petals_tune.model.families import family_of, placeholder_model
from petals_tune.remote.selftest import self_test
from tests.models import FAMILIES
from tests.parity import parity

COLUMNS = (
    "logits",
    "loss",
    "input gradient",
    "LoRA gradients",
    "hidden states",
    "classification",
    "tokens",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="try every causal LM of the library on a tiny model")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    print(f"transformers {versions['transformers']}, torch {versions['torch']}, float32\n")
    figures: dict[str, Any] = {"versions": versions, "families": measured()}
    if options.all:
        figures["self_test"] = tried()
    print(json.dumps(figures))


def measured() -> dict[str, dict[str, float]]:
    """Relative errors by family; printed as they come."""
    print(f"| family | {' | '.join(COLUMNS)} |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    found = {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            found[family] = figures = parity(family, Path(folder))
        cells = [f"{figures[name]:.0e}" if name in figures else "-" for name in COLUMNS[:-1]]
        print(f"| {family} | {' | '.join(cells)} | {figures['tokens']:.0%} |", flush=True)
    return found


def tried() -> dict[str, str]:
    """What the self-test says of each model type at its default config: "" where it passes."""
    verdicts = {}
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[model_type]()
            family_of(placeholder_model(config))
            self_test(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)
            verdicts[model_type] = ""
        except UnsupportedModel as error:
            verdicts[model_type] = str(error)
        except (
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:  # the library's, on its own default config
            verdicts[model_type] = f"no default config: {error}".splitlines()[0]
    passed = [name for name, verdict in verdicts.items() if not verdict]
    print(f"\n{len(passed)} of {len(verdicts)} causal LMs of the library pass at their default config:")
    print(", ".join(passed))
    print(f"\nNot: {', '.join(name for name in verdicts if verdicts[name])}\n")
    return verdicts


if __name__ == "__main__":
    main()
