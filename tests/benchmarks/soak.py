"""Memory, event loop and honest clients of a server that hostile clients use up.

    python tests/benchmarks/soak.py [--seconds 600] [--clients 4] [--honest 2] [--seed 0]

A real server process and clients over real streams, each with a p2p daemon and an identity of its own. First all are
honest, for a quarter of the time: they generate and train with the same inputs over and over, and compare every answer
with the first one, bit for bit (single positions, which share batches with those of others, to 1e-5). Then `--clients`
of them are hostile (tests/faults/hostile_clients.py: tensors that nobody waits for, adapters of many parts, replies
that nobody reads, half requests, 8-bit tensors, huge masks, large steps, floods, garbage), `--honest` of them go on.

    peak_over_budget   largest PSS of the server's process, without its p2p daemon, beyond that before the first
                       request, over the budgets of its limits plus CONSTANT_BYTES
    loop_lag_p999_s    of all moments of the attack, 99.9 % found the server's event loop no later than this (the upper
                       end of a bucket of petals_tune_loop_lag_seconds)
    honest_ratio       tokens/s of the honest clients under attack, over theirs when all others were honest
    crashes            servers that ended or said that they met a bug, and answers that were wrong

The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from prometheus_client.parser import text_string_to_metric_families

from petals_tune.swarm.local import ServerProcess, server_process
from petals_tune.wire.span import BlockSpan
from tests.benchmarks.chaos import free_port
from tests.faults.hostile_clients import Honest, Target, attack, start_daemons
from tests.models import save_model

HIDDEN, BLOCKS = 256, 4
MODEL = {
    "hidden_size": HIDDEN,
    "intermediate_size": 512,
    "num_hidden_layers": BLOCKS,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
}
LIMITS = {
    "max_lease_gb": 0.125,
    "max_cache_gb": 0.0625,
    "max_adapter_gb": 0.0625,
    "max_receiving_gb": 0.25,
    "max_compute_gb": 0.125,
    "max_message_mb": 64,
    "max_positions": 256,
    "max_tokens": 1024,
    "max_streams": 64,
    "max_request_s": 30,
    "max_lease_age_s": 60,
    "max_session_idle_s": 60,
}
BUDGET_BYTES = int(2**30 * (0.125 + 0.0625 + 2 * 0.0625 + 0.25 + 0.125))  # adapters twice: and sums of their gradients
# Beside the budgets: one message while it is decoded, from 8 bits, which takes its bytes five times; 0.5 MB for each
# stream; libraries that are loaded on first use, and what malloc keeps of freed memory.
CONSTANT_BYTES = 2**20 * (5 * 64 + 32 + 96)
CALM_SHARE = 0.25
SETTLE_S = 5.0  # after which `memory.last` is what stays when all clients have left


def main() -> None:
    options = arguments()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        figures = soak(save_model(folder / "model", "llama", **MODEL), options, stack)
    print(json.dumps(figures))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="of both phases together")
    parser.add_argument("--clients", type=int, default=4, help="that are hostile in the second phase")
    parser.add_argument("--honest", type=int, default=2, help="clients that are honest in both")
    parser.add_argument("--seed", type=int, default=0, help="of the order of attacks")
    return parser.parse_args()


def soak(model: Path, options: argparse.Namespace, stack: ExitStack) -> dict[str, Any]:
    port = free_port()
    limits = [f"limits.{name}={value}" for name, value in LIMITS.items()]
    process = stack.enter_context(
        server_process(
            [
                *(f"model.source='{model}'", f"blocks='0:{BLOCKS}'", "quantization=none", "threads=1"),
                *("throughput=1000", f"disk.folder='{model.parent}'", f"metrics_port={port}", *limits),
            ]
        )
    )
    target = Target(
        address=process.wait_until_ready()[0],
        span=BlockSpan(0, BLOCKS),
        hidden=HIDDEN,
        module="self_attn.q_proj",
        max_tokens=int(LIMITS["max_tokens"]),
        max_positions=int(LIMITS["max_positions"]),
        max_message_bytes=int(LIMITS["max_message_mb"]) * 2**20,
    )
    memory = Memory(process.process.pid)
    honest = stack.enter_context(clients(target, options.honest, first=0))
    others = stack.enter_context(clients(target, options.clients, first=options.honest))
    calm_s = options.seconds * CALM_SHARE
    phase([honest, others], ("honest", 2.0))  # libraries are loaded, and first answers taken
    calm, also_calm = phase([honest, others], ("honest", calm_s))
    lag = LoopLag(port)
    with memory.watched():
        honest.send(("honest", options.seconds - calm_s))
        others.send(("hostile", options.seconds - calm_s, options.seed))
        stormy, hostile = honest.recv(), others.recv()
        time.sleep(SETTLE_S)
    ended = process.process.poll() is not None
    lag_p999_s = float("inf") if ended else lag.quantile(0.999)
    return report(process, memory, lag_p999_s, calm, also_calm, stormy, hostile)


def report(
    process: ServerProcess,
    memory: Memory,
    lag_p999_s: float,
    calm: dict[str, Any],
    also_calm: dict[str, Any],
    stormy: dict[str, Any],
    hostile: dict[str, Any],
) -> dict[str, Any]:
    """Print the tables; the figures for the last line."""
    print("| attack | made |\n|---|---|")
    for name, count in sorted(hostile["made"].items()):
        print(f"| {name} | {count} |")
    print(
        f"\nhonest tokens/s: {calm['tokens_s']:.0f} beside honest clients, {stormy['tokens_s']:.0f} beside hostile ones"
    )
    print(f"refused or lost to the honest ones meanwhile: {stormy['failed'] or 'nothing'}")
    print(
        f"PSS: {memory.before >> 20} MB before, {memory.peak >> 20} MB at its peak, {memory.last >> 20} MB when all "
        f"had left; allowed beside the first: {BUDGET_BYTES >> 20} MB of budgets and {CONSTANT_BYTES >> 20} MB"
    )
    bugs = [line for line in process.lines if "Traceback" in line or "a bug while" in line]
    ended = process.process.poll() is not None
    if bugs or ended:
        print("\n".join(process.lines[-100:]))
    wrong = calm["wrong"] + also_calm["wrong"] + stormy["wrong"]
    return {
        "peak_over_budget": round((memory.peak - memory.before) / (BUDGET_BYTES + CONSTANT_BYTES), 3),
        "loop_lag_p999_s": lag_p999_s,
        "honest_ratio": round(stormy["tokens_s"] / calm["tokens_s"], 2),
        "crashes": len(bugs) + ended + wrong,
        "wrong_answers": wrong,
        "attacks": sum(hostile["made"].values()),
        "load_average": os.getloadavg()[0],
    }


class Memory:
    """PSS of one process: what it has for itself, and its share of what it shares."""

    def __init__(self, process_id: int):
        self._file = Path(f"/proc/{process_id}/smaps_rollup")
        self.before = self.peak = self.last = self._read()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look every quarter of a second while this lasts."""
        stop = threading.Event()

        def look() -> None:
            while not stop.wait(0.25):
                self.last = self._read()
                self.peak = max(self.peak, self.last)

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _read(self) -> int:
        try:
            lines = self._file.read_text().splitlines()
        except OSError:  # it has ended
            return 0
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


