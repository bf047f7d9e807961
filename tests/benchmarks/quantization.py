"""Time of quantized blocks over that of float32 blocks, dense and with experts, on one CPU thread.

    python tests/benchmarks/quantization.py [--hidden 1024] [--rounds 15]

Two blocks of Llama's and two of Qwen3-MoE's shape, random weights. `step` is one token of one row beside a short text
in the cache; `training` is a forward of 8 rows of 64 positions that keeps its graph, and the backward. Schemes take
turns; medians. `error` is of the outputs of a forward, over their norm. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from petals_tune.blocks.engine import Engine
from petals_tune.blocks.generation.session import Session
from petals_tune.blocks.loading import load_blocks
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.wire.messages import Backward, Forward, Step
from petals_tune.wire.span import BlockSpan

SCHEMES = ("none", "int8", "nf4")
SPAN = BlockSpan(0, 2)
ROWS, POSITIONS, TEXT = 8, 64, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    print("| blocks | scheme | weights, MB | one token, ms | over float32 | training, ms | over float32 | error |")
    print("|---|---|---|---|---|---|---|---|")
    for name, config in configs(options.hidden).items():
        engines = {scheme: engine_of(config, scheme) for scheme in SCHEMES}
        steps, training = measured(engines, options.rounds)
        exact = output(engines["none"])
        for scheme, engine in engines.items():
            megabytes = engine.loaded.weight_bytes / 2**20
            of_step, of_training = steps[scheme] / steps["none"], training[scheme] / training["none"]
            error = float((output(engine) - exact).norm() / exact.norm())
            print(
                f"| {name} | {scheme} | {megabytes:.0f} | {1e3 * steps[scheme]:.2f} | {of_step:.2f} | "
                f"{1e3 * training[scheme]:.0f} | {of_training:.2f} | {error:.4f} |"
            )
            if scheme != "none":
                figures[f"{name}_{scheme}_step_ratio"] = round(of_step, 2)
                figures[f"{name}_{scheme}_training_ratio"] = round(of_training, 2)
                figures[f"{name}_{scheme}_memory_ratio"] = round(
                    megabytes / engines["none"].loaded.weight_bytes * 2**20, 3
                )
    print(json.dumps(figures))


def configs(hidden: int) -> dict[str, PretrainedConfig]:
    shape = {"hidden_size": hidden, "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 4}
    return {
        "dense": LlamaConfig(vocab_size=64, intermediate_size=11 * hidden // 4, **shape),
        "experts": Qwen3MoeConfig(
            vocab_size=64,
            moe_intermediate_size=hidden // 2,
            num_experts=16,
            num_experts_per_tok=4,
            head_dim=hidden // 16,
            **shape,
        ),
    }


def engine_of(config: PretrainedConfig, scheme: str) -> Engine:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        loaded = load_blocks(Checkpoint(str(Path(folder))), SPAN, quantization=scheme, dtype=torch.float32)
    return Engine(loaded)


def measured(engines: dict[str, Engine], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Medians in seconds, by scheme: of a token, and of a forward with its backward."""
    hidden_size = next(iter(engines.values())).hidden_size
    text, tokens = torch.randn(1, TEXT, hidden_size), torch.randn(3 * rounds, 1, 1, hidden_size)
    batch = torch.randn(ROWS, POSITIONS, hidden_size)
    sessions = {name: session_with(engine, text, 3 * rounds) for name, engine in engines.items()}
    steps: dict[str, list[float]] = {name: [] for name in engines}
    training: dict[str, list[float]] = {name: [] for name in engines}
    for number, token in enumerate(tokens):
        for name, engine in engines.items():
            started_s = time.perf_counter()
            take(engine, sessions[name], token, TEXT + number)
            steps[name].append(time.perf_counter() - started_s)
    for _ in range(rounds):
        for name, engine in engines.items():
            started_s = time.perf_counter()
            result = engine.forward(Forward(span=SPAN, hidden=batch, keep=True, input_grad=True), None)
            engine.backward(Backward(grad=batch, lease=0), result.graph, None)
            training[name].append(time.perf_counter() - started_s)
    return _medians(steps), _medians(training)


def session_with(engine: Engine, text: torch.Tensor, tokens: int) -> Session:
    session = Session(client="", span=SPAN, rows=1, max_length=TEXT + tokens, adapter=None, adapter_version=None)
    take(engine, session, text, 0)
    return session


def take(engine: Engine, session: Session, hidden: torch.Tensor, position: int) -> torch.Tensor:
    (result,) = engine.step([(session, Step(session=0, hidden=hidden, position=position))])
    if isinstance(result, Exception):
        raise result
    return result


def output(engine: Engine) -> torch.Tensor:
    torch.manual_seed(1)
    hidden = torch.randn(2, POSITIONS, engine.hidden_size)
    return engine.forward(Forward(span=SPAN, hidden=hidden), None).output


def _medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(own) for name, own in seconds.items()}


if __name__ == "__main__":
    main()
