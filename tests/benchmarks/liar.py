"""Spot checks: what they cost, and how soon a server that scales its output, or a part of it, by 1.01 is found.

    python -m tests.benchmarks.liar [--seeds 5] [--rounds 12]

Found: three honest servers and a lying one hold a small random Llama whole, all as fast as each other; training steps
of four micro-batches of 8 rows and 64 positions until the liar is banned, for several seeds, by what it lies about
(tests/faults/lying_server.py), share and format of the wire. Cost: the same steps
over three honest servers of a random BLOOM of 12 blocks x 256, with and without checks in turns of ten steps, the end
of the last check included. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
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
from petals_tune.swarm.verify import SpotChecks
from petals_tune.wire.tensors import WireFormat
from tests.faults.lying_server import LIES, lying_server
from tests.models import VOCABULARY, save_model

PARTS, ROWS, LENGTH, PROMPT = 4, 8, 60, 4  # micro-batches, and rows and positions of each
STEPS = 10  # in a round
SHARES = (0.02, 0.1)
FORMATS: dict[str, tuple[WireFormat, ...]] = {
    **dict.fromkeys(LIES, ("float32",)),
    "everything": ("float32", "bfloat16", "blockwise8"),
    "what looks like all other requests": ("float32", "bfloat16"),
}
MOST_STEPS = 2000


class Client:
    """Trains a soft prompt."""

    def __init__(self, folder: Path, peers: list[str], *, verify: float, seed: int, wire: WireFormat = "float32"):
        torch.manual_seed(seed)
        self.model: Any = AutoDistributedModelForCausalLM.from_pretrained(
            str(folder), initial_peers=peers, micro_batch_rows=ROWS, verify=verify, wire_format=wire, grad_format=wire
        )
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT)
        self._net = peft.get_peft_model(self.model, config).train()
        self.chain = self.model.remote_blocks.backbone.chain
        self.swarm = self.chain.client

    def step(self) -> None:
        self.swarm.load.correction.clear()  # all count as equally fast: the liar gets its share of the work
        ids = torch.randint(VOCABULARY, (PARTS * ROWS, LENGTH))
        self._net(input_ids=ids, labels=ids).loss.backward()

    def settle(self) -> None:
        """Wait until every check has ended."""
        checks = self.chain.calls.observer
        while isinstance(checks, SpotChecks) and checks.running:
            time.sleep(0.001)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = found(Path(folder) / "llama", options.seeds) | cost(Path(folder) / "bloom", options.rounds)
    print(json.dumps({**figures, "load_average": os.getloadavg()[0]}))


def found(folder: Path, seeds: int) -> dict[str, Any]:
    """Micro-batches until the liar is banned."""
    save_model(folder, "llama")
    counts: dict[str, list[int]] = {}
    liars: list[str] = []  # the last one lives
    print(
        f"\n| lies about | wire | checked | micro-batches until it was banned: median | least | most |\n|{'---|' * 6}"
    )
    with local_swarm(str(folder), spans=["0:6"] * 3, quantization="none") as peers:
        for lie, formats in FORMATS.items():
            with lying_server(folder, peers, lie) as liar:
                liars.append(liar.wait_until_ready()[0].rpartition("/")[2])
                for wire, share in itertools.product(formats, SHARES):
                    each = [
                        until_banned(Client(folder, peers, verify=share, seed=seed, wire=wire), liars)
                        for seed in range(seeds)
                    ]
                    counts[f"{lie}, {wire}, {share:g}"] = each
                    row = (lie, wire, f"{share:g}", f"{statistics.median(each):g}", min(each), max(each))
                    print(f"| {' | '.join(map(str, row))} |", flush=True)
    return {"found_after_micro_batches": counts}


def until_banned(client: Client, liars: list[str]) -> int:
    steps = 0
    while liars[-1] not in client.swarm.banned():
        assert steps < MOST_STEPS, "the liar was not found"
        client.step()
        steps += 1
    assert client.swarm.banned() <= set(liars), "an honest server was banned"
    client.model.remote_blocks.close()
    return steps * PARTS


def cost(folder: Path, rounds: int) -> dict[str, Any]:
    save_model(folder, "bloom", hidden_size=256, num_hidden_layers=12)
    shares = (0.0, *SHARES, 1.0)
    with ExitStack() as stack:
        peers = stack.enter_context(local_swarm(str(folder), spans=["0:12"] * 3, quantization="none"))
        clients = {share: Client(folder, peers, verify=share, seed=0) for share in shares}
        for client in clients.values():
            stack.callback(client.model.remote_blocks.close)
        seconds: dict[float, list[float]] = {share: [] for share in shares}
        for _ in range(rounds):
            for share, client in clients.items():
                started_s = time.perf_counter()
                for _ in range(STEPS):
                    client.step()
                client.settle()
                seconds[share].append((time.perf_counter() - started_s) / STEPS)
        stats = {share: client.swarm.stats for share, client in clients.items()}
    medians = {share: statistics.median(each[1:]) for share, each in seconds.items()}
    moved = {share: each.sent_bytes + each.received_bytes for share, each in stats.items()}
    print(f"\n| share checked | s a step (median) | against none | bytes against none | checks |\n|{'---|' * 5}")
    for share in shares:
        times, data = (each[share] / each[0.0] for each in (medians, moved))
        print(f"| {share:g} | {medians[share]:.3f} | {times:.2f} | {data:.2f} | {stats[share].checks} |")
    return {f"cost_at_{share:g}": round(medians[share] / medians[0.0], 3) for share in shares[1:]}


if __name__ == "__main__":
    main()
