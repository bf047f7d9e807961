"""A recipe over four real servers while one of them after the other is killed, stopped, slowed or restarted.

    python tests/benchmarks/chaos.py [--faults 30] [--steps 60] [--recipe personachat]

The recipe runs twice with the same seed, with LoRA on the blocks: undisturbed, then under faults. Two servers hold each
half of the model, in float32. Every few seconds one of them is harmed whose replica is well:

    kill      SIGKILL; after two seconds a new server, with a new identity, comes in its place
    restart   SIGKILL; the same server starts at once, at its old address, with nothing in its memory
    stop      SIGSTOP for eight seconds: longer than the heartbeat's patience
    slow      stopped for four fifths of every half second, for five seconds

`recovery_s` is the median time from a kill that work ran into (or from the last progress of that work, where that is
later) until the part that it broke was done elsewhere, its repeated computation included. A slow server breaks nothing:
work ran into it where it answered requests meanwhile, and what is lost is by how much longer they took, in the mean,
than those before. The last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import random
import signal
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from petals_tune.config import composed
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.convert import model_folder
from petals_tune.net.stats import ServerTimes, SwarmStats
from petals_tune.swarm.local import ServerProcess, server_process
from petals_tune.train.parts import Parts
from petals_tune.train.run import remote_model, run

KINDS = ("kill", "restart", "stop", "slow")
STOPPED_S, SLOWED_S, AWAY_S = 8.0, 5.0, 2.0
WINDOW_S = 25.0  # what fails later was not this fault's doing


@dataclass
class Server:
    """A place in the swarm: a span, an address, and the process that serves there now."""

    span: str
    port: int
    identity: Path
    process: ServerProcess | None = None
    addresses: Sequence[str] = ()
    well: bool = False

    @property
    def peer(self) -> str:
        return self.addresses[0].rpartition("/")[2]


@dataclass
class Fault:
    kind: str
    peer: str
    at_s: float  # time.time(), as log records have it
    lost_s: float | None = None  # None: no work ran into it
    what: str = ""  # failed


@dataclass
class Swarm:
    """Four servers, and what is done to them."""

    source: str
    folder: Path
    stack: ExitStack
    servers: list[Server] = field(default_factory=list)
    crashes: int = 0
    _started: int = 0

    def open(self) -> None:
        blocks = Checkpoint(self.source).config.num_hidden_layers
        for span in (f"0:{blocks // 2}", f"{blocks // 2}:{blocks}") * 2:
            server = Server(span=span, port=free_port(), identity=self._new_identity())
            self.servers.append(server)
            self.start(server)

    def start(self, server: Server) -> None:
        """Start it, and wait until it serves."""
        peers = [each.addresses[0] for each in self.servers if each.well]
        process = self.stack.enter_context(
            server_process(
                [
                    f"model.source='{self.source}'",
                    f"blocks='{server.span}'",
                    "quantization=none",
                    "threads=1",
                    f"identity_path='{server.identity}'",
                    f"swarm.host_maddrs=[/ip4/127.0.0.1/tcp/{server.port}]",
                    f"swarm.initial_peers=[{','.join(peers)}]",
                ]
            )
        )
        server.process = process
        server.addresses = process.wait_until_ready()
        server.well = True

    def harm(self, server: Server, kind: str) -> None:
        """Runs in a thread of its own until the server is well again."""
        assert server.process is not None
        process = server.process.process
        if kind in ("kill", "restart"):
            process.kill()
            process.wait()
            self.note_crashes(server)
            if kind == "kill":
                server.identity = self._new_identity()
                time.sleep(AWAY_S)
            self.start(server)
            return
        until_s = time.monotonic() + (STOPPED_S if kind == "stop" else SLOWED_S)
        while time.monotonic() < until_s:
            process.send_signal(signal.SIGSTOP)
            time.sleep(STOPPED_S if kind == "stop" else 0.4)
            process.send_signal(signal.SIGCONT)
            time.sleep(0.1)
        server.well = True

    def note_crashes(self, server: Server) -> None:
        """A server that said it met a bug, or that ended by itself, died of a fault of its own."""
        assert server.process is not None
        said = "\n".join(server.process.lines)
        ended = server.process.process.poll() not in (None, -signal.SIGKILL)
        if ended or "Traceback" in said:
            self.crashes += 1
            print(f"a server of blocks {server.span} crashed:\n{said}", flush=True)

    def _new_identity(self) -> Path:
        self._started += 1
        return self.folder / f"identity{self._started}"


class Monkey:
    """Harms one server every few seconds, the same ones for the same seed, until `count` faults were made."""

    def __init__(self, swarm: Swarm, count: int, every_s: float, seed: int):
        self.faults: list[Fault] = []
        self.stats = SwarmStats()  # of the client that runs meanwhile
        self._swarm, self._count, self._every_s = swarm, count, every_s
        self._random = random.Random(seed)
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
            for each in self._threads:
                each.join()

    def _run(self) -> None:
        kinds: list[str] = []
        while len(self.faults) < self._count and not self._stop.wait(self._every_s):
            servers = self._swarm.servers
            able = [s for s in servers if s.well and any(o.well and o.span == s.span for o in servers if o is not s)]
            if not able:
                continue
            kinds = kinds or self._random.sample(KINDS, len(KINDS))
            kind, server = kinds.pop(), self._random.choice(able)
            server.well = False
            fault = Fault(kind=kind, peer=server.peer, at_s=time.time())
            self.faults.append(fault)
            self._threads.append(threading.Thread(target=self._harm, args=(server, fault)))
            self._threads[-1].start()

    def _harm(self, server: Server, fault: Fault) -> None:
        before = replace(self.stats.servers.get(fault.peer, ServerTimes()))
        self._swarm.harm(server, fault.kind)
        after = self.stats.servers.get(fault.peer, ServerTimes())
        calls = after.calls - before.calls
        if fault.kind == "slow" and before.calls and calls:
            fault.lost_s = (after.reply_s - before.reply_s) / calls - before.reply_s / before.calls
            fault.what = f"{calls} requests were slow"


class Repairs(logging.Handler):
    """What the client logs when work goes on that had failed: when, after how long, and over which server."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seen: list[tuple[float, float, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("went on after"):
            seconds, error = record.args  # type: ignore[misc]
            self.seen.append((record.created, float(seconds), str(error)))  # type: ignore[arg-type]
        elif record.levelno >= logging.WARNING:
            print(record.getMessage(), flush=True)

    def attribute(self, faults: Sequence[Fault]) -> None:
        """Tell each fault what it cost."""
        for at_s, seconds, error in self.seen:
            began_s = at_s - seconds
            culprits = [f for f in faults if f.peer in error and f.at_s <= at_s <= f.at_s + WINDOW_S]
            if culprits:
                fault = culprits[-1]
                lost_s = at_s - max(began_s, fault.at_s)
                if fault.lost_s is None or lost_s > fault.lost_s:
                    fault.lost_s, fault.what = lost_s, error.partition("\n")[0]