class LoopLag:
    """How late a server's event loop was, since this was made."""

    def __init__(self, port: int):
        self._port = port
        self._before = self._read()

    def quantile(self, share: float) -> float:
        """The upper end of the bucket in which the quantile is."""
        now = self._read()
        counts = {end_s: count - self._before[end_s] for end_s, count in now.items()}
        return min(end_s for end_s, count in counts.items() if count >= share * counts[float("inf")])

    def _read(self) -> dict[float, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics", timeout=60) as answer:
            text = answer.read().decode()
        return {
            float(sample.labels["le"]): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == "petals_tune_loop_lag_seconds_bucket"
        }


def phase(pipes: list[Connection], order: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Give all processes an order, and wait for what they report."""
    for pipe in pipes:
        pipe.send(order)
    return [pipe.recv() for pipe in pipes]


@contextmanager
def clients(target: Target, count: int, *, first: int) -> Iterator[Connection]:
    """So many clients in a process of their own, which does what is sent to it."""
    near, far = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=run_clients, args=(far, target, count, first))
    process.start()
    try:
        yield near
    finally:
        near.send(None)
        process.join(30)
        process.kill()


def run_clients(pipe: Connection, target: Target, count: int, first: int) -> None:
    """Entry point of a process of clients."""
    torch.set_num_threads(1)
    asyncio.run(obey(pipe, target, count, first))


async def obey(pipe: Connection, target: Target, count: int, first: int) -> None:
    """Be honest or hostile, as told, until told to end."""
    daemons = await start_daemons(count, target)
    honest = [Honest(target=target, seed=first + number) for number in range(count)]
    try:
        while (order := await asyncio.to_thread(pipe.recv)) is not None:
            began_s = time.monotonic()
            until_s = began_s + order[1]
            for client in honest:
                client.tokens, client.failed = 0, Counter()
            if order[0] == "honest":
                await asyncio.gather(
                    *(client.work(daemon, until_s) for client, daemon in zip(honest, daemons, strict=True))
                )
                made = []
            else:
                chances = [random.Random(f"{order[2]} {number}") for number in range(count)]
                made = await asyncio.gather(
                    *(attack(daemon, target, until_s, chance) for daemon, chance in zip(daemons, chances, strict=True))
                )
            pipe.send(
                {
                    "tokens_s": sum(client.tokens for client in honest) / (time.monotonic() - began_s),
                    "wrong": sum(client.wrong for client in honest),
                    "failed": dict(sum((client.failed for client in honest), Counter())),
                    "made": dict(sum(made, Counter())),
                }
            )
    finally:
        for daemon in daemons:
            await daemon.stop()


if __name__ == "__main__":
    main()
