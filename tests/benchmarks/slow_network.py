"""Training over a simulated slow network, against the same swarm on loopback, in one run.

    python tests/benchmarks/slow_network.py [--round-trip-ms 50] [--mbit 100] [--servers 2] [--hand-over]

The client and each server are a host of their own on slow lines; as many servers more are on the client's host. A
training step of 8 x (16 + 128) positions is taken over both swarms in turns, with a soft prompt and with LoRA: medians
of their tokens/s, as `wan_prompt_ratio` and `wan_lora_ratio`, the formats that were chosen by the measured line, and
the largest difference of the loss from that over loopback, in float32, over all steps. Random BLOOM of 12 blocks x
512, fp32, servers of one thread each. `--hand-over` compares instead outputs that go through the client
(swarm.hand_over=never) with outputs that servers hand on to each other (auto, the default), also for 64 generated
tokens. Needs root (tests/links.py). The last line is JSON.
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
        print(json.dumps(hand_overs(options) if options.hand_over else ratios(options)))
        return
    with ExitStack() as stack:
        source = model_source("bloom", stack)
        found = stack.enter_context(
            network(1 + options.servers, round_trip_s=options.round_trip_ms / 1000, bits_per_s=options.mbit * 1e6)
        )
        command = [sys.executable, *sys.argv, "--source", source, "--peers", *served(source, found[1:], stack)]
        if not options.hand_over:
            command += ["--near-peers", *served(source, [found[0]] * options.servers, stack, address="127.0.0.1")]
        output = subprocess.run(found[0].command(*command), check=True, stdout=subprocess.PIPE, text=True).stdout
    figures = json.loads(output.splitlines()[-1])
    print(f"round trip {options.round_trip_ms:g} ms, {options.mbit:g} Mbit/s a host, {options.servers} servers")
    (print_hand_overs if options.hand_over else print_ratios)(figures)
    line = {"round_trip_ms": options.round_trip_ms, "mbit": options.mbit, "load": os.getloadavg()[0]}
    print(json.dumps({**line, **figures}))


def print_ratios(figures: dict[str, Any]) -> None:
    print(
        "| | loopback | slow network | ratio | loss apart | sent, received by the client |\n|---|---|---|---|---|---|"
    )
    for method in (method for method in METHODS if f"wan_{method}_ratio" in figures):
        near, far = (figures[f"{where}_{method}_tokens_s"] for where in ("near", "wan"))
        sent, received = figures[f"wan_{method}_sent_mb"], figures[f"wan_{method}_received_mb"]
        print(
            f"| {method} | {near:.0f} tokens/s | {far:.0f} tokens/s | {figures[f'wan_{method}_ratio']:.2f} "
            f"| {figures[f'wan_{method}_loss_apart']:.1e} | {sent:.2f}, {received:.2f} MB |"
        )
    print(figures["wan_formats"])


def print_hand_overs(figures: dict[str, Any]) -> None:
    print("| | through the client | handed on | saves | sent by the client |\n|---|---|---|---|---|")
    for name, row in figures["rows"].items():
        never, auto = (row[rule] for rule in RULES)
        sent = f"{never['sent_mb']:.2f} -> {auto['sent_mb']:.2f} MB"
        print(f"| {name} | {never['s']:.3f} s | {auto['s']:.3f} s | {1 - auto['s'] / never['s']:.0%} | {sent} |")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--round-trip-ms", type=float, default=50.0, help="between any two hosts")
    parser.add_argument("--mbit", type=float, default=100.0, help="of each host's line, per second, in each direction")
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=28, help="measured turns of each side, after two others")
    parser.add_argument("--hand-over", action="store_true", help="compare the ways of outputs instead")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--source", help=argparse.SUPPRESS)  # of the client, which this command starts on its host
    parser.add_argument("--peers", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--near-peers", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def served(source: str, hosts: list[Host], stack: ExitStack, *, address: str | None = None) -> list[str]:
    """A server of equal spans on each host, at its own address or another one; returns the first one's addresses."""
    blocks = Checkpoint(source).config.num_hidden_layers
    peers: list[str] = []
    started: list[ServerProcess] = []
    for number, host in enumerate(hosts):
        overrides = [
            f"model.source='{source}'",
            f"blocks='{blocks * number // len(hosts)}:{blocks * (number + 1) // len(hosts)}'",
            f"swarm.host_maddrs=[/ip4/{address or host.address}/tcp/0]",
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
        started.append(ServerProcess(process))
        peers = peers or started[0].wait_until_ready()
    for server in started:
        server.wait_until_ready()
    return peers


def batch_of(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(1)
    ids = torch.randint(Checkpoint(options.source).config.vocab_size, (ROWS, TEXT_TOKENS))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def ratios(options: argparse.Namespace) -> dict[str, Any]:
    """On the client's host: tokens/s and losses over both swarms, in turns."""
    batch, figures = batch_of(options), {}
    with ExitStack() as stack:
        for method in options.methods.split(","):
            sides: dict[str, Side] = {}
            for where, peers in (("near", options.near_peers), ("wan", options.peers)):
                model = AutoDistributedModelForCausalLM.from_pretrained(options.source, initial_peers=peers)
                stack.callback(model.remote_blocks.close)
                sides[where] = Side(f"{method}, {where}", model, method_config(method), threads=1)
            for _ in range(2 + options.steps):
                for side in sides.values():
                    side.step(batch)
            seconds = {where: side.median_s(2) for where, side in sides.items()}
            for where, median_s in seconds.items():
                figures[f"{where}_{method}_tokens_s"] = ROWS * TEXT_TOKENS / median_s
            near, wan = (side.net.get_base_model().remote_blocks.stats for side in sides.values())
            apart = zip(sides["near"].losses, sides["wan"].losses, strict=True)
            figures |= {
                f"wan_{method}_ratio": seconds["near"] / seconds["wan"],
                f"wan_{method}_loss_apart": max(abs(one - other) for one, other in apart),
                f"wan_{method}_sent_mb": wan.sent_bytes / 2**20 / (2 + options.steps),
                f"wan_{method}_received_mb": wan.received_bytes / 2**20 / (2 + options.steps),
                "near_formats": near.formats,
                "wan_formats": wan.formats,
                "loss_steps": 2 + options.steps,
            }
    return figures


def hand_overs(options: argparse.Namespace) -> dict[str, Any]:
    """On the client's host: the figures of both rules, in turns."""
    batch = batch_of(options)
    ids = batch["input_ids"]
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
