"""What it costs that outputs go through the client, in a simulated slow network: one of three hosts each.

    python tests/benchmarks/slow_network.py [--round-trip-ms 50] [--mbit 100] [--servers 2]

A training step and 64 generated tokens with outputs that go through the client (swarm.hand_over=never) and with outputs
that servers hand on to each other (auto, the default), in turns, medians. Random BLOOM of 12 blocks x 512, fp32,
servers of one thread each. Needs root (tests/links.py). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from transformers.utils import logging

from petals_tune.model.checkpoint import Checkpoint
from petals_tune.remote.auto import AutoDistributedModelForCausalLM
from petals_tune.swarm.local import ServerProcess
from tests.benchmarks.generation import NEW_TOKENS, generate
from tests.benchmarks.in_process import model_source
from tests.benchmarks.training import ROWS, TEXT_TOKENS, Side, method_config
from tests.links import Host, network

RULES = ("never", "auto")
METHODS = ("prompt", "lora")
GENERATION = f"{NEW_TOKENS} tokens"


def main() -> None:
    options = arguments()
    if options.peers:
        print(json.dumps(measured(options)))
        return
    with ExitStack() as stack:
        source = model_source("bloom", stack)
        found = stack.enter_context(
            network(1 + options.servers, round_trip_s=options.round_trip_ms / 1000, bits_per_s=options.mbit * 1e6)
        )
        peers = served(source, found[1:], stack)
        command = [sys.executable, *sys.argv, "--source", source, "--peers", *peers]
        output = subprocess.run(found[0].command(*command), check=True, stdout=subprocess.PIPE, text=True).stdout
    figures = json.loads(output.splitlines()[-1])
    print(f"round trip {options.round_trip_ms:g} ms, {options.mbit:g} Mbit/s a host, {options.servers} servers")
    print("| | through the client | handed on | saves | sent by the client |")
    print("|---|---|---|---|---|")
    for name, row in figures["rows"].items():
        never, auto = (row[rule] for rule in RULES)
        sent = f"{never['sent_mb']:.2f} -> {auto['sent_mb']:.2f} MB"
        print(f"| {name} | {never['s']:.3f} s | {auto['s']:.3f} s | {1 - auto['s'] / never['s']:.0%} | {sent} |")
    print(json.dumps({"round_trip_ms": options.round_trip_ms, "mbit": options.mbit, **figures}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--round-trip-ms", type=float, default=50.0, help="between any two hosts")
    parser.add_argument("--mbit", type=float, default=100.0, help="of each host's line, per second, in each direction")
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=7, help="measured turns of each side")
    parser.add_argument("--source", help=argparse.SUPPRESS)  # of the client, which this command starts on its host
    parser.add_argument("--peers", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def served(source: str, hosts: list[Host], stack: ExitStack) -> list[str]:
    """A server of equal spans on each host; returns the first one's addresses."""
    blocks = Checkpoint(source).config.num_hidden_layers
    peers: list[str] = []
    for number, host in enumerate(hosts):
        overrides = [
            f"model.source='{source}'",
            f"blocks='{blocks * number // len(hosts)}:{blocks * (number + 1) // len(hosts)}'",
            f"swarm.host_maddrs=[/ip4/{host.address}/tcp/0]",
            f"swarm.initial_peers=[{','.join(peers)}]",
            *("quantization=none", "threads=1", "exit_with_stdin=true"),
        ]
        process = subprocess.Popen(
            host.command(sys.executable, "-P", "-m", "servers", *overrides),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        )
        stack.callback(process.wait)
        stack.callback(process.terminate)
        addresses = ServerProcess(process).wait_until_ready()
        peers = peers or addresses
    return peers


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """On the client's host: the figures of both rules, in turns."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    vocabulary = Checkpoint(options.source).config.vocab_size
    torch.manual_seed(1)
    ids = torch.randint(vocabulary, (ROWS, TEXT_TOKENS))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with ExitStack() as stack:
        turns: dict[str, dict[str, Any]] = {}
        models = {}
        for rule in RULES:
            for name in (*METHODS, GENERATION):
                model = AutoDistributedModelForCausalLM.from_pretrained(
                    options.source, initial_peers=options.peers, hand_over=rule
                )
                stack.callback(model.remote_blocks.close)
                models[name, rule] = model
                if name == GENERATION:
                    turns.setdefault(name, {})[rule] = lambda model=model: generate(model, ids[:1, :16])
                else:
                    side = Side(f"{name}, {rule}", model, method_config(name), threads=1)
                    turns.setdefault(name, {})[rule] = lambda side=side: side.step(batch)
        rows: dict[str, Any] = {}
        for name, by_rule in turns.items():
            seconds: dict[str, list[float]] = {rule: [] for rule in RULES}
            for _ in range(2 + options.steps):
                for rule, turn in by_rule.items():
                    started_s = time.perf_counter()
                    turn()
                    seconds[rule].append(time.perf_counter() - started_s)
            rows[name] = {}
            for rule in RULES:
                stats = models[name, rule].remote_blocks.stats
                rows[name][rule] = {
                    "s": statistics.median(seconds[rule][2:]),
                    "sent_mb": stats.sent_bytes / 2**20 / (2 + options.steps),
                    "received_mb": stats.received_bytes / 2**20 / (2 + options.steps),
                }
    return {"rows": rows}


if __name__ == "__main__":
    main()
