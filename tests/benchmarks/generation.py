"""Tokens per second in one process against the same model over a local swarm.

    python tests/benchmarks/generation.py [--model default] [--quantization int8]

In-process means plain transformers, at the best of 1 and 2 threads, as it is (`ratio`) and with the matrix library and
the activations of the servers' blocks (`ratio_same`). The swarm is two server processes of one thread each, with real
p2p daemons. Both sides generate 64 tokens after 16, greedily, and take turns, so that a busy machine disturbs them
alike. What one more server adds to a token (`hop_ms`) is seen against a single server of all blocks; `echo_ms` is a
Ping of as many bytes as a step sends and receives, over the stream that steps take, and `echo_daemon_ms` one through
the p2p daemons. The eight clients are processes, as they are in life, each with its model, connection and session; then
each with a LoRA of its own as well, against one client with one. The last line is JSON.

Where a token of eight clients goes (random BLOOM, fp32, 2 busy cores; processor time, medians of 3): servers 4.2 ms,
clients 2.6 ms, p2p daemons 0.9 ms; 7.7 ms in all, and 12.0 ms with one client alone, so two cores that never idle could
reach 3.1 times its tokens/s. A step takes 3.1 ms for one session, 3.9 for two, 4.9 for four and 6 to 6.7 for eight, and
on average 2.7 share one. When steps did not wait for each other (the step batcher) it was 1.7, and servers took
5.8 ms. Waiting longer makes larger batches, and idle cores: 3.7 steps a batch gave fewer tokens/s. Half of a client's
time is the library's `generate`, the rest messages.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import peft
import torch
from transformers.utils import logging

from petals_tune.blocks.kernels import matrix_library
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.remote.auto import AutoDistributedModelForCausalLM
from petals_tune.swarm import loop
from petals_tune.swarm.local import local_swarm
from petals_tune.tuning.support import tune
from petals_tune.wire.messages import Ping
from tests.benchmarks.in_process import THREADS, in_process, model_source

PROMPT_TOKENS, NEW_TOKENS = 16, 64
ROWS = CLIENTS = 8


class Side:
    """Something that generates, and the seconds that it took each time."""

    def __init__(self, name: str, generate: Callable[[], None], *, rows: int = 1, threads: int = 1):
        self.name, self._generate, self._rows, self._threads = name, generate, rows, threads
        self.seconds: list[float] = []

    def turn(self) -> None:
        torch.set_num_threads(self._threads)
        started_s = time.perf_counter()
        self._generate()
        self.seconds.append(time.perf_counter() - started_s)

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def tokens_per_s(self) -> float:
        return self._rows * NEW_TOKENS / self.median_s


def main() -> None:
    options = arguments()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with ExitStack() as stack:
        figures = compared(model_source(options.model, stack), options, stack)
    print(json.dumps(figures))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="bloom", help="bloom (random, 12 x 512), default (embedded), or a folder")
    parser.add_argument("--quantization", default="none", choices=("none", "int8", "nf4"), help="of both sides' blocks")
    parser.add_argument("--hand-over", default="auto", choices=("auto", "always", "never"), help="between the servers")
    parser.add_argument("--rounds", type=int, default=7, help="measured turns of each side")
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS, help="of the in-process sides")
    parser.add_argument("--clients", action=argparse.BooleanOptionalAction, default=True, help="also eight at once")
    return parser.parse_args()


def compared(source: str, options: argparse.Namespace, stack: ExitStack) -> dict[str, Any]:
    config = Checkpoint(source).config
    blocks = config.num_hidden_layers
    halves = [f"0:{blocks // 2}", f"{blocks // 2}:{blocks}"]

    def swarm(*spans: str) -> list[str]:
        return stack.enter_context(local_swarm(source, spans=spans, quantization=options.quantization))

    def remote(peers: list[str], **more: Any) -> Any:
        model = AutoDistributedModelForCausalLM.from_pretrained(
            source, initial_peers=peers, hand_over=options.hand_over, **more
        )
        stack.callback(model.remote_blocks.close)
        return model

    torch.manual_seed(1)
    ids = torch.randint(config.vocab_size, (ROWS, PROMPT_TOKENS))
    two, one = swarm(*halves), swarm(f"0:{blocks}")
    chain, whole = remote(two), remote(one)

    def rows(model: Any, count: int) -> Callable[[], None]:
        return lambda: generate(model, ids[:count])

    single = Side("one stream, two servers", rows(chain, 1))
    single_whole = Side("one stream, one server", rows(whole, 1))
    batch = Side("batch of 8, two servers", rows(chain, ROWS), rows=ROWS)
    sides = [single, single_whole, batch]
    local: dict[tuple[int, bool], list[Side]] = {(count, same): [] for same in (False, True) for count in (1, ROWS)}
    for (count, same), own in local.items():
        model = in_process(source, options.quantization, same_kernels=same).eval()
        for threads in options.threads:
            what = "one stream" if count == 1 else "batch of 8"
            name = f"{what}, in-process{', same kernels' * same}, {threads} threads"
            own.append(Side(name, rows(model, count), rows=count, threads=threads))
        sides += own
    if options.clients:
        own_chain = with_lora(remote(two), seed=0)
        single_lora = Side("one client with a LoRA, two servers", rows(own_chain, 1))
        clients = [stack.enter_context(client_process(source, two, ids[row : row + 1], row)) for row in range(CLIENTS)]
        at_once = Side("eight clients, two servers", partial(all_at_once, clients, "plain"), rows=CLIENTS)
        each_own = Side("eight clients with a LoRA each", partial(all_at_once, clients, "LoRA"), rows=CLIENTS)
        sides += [single_lora, at_once, each_own]
    for side in sides:
        side.turn()
        side.seconds.clear()
    echoes = {"echo_ms": whole, "echo_daemon_ms": remote(one, direct=False)}
    step_bytes = bytes_of_a_step(whole, ids[:1])
    echo_s: dict[str, list[float]] = {name: [] for name in echoes}
    for _ in range(options.rounds):
        for side in sides:
            side.turn()
        for name, model in echoes.items():
            echo_s[name] += echo_seconds(model, step_bytes, NEW_TOKENS)

    print(f"{NEW_TOKENS} new tokens after {PROMPT_TOKENS}, {options.quantization} blocks, medians of {options.rounds}")
    print("| side | tokens/s | s |")
    print("|---|---|---|")
    for side in sides:
        print(f"| {side.name} | {side.tokens_per_s:.1f} | {side.median_s:.3f} |")

    def ratio(side: Side, count: int, *, same: bool) -> float:
        return side.tokens_per_s / max(each.tokens_per_s for each in local[count, same])

    hop_ms = 1000 * (single.median_s - single_whole.median_s) / NEW_TOKENS
    echo_ms = {name: 1000 * statistics.median(seconds) for name, seconds in echo_s.items()}
    figures = {
        "model": options.model,
        "quantization": options.quantization,
        "matrix_library": matrix_library(),
        "load_average": os.getloadavg()[0],
        "single_ratio_same": ratio(single, 1, same=True),
        "single_ratio": ratio(single, 1, same=False),
        "batch8_ratio_same": ratio(batch, ROWS, same=True),
        "batch8_ratio": ratio(batch, ROWS, same=False),
        "hop_ms": hop_ms,
        **echo_ms,
        "hop_over_echo_ms": hop_ms - echo_ms["echo_ms"],
        "hop_over_daemon_echo_ms": hop_ms - echo_ms["echo_daemon_ms"],
    }
    if options.clients:
        figures["clients8_speedup"] = at_once.tokens_per_s / single.tokens_per_s
        figures["clients8_adapters_speedup"] = each_own.tokens_per_s / single_lora.tokens_per_s
    return figures


def bytes_of_a_step(model: Any, ids: torch.Tensor) -> int:
    """Bytes that a token of one stream sends to a server and receives from it."""
    stats = model.remote_blocks.stats
    before = stats.sent_bytes + stats.received_bytes
    generate(model, ids)
    return (stats.sent_bytes + stats.received_bytes - before) // NEW_TOKENS


def echo_seconds(model: Any, size: int, count: int) -> list[float]:
    """Seconds of `count` Pings of `size` bytes over the stream to the first server of a model."""
    blocks = model.remote_blocks
    client, (server, *_) = blocks.backbone.chain.client, blocks.servers()
    stream = loop.run(client.stream(server))
    seconds = []
    for _ in range(count):
        started_s = time.perf_counter()
        loop.run(stream.call(Ping(filler=bytes(size)), timeout_s=60.0))
        seconds.append(time.perf_counter() - started_s)
    return seconds


def with_lora(model: Any, *, seed: int) -> Any:
    """The model with a LoRA of rank 8 on all linears that changes its output."""
    torch.manual_seed(seed)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear", init_lora_weights=False)
    return tune(model, lora).eval()


def all_at_once(clients: list[Connection], what: str) -> None:
    """Let each client generate, with its LoRA or without."""
    for client in clients:
        client.send(what)
    for client in clients:
        client.recv()


@contextmanager
def client_process(source: str, peers: list[str], ids: torch.Tensor, seed: int) -> Iterator[Connection]:
    """A client in a process of its own, which generates once for each message on the connection, and then answers."""
    ours, theirs = multiprocessing.Pipe()
    arguments = (theirs, source, peers, ids.tolist(), seed)
    process = multiprocessing.get_context("spawn").Process(target=client, args=arguments)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join()


def client(connection: Connection, source: str, peers: list[str], ids: list[list[int]], seed: int) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoDistributedModelForCausalLM.from_pretrained(source, initial_peers=peers)
    net = with_lora(model, seed=seed)
    try:
        while True:
            with net.disable_adapter() if connection.recv() == "plain" else nullcontext():
                generate(net, torch.tensor(ids))
            connection.send("done")
    except EOFError:
        model.remote_blocks.close()


def generate(model: Any, ids: torch.Tensor) -> None:
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    assert output.shape[1] == PROMPT_TOKENS + NEW_TOKENS


if __name__ == "__main__":
    main()
