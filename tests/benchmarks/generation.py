"""Tokens per second in one process against the same model over a local swarm.

    python tests/benchmarks/generation.py [--model default] [--quantization int8]

In-process means plain transformers, at the best of 1 and 2 threads. The swarm is two server processes of one thread
each, with real p2p daemons. Both sides generate 64 tokens after 16, greedily, and take turns, so that a busy machine
disturbs them alike. What one more server adds to a step is seen against a single server of all blocks. The eight
clients are processes, as they are in life, each with its model, connection and session. The last line is JSON.

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
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, BloomConfig
from transformers.utils import logging

from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.convert import embedded_model
from petals_tune.remote.auto import AutoDistributedModelForCausalLM
from petals_tune.swarm.local import local_swarm

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
    parser.add_argument("--threads", default="1,2", help="of the in-process sides")
    parser.add_argument("--clients", action=argparse.BooleanOptionalAction, default=True, help="also eight at once")
    return parser.parse_args()


def model_source(name: str, stack: ExitStack) -> str:
    """A folder in Hugging Face format."""
    if name == "default":
        return str(embedded_model())
    if name != "bloom":
        return name
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    torch.manual_seed(0)
    config = BloomConfig(n_layer=12, hidden_size=512, n_head=8, vocab_size=1024)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def compared(source: str, options: argparse.Namespace, stack: ExitStack) -> dict[str, Any]:
    config = Checkpoint(source).config
    blocks = config.num_hidden_layers
    halves = [f"0:{blocks // 2}", f"{blocks // 2}:{blocks}"]

    def swarm(*spans: str) -> list[str]:
        return stack.enter_context(local_swarm(source, spans=spans, quantization=options.quantization))

    def remote(peers: list[str]) -> Any:
        model = AutoDistributedModelForCausalLM.from_pretrained(
            source, initial_peers=peers, hand_over=options.hand_over
        )
        stack.callback(model.remote_blocks.close)
        return model

    torch.manual_seed(1)
    ids = torch.randint(config.vocab_size, (ROWS, PROMPT_TOKENS))
    local, two, one = in_process(source, options), swarm(*halves), swarm(f"0:{blocks}")
    chain, whole = remote(two), remote(one)

    def rows(model: Any, count: int) -> Callable[[], None]:
        return lambda: generate(model, ids[:count])

    def in_process_sides(what: str, count: int) -> list[Side]:
        threads = [int(number) for number in options.threads.split(",")]
        return [Side(f"{what}, in-process, {n} threads", rows(local, count), rows=count, threads=n) for n in threads]

    single_local, batch_local = in_process_sides("one stream", 1), in_process_sides("batch of 8", ROWS)
    single = Side("one stream, two servers", rows(chain, 1))
    single_whole = Side("one stream, one server", rows(whole, 1))
    batch = Side("batch of 8, two servers", rows(chain, ROWS), rows=ROWS)
    sides = [*single_local, single, single_whole, *batch_local, batch]
    if options.clients:
        clients = [stack.enter_context(client_process(source, two, ids[row : row + 1])) for row in range(CLIENTS)]

        def all_clients() -> None:
            for client in clients:
                client.send("generate")
            for client in clients:
                client.recv()

        at_once = Side("eight clients, two servers", all_clients, rows=CLIENTS)
        sides.append(at_once)
    for side in sides:
        side.turn()
        side.seconds.clear()
    for _ in range(options.rounds):
        for side in sides:
            side.turn()

    print(f"{NEW_TOKENS} new tokens after {PROMPT_TOKENS}, {options.quantization} blocks, medians of {options.rounds}")
    print("| side | tokens/s | s |")
    print("|---|---|---|")
    for side in sides:
        print(f"| {side.name} | {side.tokens_per_s:.1f} | {side.median_s:.3f} |")
    figures = {
        "model": options.model,
        "quantization": options.quantization,
        "load_average": os.getloadavg()[0],
        "single_ratio": single.tokens_per_s / max(side.tokens_per_s for side in single_local),
        "batch8_ratio": batch.tokens_per_s / max(side.tokens_per_s for side in batch_local),
        "hop_ms": 1000 * (single.median_s - single_whole.median_s) / NEW_TOKENS,
    }
    if options.clients:
        figures["clients8_speedup"] = at_once.tokens_per_s / single.tokens_per_s
    return figures


@contextmanager
def client_process(source: str, peers: list[str], ids: torch.Tensor) -> Iterator[Connection]:
    """A client in a process of its own, which generates once for each message on the connection, and then answers."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=client, args=(theirs, source, peers, ids.tolist()))
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join()


def client(connection: Connection, source: str, peers: list[str], ids: list[list[int]]) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoDistributedModelForCausalLM.from_pretrained(source, initial_peers=peers)
    try:
        while True:
            connection.recv()
            generate(model, torch.tensor(ids))
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


def in_process(source: str, options: argparse.Namespace) -> Any:
    quantized = {}
    if options.quantization == "int8":
        quantized["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    if options.quantization == "nf4":
        quantized["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **quantized).requires_grad_(False).eval()


if __name__ == "__main__":
    main()
