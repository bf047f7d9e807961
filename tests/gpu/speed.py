"""Section: a model of Llama-3-8B's shape, seconds until servers are ready, and tokens/s against plain transformers.

Two servers of half the blocks each and all clients are processes on this machine, with p2p daemons between. What runs
in this process is the client of one stream, and plain transformers on the same card. Sides that are compared run in
turns, and the clients of many sessions start when nothing else is timed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.net.stream import ServerStream
from petals_tune.swarm import loop
from petals_tune.swarm.local import server_process
from petals_tune.wire.messages import Ping
from tests.gpu import check, training
from tests.gpu.client import generate
from tests.gpu.context import Context
from tests.gpu.models import wait_for_large
from tests.gpu.parity import plain_model
from tests.gpu.swarm import ready_line

READY_S = 90.0
PROCESSES = 8
PING_BYTES = 8 * 2**20


def run(context: Context) -> None:
    folder = wait_for_large(context)
    blocks = Checkpoint(str(folder)).config.num_hidden_layers
    context.row("blocks of the large model", blocks, note="Llama-3-8B's shape has 32")
    common = [f"model.source='{folder}'", f"device={context.device}", "throughput=1000"]
    common += [f"disk.folder={context.work}/disk", "limits.max_lease_gb=8"]
    with context.trying("two servers in bfloat16"), ExitStack() as stack:
        compare(context, stack, folder, [*common, "quantization=none", "dtype=bfloat16"], blocks)
    with context.trying("int8"):
        time_to_ready(context, [*common, "quantization=int8", f"blocks='0:{blocks}'"])


def time_to_ready(context: Context, options: list[str]) -> None:
    """Of a server of the whole model in int8: the first time, which quantizes; and one stream through it."""
    before, started_s = context.used_bytes(), time.monotonic()
    with server_process(options, threads=4) as server:
        peers = server.wait_until_ready(READY_S)
        context.row("whole model in int8, start to ready", time.monotonic() - started_s, "s", note=ready_line(server))
        context.row("whole model in int8, memory of the card", (context.used_bytes() - before) / 2**30, "GB")
        with remote(options[0].partition("=")[2].strip("'"), peers) as model:
            new = 16 if context.rehearse else 32
            seconds = context.seconds(lambda: generate(model, 0, new), times=3)
            context.row("whole model in int8, one stream", new / seconds, "tokens/s")
        context.row("whole model in int8, after it", (context.used_bytes() - before) / 2**30, "GB")


def compare(context: Context, stack: ExitStack, folder: Path, common: list[str], blocks: int) -> None:
    before, started_s = context.used_bytes(), time.monotonic()
    half = blocks // 2
    first = stack.enter_context(server_process([*common, f"blocks='0:{half}'"], threads=4))
    peers = first.wait_until_ready(READY_S)
    joined = f"swarm.initial_peers=[{','.join(peers)}]"
    second = stack.enter_context(server_process([*common, f"blocks='{half}:{blocks}'", joined], threads=4))
    second.wait_until_ready(READY_S)
    context.row("two servers in bfloat16, start to ready", time.monotonic() - started_s, "s")
    context.row("two servers in bfloat16, memory of the card", (context.used_bytes() - before) / 2**30, "GB")
    plain = plain_model(context, folder, "none", torch.bfloat16)
    model = stack.enter_context(remote(str(folder), peers))
    new = 16 if context.rehearse else 32
    given = {"folder": str(folder), "peers": peers, "sessions": sessions_per_process(context)}
    with context.trying("training"):
        line = line_mb_s(model)
        context.row("line to a server and back", line, "MB/s", note="measured with 8 MB")
        with processes(context, "training", given, count=1) as (client,):
            training.measure(context, plain, client, line)
    one = streams(context, plain, model, new)
    del plain
    context.forget()
    with (
        context.trying("many sessions"),
        processes(context, "client", given, count=2 if context.rehearse else PROCESSES) as clients,
    ):
        many(context, clients, new, one)


def streams(context: Context, plain: Any, model: Any, new: int) -> float:
    """Tokens/s of one stream over the swarm; against plain transformers, for one row and for eight."""
    one = 0.0
    for rows, goal in ((1, 0.8), (8, 0.9)):
        with context.trying(f"{rows} rows"):
            sides = [partial(generate, each, 0, new, rows=rows) for each in (plain, model)]
            local_s, ours_s = context.in_turns(*sides)
            what = "one stream" if rows == 1 else f"batch of {rows}"
            context.row(f"{what}, plain transformers", rows * new / local_s, "tokens/s")
            context.row(f"{what}, two servers", rows * new / ours_s, "tokens/s")
            context.row(f"{what}, share of plain", local_s / ours_s, at_least=goal)
            one = one or new / ours_s
    return one


def line_mb_s(model: Any) -> float:
    """MB/s of a message to a server that is answered with a few bytes."""
    client = model.remote_blocks.backbone.chain.client
    server = model.remote_blocks.servers()[0]

    async def ping() -> float:
        stream: ServerStream = await client.stream(server)
        found = []
        for size in (0, PING_BYTES, PING_BYTES, PING_BYTES):
            filler, started_s = os.urandom(size), time.perf_counter()
            await stream.call(Ping(filler=filler), timeout_s=30.0)
            found.append(time.perf_counter() - started_s)
        return PING_BYTES / 1e6 / max(min(found[1:]) - found[0], 1e-6)

    return loop.run(ping())


def many(context: Context, clients: list[subprocess.Popen[str]], new: int, one: float) -> None:
    """64 sessions from 8 processes."""
    for client in clients:
        assert client.stdout is not None
        line = client.stdout.readline().strip()
        if line != "ready":
            raise RuntimeError(f"a client did not come up: {line!r}")
    sessions = sessions_per_process(context)
    for tokens in (4, new):  # the first round is not measured
        started_s = time.monotonic()
        for client in clients:
            assert client.stdin is not None
            client.stdin.write(f"{tokens}\n")
            client.stdin.flush()
        for client in clients:
            assert client.stdout is not None
            float(client.stdout.readline())
        seconds = time.monotonic() - started_s
    total = len(clients) * sessions * new / seconds
    what = f"{len(clients) * sessions} sessions from {len(clients)} processes"
    context.row(what, total, "tokens/s", note=f"{seconds:.1f} s")
    context.row(f"{what}, against one stream", total / one, "x", at_least=15)


def sessions_per_process(context: Context) -> int:
    return 2 if context.rehearse else 8


@contextmanager
def processes(
    context: Context, role: str, given: dict[str, Any], *, count: int
) -> Iterator[list[subprocess.Popen[str]]]:
    """This script as child processes of a role, which end with the block; a training one has the card."""
    device = context.device if role == "training" else "cpu"
    command = [sys.executable, "-u", check.__file__, "--child", role, "--client", json.dumps(given)]
    command += ["--work", str(context.work)] + (["--rehearse"] if context.rehearse else ["--device", device])
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=check.environment())
        for _ in range(count)
    ]
    try:
        yield started
    finally:
        for each in started:
            each.kill()
            each.wait()


@contextmanager
def remote(source: str, peers: list[str], **options: Any) -> Iterator[Any]:
    """The model with remote blocks; the client's own part is on the CPU."""
    model = AutoDistributedModelForCausalLM.from_pretrained(source, initial_peers=peers, **options)
    try:
        yield model
    finally:
        model.remote_blocks.close()
