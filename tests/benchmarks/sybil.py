"""Invented servers in a swarm of ten honest ones: steps a second, time to join, and who is blinded.

    python tests/benchmarks/sybil.py [--invented 10 100 500 2000] [--rounds 12]

Real servers, each with a p2p daemon at an address 127.0.y.1 of its own, and a client that trains over real streams;
against them, 16 real attackers at 127.0.x.1 (tests/faults/sybil_attack.py) and the identities that these invent, which
are put into the honest nodes' stores as well, as if their owners could have been reached once. A second swarm of ten
servers in another process, which nobody attacks, does the same steps by turns: steps are compared with its steps, and
with the same comparison before the attack, so that a busy machine counts for nothing.

Blinded: readers, newcomers and old ones, servers too, that do not see honest servers of all blocks. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import peft
import torch

from petals_tune.model.checkpoint import Checkpoint
from petals_tune.net.dht.directory import DhtDirectory
from petals_tune.net.dht.keys import MAX_DEPTH, Spot
from petals_tune.net.hivemind_p2p import HivemindTransport
from petals_tune.remote.auto import AutoDistributedModelForCausalLM
from petals_tune.swarm import loop
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan, gaps
from servers.server import serve
from tests.faults.sybil_attack import Target, attack, invented
from tests.models import BLOCKS, VOCABULARY, save_model
from tests.servers.hosting import options_of

SPANS = ["0:3", "3:6"] * 5
WHOLE = BlockSpan(0, BLOCKS)
ROWS, LENGTH = 4, 32
STEPS = 4  # in a round
SETTLE_S = 20.0  # clients read the directory every 15 s
OLD_READERS = NEWCOMERS = 3


class Swarm:
    """Ten servers in this process, and a client."""

    def __init__(self, folder: Path, first_network: int, stack: ExitStack):
        self.folder = folder
        self.directories: list[DhtDirectory] = []  # of the servers
        self.servers: list[ServerRecord] = []
        join = DhtDirectory.join

        async def join_noted(*args: Any, **given: Any) -> DhtDirectory:
            directory = await join(*args, **given)
            self.directories.append(directory)
            return directory

        with mock.patch.object(DhtDirectory, "join", join_noted):
            for number, span in enumerate(SPANS):
                self._start(f"/ip4/127.0.{first_network + number}.1/tcp/0", span, stack)
        self.client = Client(self, stack)

    @property
    def initial_peers(self) -> list[str]:
        return [server.addresses[0] for server in self.servers[:2]]

    def _start(self, address: str, span: str, stack: ExitStack) -> None:
        options = options_of(
            f"model.source='{self.folder}'",
            f"blocks='{span}'",
            "quantization=none",
            "threads=1",
            "throughput=1000",
            f"disk.folder='{self.folder.parent}'",
            f"swarm.host_maddrs=[{address}]",
            f"swarm.initial_peers=[{','.join(self.initial_peers)}]",
        )
        ready: Future[ServerRecord] = Future()
        stop = asyncio.Event()
        running = asyncio.run_coroutine_threadsafe(
            serve(options, lambda record, _: ready.set_result(record), stop), loop.background_loop()
        )

        def end() -> None:
            loop.background_loop().call_soon_threadsafe(stop.set)
            running.result(60)

        stack.callback(end)
        self.servers.append(ready.result(120))

    def sees_all(self, seen: Sequence[ServerRecord]) -> bool:
        """Whether honest servers of all blocks are among those that a reader sees."""
        honest = {server.peer for server in self.servers}
        return not gaps([server.blocks for server in seen if server.peer in honest], WHOLE)


class Client:
    """Trains a soft prompt, one row a micro-batch."""

    def __init__(self, swarm: Swarm, stack: ExitStack):
        self.model: Any = AutoDistributedModelForCausalLM.from_pretrained(
            str(swarm.folder), initial_peers=swarm.initial_peers, micro_batch_rows=1
        )
        stack.callback(self.model.remote_blocks.close)
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        self._net = peft.get_peft_model(self.model, config).train()

    def steps(self, count: int) -> float:
        """Seconds that so many training steps take."""
        began_s = time.perf_counter()
        for _ in range(count):
            ids = torch.randint(VOCABULARY, (ROWS, LENGTH))
            self._net(input_ids=ids, labels=ids).loss.backward()
        return time.perf_counter() - began_s


def undisturbed(pipe: Connection, folder: Path) -> None:
    """Entry point of the process of the second swarm: does as many steps as it is told, and sends the seconds."""
    with ExitStack() as stack:
        swarm = Swarm(folder, 60, stack)
        pipe.send(None)
        while count := pipe.recv():
            pipe.send(swarm.client.steps(count))


@contextmanager
def process(entry: Any, *args: Any) -> Iterator[Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=entry, args=(theirs, *args), daemon=True)
    child.start()
    try:
        yield ours
    finally:
        ours.send(None)
        child.join(60)
        child.kill()


def compare(client: Client, control: Connection, rounds: int) -> tuple[float, float, float]:
    """Steps a second of `client` in those of the undisturbed one: median of the rounds, and of all steps together.

    Last, the median seconds of a step of `client`.
    """
    own_s, control_s = [], []
    for _ in range(rounds):
        own_s.append(client.steps(STEPS))
        control.send(STEPS)
        control_s.append(control.recv())
    ratios = [theirs / ours for ours, theirs in zip(own_s, control_s, strict=True)]
    return statistics.median(ratios), sum(control_s) / sum(own_s), statistics.median(own_s) / STEPS


async def new_reader(swarm: Swarm, stack: ExitStack) -> DhtDirectory:
    transport = await HivemindTransport.start(swarm.initial_peers, listens=False)
    stack.callback(lambda: loop.run(transport.stop()))
    directory = await DhtDirectory.join(transport, swarm.initial_peers, client_mode=True)
    stack.callback(lambda: loop.run(directory.leave()))
    return directory


async def plant(swarm: Swarm, announcements: Sequence[tuple[bytes, str]]) -> None:
    """Put invented servers into the honest nodes, as deep as there is room, as their owners would."""
    now_s = time.time()
    for directory in swarm.directories:
        protocol = directory.node.protocol
        for data, network in announcements:
            announcement = protocol.opener.open(data, now_s)
            any(protocol.store.put(Spot(0, depth), announcement, network, now_s) for depth in range(MAX_DEPTH + 1))
        await asyncio.sleep(0)


def level(
    swarm: Swarm, control: Connection, old: Sequence[DhtDirectory], digest: str, rounds: int
) -> dict[str, float | int]:
    """Measure while the attack is as it is now."""
    blinded = Counter(new=0, old=0, servers=0)
    readings = 0

    def read(**readers: Sequence[DhtDirectory]) -> None:
        nonlocal readings
        for kind, reader in ((kind, reader) for kind, some in readers.items() for reader in some):
            seen = loop.run(reader.snapshot(digest, WHOLE)).servers
            blinded[kind] += not swarm.sees_all(seen)
            readings += 1

    until_s = time.monotonic() + SETTLE_S
    while time.monotonic() < until_s:
        swarm.client.steps(STEPS)
    joined_s = []
    for _ in range(NEWCOMERS):
        with ExitStack() as stack:
            began_s = time.perf_counter()
            Client(swarm, stack).steps(1)
            joined_s.append(time.perf_counter() - began_s)
            read(new=[loop.run(new_reader(swarm, stack))])
        read(old=old, servers=swarm.directories)
    ratio, of_all, step_s = compare(swarm.client, control, rounds)
    read(old=old, servers=swarm.directories)
    joined = {"join_s": max(joined_s), **blinded, "blinded": blinded.total(), "readings": readings}
    return {"ratio": ratio, "of_all": of_all, "step_s": step_s, **joined}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--invented", type=int, nargs="*", default=[10, 100, 500, 2000])
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = save_model(Path(temporary) / "model", "llama")
        digest = Checkpoint(str(folder)).digest
        control = stack.enter_context(process(undisturbed, folder))
        swarm = Swarm(folder, 20, stack)
        control.recv()
        old = [loop.run(new_reader(swarm, stack)) for _ in range(OLD_READERS)]
        columns = ("ratio", "of_all", "step_s", "join_s", "new", "old", "servers", "readings")
        print("| invented | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))

        def show(name: object, found: dict[str, float | int]) -> dict[str, float | int]:
            print(f"| {name} | " + " | ".join(f"{found[each]:.3g}" for each in columns) + " |", flush=True)
            return found

        before = show("no attack", level(swarm, control, old, digest, options.rounds))
        target = Target(digest, BLOCKS, tuple(swarm.initial_peers), tuple(server.peer for server in swarm.servers))
        attackers = stack.enter_context(process(attack, target))
        ports = attackers.recv()
        levels = []
        for count in options.invented:
            attackers.send(count)
            attackers.recv()
            announcements = list(itertools.islice(invented(target, ports), count))
            loop.run(plant(swarm, announcements))
            levels.append(show(count, level(swarm, control, old, digest, options.rounds)))
    figures = {
        "worst_ratio": round(min(each["ratio"] for each in levels) / before["ratio"], 3),
        "worst_ratio_of_all": round(min(each["of_all"] for each in levels) / before["of_all"], 3),
        "join_s": round(max(each["join_s"] for each in levels), 1),
        "blinded": sum(each["blinded"] for each in levels),
        "readings": sum(each["readings"] for each in levels),
    }
    print(json.dumps({**figures, "load_average": os.getloadavg()[0]}))


if __name__ == "__main__":
    main()
