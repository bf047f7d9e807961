"""Parity of every tested decoder family with the plain library, as a table.

    python tests/benchmarks/families.py            # the families of tests/models.py
    python tests/benchmarks/families.py --all      # the self-test of every causal LM that transformers knows, and how
                                                   # much of its weights int8 leaves

The last line is JSON. What both printed is kept in docs/families.md.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from queue import Empty
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the tests have the families

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from petals_tune.blocks.memory import block_bytes
from petals_tune.blocks.quantization import find_scheme
from petals_tune.errors import UnsupportedModel
from petals_tune.model.families import CONFIG_ERRORS, family_of, placeholder_model
from petals_tune.model.nested import causal_class, config_for
from petals_tune.remote.selftest import self_test
from tests.models import FAMILIES, MORE_FAMILIES, NESTED
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
MOST_S = 90.0  # for one family
PASSED = "passes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="try every causal LM of the library on a tiny model")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    print(f"transformers {versions['transformers']}, torch {versions['torch']}, float32\n")
    found = {"self_test": tried()} if options.all else {"families": measured()}
    print(json.dumps({"versions": versions, **found}))


def measured() -> dict[str, dict[str, float]]:
    """Relative errors by family; printed as they come."""
    print(f"| family | {' | '.join(COLUMNS)} |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    found = {}
    for family in (*FAMILIES, *MORE_FAMILIES, *NESTED):
        with tempfile.TemporaryDirectory() as folder:
            found[family] = figures = parity(family, Path(folder))
        cells = [f"{figures[name]:.0e}" if name in figures else "-" for name in COLUMNS[:-1]]
        print(f"| {family} | {' | '.join(cells)} | {figures['tokens']:.0%} |", flush=True)
    return found


def tried() -> dict[str, dict[str, Any]]:
    """What the self-test says of each model type at its default config; printed as it comes."""
    verdicts: dict[str, dict[str, Any]] = {}
    print("| model type | self-test | int8 / float32 |\n|---|---|---|")
    for model_type in _model_types():
        verdicts[model_type] = found = _in_a_process(model_type)
        share = "-" if found["share"] is None else f"{found['share']:.2f}"
        print(f"| {model_type} | {found['verdict']} | {share} |", flush=True)
    passed = [name for name, found in verdicts.items() if found["verdict"] == PASSED]
    print(f"\n{len(passed)} of {len(verdicts)} model types pass\n")
    return verdicts


def _model_types() -> Iterator[str]:
    names = (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )
    yield from dict.fromkeys(name for mapping in names for name in mapping)


def _in_a_process(model_type: str) -> dict[str, Any]:
    """The verdict on a model type, by a process that ends after MOST_S."""
    forked = multiprocessing.get_context("fork")  # the library is imported already
    answer: Any = forked.Queue()
    process = forked.Process(target=_try, args=(model_type, answer))
    process.start()
    found: dict[str, Any] = {"verdict": f"no answer in {MOST_S:.0f} s", "share": None}
    stop_s = time.monotonic() + MOST_S
    while time.monotonic() < stop_s:
        ended = process.exitcode is not None
        try:
            found = answer.get(timeout=0.1)
            break
        except Empty:
            if ended:
                found["verdict"] = "ends with an error, printed above"
                break
    process.kill()
    process.join()
    return found


def _try(model_type: str, answer: Any) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {"verdict": PASSED, "share": None}
    try:
        config = CONFIG_MAPPING[model_type]()
        placeholder = placeholder_model(config)
        family = family_of(placeholder, config)
        model_class = causal_class(config)
        self_test(model_class, config_for(model_class, config))
        found["share"] = _share(family.blocks_of(placeholder))
    except UnsupportedModel as error:
        found["verdict"] = str(error).splitlines()[0].replace("|", "/")
    except CONFIG_ERRORS as error:  # the library's, on its own default config
        found["verdict"] = f"transformers makes no default config: {type(error).__name__}"
    answer.put(found)


def _share(blocks: Any) -> float:
    """Bytes of all blocks in int8, of those in float32."""
    full, small = (
        sum(block_bytes(block, quantization=find_scheme(name), dtype=torch.float32) for block in blocks)
        for name in ("none", "int8")
    )
    return small / full


if __name__ == "__main__":
    main()
