"""Mixtures of experts in int8 and nf4: weight memory, error and step time against blocks in full, beside dense models.

    python tests/benchmarks/experts.py [--rounds 7] [--threads 2]

Errors are of small random models (tests/mixtures.py), of what two blocks add to their input: the median over positions,
by norms, so that the few where an expert was chosen otherwise do not decide. Times are of a
Qwen3-MoE of two blocks x 1024 with 32 experts x 512, four for each token: forward and backward to the input, all
quantizations by turns in one process. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the tests have the families

import torch
from transformers.utils import logging

from petals_tune.blocks.engine import Engine
from petals_tune.blocks.loading import load_blocks
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.wire.messages import Backward, Forward
from petals_tune.wire.span import BlockSpan
from tests.mixtures import MIXTURES, save_mixture

DENSE = ("llama", "qwen3", "gemma2")
SPAN = BlockSpan(0, 2)
COMPARED = ("int8", "nf4", "none")
BATCHES = ((8, 128), (1, 128), (1, 16))  # rows, positions
TIMED = {
    "hidden_size": 1024,
    "moe_intermediate_size": 512,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 512,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    print("| family | memory, int8 | memory, nf4 | error, int8 | error, nf4 |\n|---|---|---|---|---|")
    figures = {"families": {family: exactness(family) for family in (*DENSE, *MIXTURES)}}
    print("\n| rows x positions | int8 / float32, time | nf4 / float32, time |\n|---|---|---|")
    print(json.dumps({**figures, "time": times(options.rounds)}))


def engines(folder: Path) -> dict[str, Engine]:
    source = Checkpoint(str(folder))
    return {name: Engine(load_blocks(source, SPAN, quantization=name, dtype=torch.float32)) for name in COMPARED}


def exactness(family: str) -> dict[str, float]:
    """Memory and error of each quantization, as shares of those in full."""
    with tempfile.TemporaryDirectory() as folder:
        by_scheme = engines(save_mixture(Path(folder), family))
        hidden = torch.randn(8, 32, 128, generator=torch.Generator().manual_seed(0)) * 0.3
        outputs = {
            name: each.forward(Forward(span=SPAN, hidden=hidden.clone()), None).output
            for name, each in by_scheme.items()
        }
    plain, figures = by_scheme["none"].loaded.weight_bytes, {}
    for name in ("int8", "nf4"):
        figures[f"{name}_memory"] = by_scheme[name].loaded.weight_bytes / plain
    for name in ("int8", "nf4"):
        errors = (outputs[name] - outputs["none"]).norm(dim=-1) / (outputs["none"] - hidden).norm(dim=-1)
        figures[f"{name}_error"] = errors.median().item()
    memory = [f"{figures[f'{name}_memory']:.3f}" for name in ("int8", "nf4")]
    errors_shown = [f"{figures[f'{name}_error']:.1%}" for name in ("int8", "nf4")]
    print(f"| {family} | {' | '.join([*memory, *errors_shown])} |", flush=True)
    return figures


def times(rounds: int) -> dict[str, dict[str, float]]:
    """Least seconds of a forward with a backward, as shares of those in full, by batches."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        by_scheme = engines(save_mixture(Path(folder), "qwen3_moe", **TIMED))
        for rows, positions in BATCHES:
            hidden, grad = torch.randn(2, rows, positions, 1024) * 0.3
            seconds: dict[str, list[float]] = {name: [] for name in by_scheme}
            for _ in range(rounds + 1):
                for name, engine in by_scheme.items():
                    started_s = time.perf_counter()
                    result = engine.forward(Forward(span=SPAN, hidden=hidden.clone(), keep=True), None)
                    engine.backward(Backward(lease=1, grad=grad.clone()), result.graph, None)
                    seconds[name].append(time.perf_counter() - started_s)
            least = {name: min(each[1:]) for name, each in seconds.items()}  # other work on the machine only adds
            ratios = {name: least[name] / least["none"] for name in ("int8", "nf4")}
            figures[f"{rows}x{positions}"] = {**ratios, "none_s": least["none"]}
            print(f"| {rows} x {positions} | {ratios['int8']:.2f} | {ratios['nf4']:.2f} |", flush=True)
    return figures


if __name__ == "__main__":
    main()
