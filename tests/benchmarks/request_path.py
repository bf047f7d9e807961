"""What a token's request costs over an echo of equal bytes on the same stream.

    python tests/benchmarks/request_path.py [--steps 300] [--root /path/of/another/checkout]

One server process hosts a Llama of two small blocks (the fewest that a client accepts), so that little of a step is
arithmetic. `step` is a token through a generation session of `remote_blocks`; `echo` is a Ping through the same open
stream whose filler has the bytes that a step sends and receives. They take turns, so that a busy machine disturbs them
alike; medians. `--root` measures the code of another checkout, for a comparison in pairs. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

WIDTH = 32
WARM_UP = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[2], help="the checkout to measure")
    options = parser.parse_args()
    root = str(options.root.resolve())
    sys.path.insert(0, root)
    os.environ["PYTHONPATH"] = root  # of the server
    figures = measure(options.steps)
    print("| step, ms | echo of equal bytes, ms | ratio |")
    print("|---|---|---|")
    print(f"| {figures['step_ms']:.3f} | {figures['echo_ms']:.3f} | {figures['ratio']:.2f} |")
    print(json.dumps(figures))


def measure(steps: int) -> dict[str, float]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from petals_tune import AutoDistributedModelForCausalLM, local_swarm

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        with local_swarm(folder, spans=["0:2"], quantization="none") as peers:
            model = AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=peers)
            try:
                return compare(model.remote_blocks, torch.randn(1, 1, WIDTH), steps)
            finally:
                model.remote_blocks.close()


def compare(blocks: Any, hidden: Any, steps: int) -> dict[str, float]:
    """Medians of a step of `hidden` (1, 1, H) and of an echo, in milliseconds."""
    from petals_tune.swarm import loop
    from petals_tune.wire.messages import Ping

    session = blocks.new_session(max_length=WARM_UP + steps + 1)

    def step() -> None:
        session.step(hidden, padding=None, positions=None, adapter=lambda: None)

    for _ in range(WARM_UP):
        step()
    before = blocks.stats.sent_bytes + blocks.stats.received_bytes
    step()
    filler = bytes(blocks.stats.sent_bytes + blocks.stats.received_bytes - before)
    stream = blocks.backbone.chain.client.open_stream(blocks.servers()[0])

    def echo() -> None:
        loop.run(stream.call(Ping(filler=filler), timeout_s=60.0))

    times: dict[Callable[[], None], list[float]] = {step: [], echo: []}
    for _ in range(steps):
        for turn, seconds in times.items():
            started_s = time.perf_counter()
            turn()
            seconds.append(time.perf_counter() - started_s)
    session.close()
    step_ms, echo_ms = (1000 * statistics.median(seconds) for seconds in times.values())
    return {"step_ms": step_ms, "echo_ms": echo_ms, "ratio": step_ms / echo_ms}


if __name__ == "__main__":
    main()
