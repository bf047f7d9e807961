"""Spot checks: what they cost, and how soon a server that scales its output by 1.01 is found.

    python -m tests.benchmarks.liar [--verify 0.02] [--seeds 5] [--steps 12]

Found: three honest servers and a lying one hold a small random Llama whole, all as fast as each other; training steps
of four micro-batches until the liar is banned, for several seeds. Cost: the same steps over three honest servers of a
random BLOOM of 12 blocks x 256, with and without checks in turns. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch

from petals_tune.remote.auto import AutoDistributedModelForCausalLM
from petals_tune.swarm.local import local_swarm
from tests.faults.lying_server import lying_server
from tests.models import VOCABULARY, save_model

ROWS, LENGTH = 4, 32
MOST_STEPS = 2000


class Client:
    """Trains a soft prompt, one row a micro-batch."""

    def __init__(self, folder: Path, peers: list[str], verify: float, seed: int):
        torch.manual_seed(seed)
        self.model: Any = AutoDistributedModelForCausalLM.from_pretrained(
            str(folder), initial_peers=peers, micro_batch_rows=1, verify=verify
        )
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        self._net = peft.get_peft_model(self.model, config).train()
        self.swarm = self.model.remote_blocks.backbone.chain.client

    def step(self) -> None:
        self.swarm.load.correction.clear()  # all count as equally fast: the liar gets its share of the work
        ids = torch.randint(VOCABULARY, (ROWS, LENGTH))
        self._net(input_ids=ids, labels=ids).loss.backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--verify", type=float, default=0.02)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = found(Path(folder) / "llama", options) | cost(Path(folder) / "bloom", options)
    print(json.dumps({"verify": options.verify, **figures, "load_average": os.getloadavg()[0]}))


def found(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    save_model(folder, "llama")
    steps, answers = [], []
    with local_swarm(str(folder), spans=["0:6"] * 3, quantization="none") as peers, lying_server(folder, peers) as liar:
        peer = liar.wait_until_ready()[0].rpartition("/")[2]
        for seed in range(options.seeds):
            client = Client(folder, peers, options.verify, seed)
            count = 0
            while peer not in client.swarm.banned() and count < MOST_STEPS:
                client.step()
                count += 1
            assert client.swarm.banned() <= {peer}, "an honest server was banned"
            steps.append(count)
            answers.append(client.swarm.stats.calls)
            client.model.remote_blocks.close()
    print(f"\n| seed | steps until the liar was banned | requests of the client until then |\n|{'---|' * 3}")
    for seed, (count, calls) in enumerate(zip(steps, answers, strict=True)):
        print(f"| {seed} | {count} | {calls} |")
    return {"found_after_steps": statistics.median(steps), "found_after_steps_each": steps}


def cost(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    save_model(folder, "bloom", hidden_size=256, n_layer=12)
    shares = (0.0, options.verify, 10 * options.verify)
    with ExitStack() as stack:
        peers = stack.enter_context(local_swarm(str(folder), spans=["0:12"] * 3, quantization="none"))
        clients = {share: Client(folder, peers, share, 0) for share in shares}
        for client in clients.values():
            stack.callback(client.model.remote_blocks.close)
        seconds: dict[float, list[float]] = {share: [] for share in shares}
        for _ in range(options.steps):
            for share, client in clients.items():
                started_s = time.perf_counter()
                client.step()
                seconds[share].append(time.perf_counter() - started_s)
        checks = {share: client.swarm.stats.checks for share, client in clients.items()}
    # Means: a check that falls into one step of ten would not show in a median.
    means = {share: statistics.mean(each[2:]) for share, each in seconds.items()}
    print(f"\n| share checked | s a step (mean) | against none | checks |\n|{'---|' * 4}")
    for share in shares:
        print(f"| {share} | {means[share]:.3f} | {means[share] / means[0.0]:.2f} | {checks[share]} |")
    return {f"cost_at_{share:g}": round(means[share] / means[0.0], 3) for share in shares[1:]}


if __name__ == "__main__":
    main()