def main() -> None:
    options = arguments()
    repairs = Repairs()
    logging.getLogger("petals_tune.swarm.chain").addHandler(repairs)
    logging.getLogger("petals_tune.swarm.chain").setLevel(logging.INFO)
    source = model_folder(options.model)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        swarm = Swarm(source, folder, stack)
        swarm.open()
        calm, calm_stats, calm_s = trained(options, swarm, folder / "calm", None)
        monkey = Monkey(swarm, options.faults, options.every_s, options.seed)
        stormy, stats, stormy_s = trained(options, swarm, folder / "stormy", monkey)
        for server in swarm.servers:
            swarm.note_crashes(server)
    repairs.attribute(monkey.faults)
    figures = report(monkey.faults, calm, stormy, stats)
    figures |= {"server_crashes": swarm.crashes, "undisturbed_s": round(calm_s), "disturbed_s": round(stormy_s)}
    figures |= {"undisturbed_retries": calm_stats.retries, "load_average": os.getloadavg()[0]}
    print(json.dumps(figures))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipe", default="personachat")
    parser.add_argument("--model", default="embedded", help="embedded, or a folder in Hugging Face format")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--every-s", type=float, default=2.5, help="pause between two faults, at least")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of faults")
    return parser.parse_args()


def trained(
    options: argparse.Namespace, swarm: Swarm, output: Path, monkey: Monkey | None
) -> tuple[list[float], SwarmStats, float]:
    """Losses by step, the client's totals, and the seconds of one run of the recipe."""
    peers = ",".join(server.addresses[0] for server in swarm.servers)
    overrides = [
        f"recipe={options.recipe}",
        f"model.source={swarm.source}",
        f"output_dir={output}",
        "logger=csv",
        "tuning=lora",
        "swarm=join",
        f"swarm.initial_peers=[{peers}]",
        "swarm.micro_batch_rows=1",
        "optimizer.lr=1e-3",
        "data.batch_size=2",
        "data.max_validation_rows=2",
        "~callbacks.replies",
        f"trainer.max_steps={options.steps}",
        f"trainer.val_check_interval={options.steps}",
    ]
    stats = SwarmStats()
    started_s = time.monotonic()

    @contextmanager
    def connect(parts: Parts) -> Iterator[Any]:
        nonlocal stats
        with remote_model(parts) as model, ExitStack() as stack:
            stats = model.remote_blocks.stats
            if monkey is not None:
                monkey.stats = stats
                stack.enter_context(monkey.running())
            yield model

    run(composed(overrides), connect)
    with (output / "metrics.csv").open(newline="") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    return losses, stats, time.monotonic() - started_s


def report(
    faults: Sequence[Fault], calm: Sequence[float], stormy: Sequence[float], stats: SwarmStats
) -> dict[str, Any]:
    """Print the table; the figures for the last line."""
    assert len(calm) == len(stormy)
    difference = max(abs(left - right) for left, right in zip(calm, stormy, strict=True))
    print(f"\n{len(calm)} steps, loss {calm[0]:.4f} -> {calm[-1]:.4f}; under faults {stormy[-1]:.4f}")
    print("| fault | made | work ran into it | lost, median (s) | lost, most (s) |\n|---|---|---|---|---|")
    medians, worst = {}, []
    for kind in KINDS:
        made = [fault for fault in faults if fault.kind == kind]
        lost = [fault.lost_s for fault in made if fault.lost_s is not None]
        medians[kind] = round(statistics.median(lost), 2) if lost else None
        most = f"{max(lost):.2f}" if lost else "-"
        print(f"| {kind} | {len(made)} | {len(lost)} | {medians[kind] or '-'} | {most} |")
        worst += sorted((f for f in made if f.lost_s is not None), key=lambda f: f.lost_s or 0.0)[-1:]
    for fault in worst:
        print(f"the worst {fault.kind}: {fault.lost_s:.2f} s; {fault.what}")
    return {
        "faults": len(faults),
        "felt": sum(fault.lost_s is not None for fault in faults),
        "retries": stats.retries,
        "recomputations": stats.recomputations,
        "recovery_s": medians["kill"],
        "recovery_by_kind_s": medians,
        "max_loss_diff": difference,
        "steps": len(calm),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
