"""What the service costs beside the same calls from Python: processor time a token, first token, training step.

    python tests/benchmarks/service.py [--model small] [--rounds 5] [--quick]

One swarm of two server processes, and three more processes of one thread each for torch: the gateway
(`python -m petals_tune.serve`), the Python path (petals_tune without HTTP) and the clients (SDKs openai and tinker).
The sides take turns, so that a busy machine disturbs them alike; medians of the rounds.

- `gateway_ms_a_token_N`: processor time of the gateway's process for a token of N chats that are streamed at once, less
  that of the Python path, where N threads take greedy steps of the same sessions. `over_generate_ms_a_token_N` is the
  same beside N threads in `model.generate`, which is what a user would write.
- `ttft_over_python_ms`: time from a chat's messages to its first text, over the Python path's to its first token.
- `tinker_ratio`: seconds of forward and backward of a LoRA on a batch in the Python path, over those of the SDK's
  `forward_backward`. Each is followed by a step of AdamW, so that the adapter goes to the servers anew.

`--model small` is a random Llama of 6 x 128 with the embedded model's tokenizer, so that the head, which costs both
sides the same, does not drown the difference; `default` is the embedded model. The first token and training are always
of the embedded model. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import openai
import peft
import tinker
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.utils import logging

from petals_tune.data.chat_format import ChatFormat
from petals_tune.model.convert import embedded_model
from petals_tune.remote.auto import AutoDistributedModelForCausalLM
from petals_tune.swarm.local import local_swarm

STREAMS, MOST = (1, 8, 32), 32
ROWS, LENGTH, RANK, SEED = 4, 64, 8, 3  # of the training step
KEY = "tml-benchmark-of-the-service"
LEARNING_RATE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="small", help="of the chats: small (random), default (embedded), or a folder"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured turns of each side")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--quick", action="store_true", help="two rounds of short answers, to see that it runs")
    options = parser.parse_args()
    rounds, tokens = (2, 8) if options.quick else (options.rounds, options.tokens)
    figures: dict[str, float] = {"load_average": os.getloadavg()[0]}
    with ExitStack() as stack:
        figures |= compare_tokens(model_source(options.model, stack), rounds, tokens)
    figures |= compare_waits(str(embedded_model()), rounds)
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


def compare_tokens(source: str, rounds: int, tokens: int) -> dict[str, float]:
    """Print and return milliseconds of processor time a token, by the number of streams."""
    figures = {}
    print("| streams | gateway, ms a token | sessions, ms | generate, ms | gateway, tokens/s | sessions, tokens/s |")
    print("|---|---|---|---|---|---|")
    with sides(source) as (gateway, python, clients):
        turns = {
            "gateway": (gateway, clients, "stream"),
            "sessions": (python.pid, python, "step"),
            "generate": (python.pid, python, "generate"),
        }
        for streams in STREAMS:
            repeats = max(1, 8 // streams)  # one stream alone makes few tokens
            count = streams * repeats * tokens
            ms: dict[str, list[float]] = {name: [] for name in turns}
            seconds: dict[str, list[float]] = {name: [] for name in turns}
            for number in range(rounds + 1):
                for name, (process, side, call) in turns.items():
                    started_s, before_s = time.perf_counter(), processor_s(process)
                    made = side(call, streams, repeats, tokens)
                    if made != count:
                        raise SystemExit(f"{name}: {made} tokens at {streams} streams, not {count}")
                    if number:  # the first turns warm up
                        ms[name].append(1000 * (processor_s(process) - before_s) / count)
                        seconds[name].append(time.perf_counter() - started_s)
            cells = [f"{statistics.median(ms[name]):.2f}" for name in turns]
            cells += [f"{count / statistics.median(seconds[name]):.0f}" for name in ("gateway", "sessions")]
            print(f"| {streams} | {' | '.join(cells)} |", flush=True)
            figures[f"gateway_ms_a_token_{streams}"] = over(ms["gateway"], ms["sessions"])
            figures[f"over_generate_ms_a_token_{streams}"] = over(ms["gateway"], ms["generate"])
    return figures


def compare_waits(source: str, rounds: int) -> dict[str, float]:
    """Print and return the time to the first token, and the ratio of a training step."""
    with sides(source) as (_, python, clients):
        ms: dict[str, tuple[list[float], list[float]]] = {"first_token": ([], []), "train": ([], [])}
        losses = []
        for number in range(rounds + 1):
            for name, repeats in (("first_token", 4), ("train", 1)):
                for _ in range(repeats):
                    for side, of in zip((clients, python), ms[name], strict=True):
                        took_s, loss = side(name)
                        losses.append(loss)
                        if number:
                            of.append(1000 * took_s)
    ours, theirs = (losses[-2], losses[-1])
    if abs(ours - theirs) > 1e-3 * theirs:
        raise SystemExit(f"the training step had the loss {ours} by the SDK, and {theirs} from Python")
    print()
    print("| | service, ms | Python, ms |")
    print("|---|---|---|")
    for name, (service, python_) in ms.items():
        print(f"| {name} | {statistics.median(service):.0f} | {statistics.median(python_):.0f} |")
    return {
        "ttft_over_python_ms": over(*ms["first_token"]),
        "tinker_ratio": statistics.median(ms["train"][1]) / statistics.median(ms["train"][0]),
    }


def over(ours: list[float], theirs: list[float]) -> float:
    """The median of what each turn took more than its neighbour."""
    return statistics.median(one - other for one, other in zip(ours, theirs, strict=True))


def processor_s(process: int) -> float:
    """Processor time of another process, its threads together: to the nanosecond, where /proc has 10 ms."""
    return time.clock_gettime((~process << 3) | 2)  # as clock_getcpuclockid(3) makes the clock's id


def model_source(name: str, stack: ExitStack) -> str:
    """A folder in Hugging Face format."""
    if name == "default":
        return str(embedded_model())
    if name != "small":
        return name
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    shutil.copytree(embedded_model(), folder, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
    vocabulary = AutoConfig.from_pretrained(embedded_model()).vocab_size
    torch.manual_seed(0)
    config = LlamaConfig(**shape, num_key_value_heads=2, vocab_size=vocabulary, eos_token_id=2, bos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


# The sides, each in a process of its own.


class Worker:
    """A process that holds a side, whose methods are called by their names."""

    def __init__(self, connection: Connection, process: Any):
        self._connection, self.pid = connection, process.pid

    def __call__(self, name: str, *arguments: Any) -> Any:
        self._connection.send((name, arguments))
        return self._connection.recv()


@contextmanager
def sides(source: str) -> Iterator[tuple[int, Worker, Worker]]:
    """(The gateway's process, the Python path, the clients) over one swarm."""
    blocks = AutoConfig.from_pretrained(source).num_hidden_layers
    halves = [f"0:{blocks // 2}", f"{blocks // 2}:{blocks}"]
    with ExitStack() as stack:
        peers = stack.enter_context(local_swarm(source, spans=halves))
        process, url = stack.enter_context(gateway(source, peers))
        python = stack.enter_context(worker(Python, source, peers))
        yield process, python, stack.enter_context(worker(Clients, url))


@contextmanager
def gateway(source: str, peers: list[str]) -> Iterator[tuple[int, str]]:
    """(The process of a gateway of its own, its address)."""
    with tempfile.TemporaryDirectory() as folder:
        options = [f"model.source='{source}'", "swarm=join", f"swarm.initial_peers=[{','.join(peers)}]"]
        options += ["name=model", "port=0", f"folder='{folder}/data'", f"most_at_once={MOST}"]
        command = [sys.executable, "-m", "petals_tune.serve", *options]
        with (Path(folder) / "log").open("w") as log:
            process = subprocess.Popen(command, stderr=log, cwd=Path(__file__).parents[2])
        try:
            while not (found := re.search(r"http://\S+:\d+", (Path(folder) / "log").read_text())):
                if process.poll() is not None:
                    raise SystemExit((Path(folder) / "log").read_text())
                time.sleep(0.1)
            yield process.pid, found[0]
        finally:
            process.terminate()
            process.wait()


@contextmanager
def worker(side: type, *arguments: Any) -> Iterator[Worker]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=work, args=(theirs, side, arguments))
    process.start()
    theirs.close()
    try:
        yield Worker(ours, process)
    finally:
        ours.close()
        process.join()


def work(connection: Connection, side: type, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    held = side(*arguments)
    try:
        while True:
            name, given = connection.recv()
            connection.send(getattr(held, name)(*given))
    except EOFError:
        held.close()


def messages(number: int) -> list[Any]:
    return [{"role": "user", "content": f"Tell a long story about {number + 2} dogs, a ship and a storm at sea."}]


def batch() -> torch.Tensor:
    """(ROWS, LENGTH + 1) token ids."""
    return torch.randint(3, 5000, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(SEED))


class Python:
    """The Python path: sessions, `generate` and backward of petals_tune."""

    def __init__(self, source: str, peers: list[str]):
        self._model: Any = AutoDistributedModelForCausalLM.from_pretrained(source, initial_peers=peers)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(source)
        self._format = ChatFormat(self._tokenizer)
        self._threads = ThreadPoolExecutor(MOST)
        torch.manual_seed(SEED)
        lora = peft.LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=32, target_modules="all-linear")
        trained = self._model.adapters.add("trained", lora).parameters()
        self._optimizer = torch.optim.AdamW([each for each in trained if each.requires_grad], weight_decay=0.0)
        self._optimizer.param_groups[0].update(lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-12)

    def step(self, streams: int, repeats: int, tokens: int) -> int:
        return self._all(self._step, streams, repeats, tokens)

    def generate(self, streams: int, repeats: int, tokens: int) -> int:
        return self._all(self._generate, streams, repeats, tokens)

    def _all(self, answer: Callable[[int, int], int], streams: int, repeats: int, tokens: int) -> int:
        """The tokens of `streams` answers at once, several times over."""
        return sum(sum(self._threads.map(answer, range(streams), [tokens] * streams)) for _ in range(repeats))

    def _ids(self, number: int) -> torch.Tensor:
        text = self._format.prompt(messages(number))
        return self._tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids

    @torch.inference_mode()
    def _step(self, number: int, tokens: int) -> int:
        ids = self._ids(number)
        made: list[int] = []
        with self._model.remote_blocks.new_session(ids.shape[1] + tokens) as session:
            for _ in range(tokens):
                logits = self._model(input_ids=ids, past_key_values=session, logits_to_keep=1).logits
                made.append(int(logits[0, -1].argmax()))
                ids = torch.tensor([made[-1:]])
        self._tokenizer.decode(made)
        return len(made)

    def _generate(self, number: int, tokens: int) -> int:
        ids = self._ids(number)
        options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        made = self._model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
        self._tokenizer.decode(made)
        return len(made)

    def first_token(self) -> tuple[float, float]:
        started_s = time.perf_counter()
        self._step(0, 1)
        return time.perf_counter() - started_s, 0.0

    def train(self) -> tuple[float, float]:
        ids = batch()
        started_s = time.perf_counter()
        logits = self._model(input_ids=ids[:, :-1], use_cache=False, adapter="trained").logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        loss.backward()
        took_s = time.perf_counter() - started_s
        self._optimizer.step()
        self._optimizer.zero_grad()
        return took_s, loss.item()

    def close(self) -> None:
        self._threads.shutdown()
        self._model.remote_blocks.close()


class Clients:
    """The SDKs over HTTP."""

    def __init__(self, url: str):
        self._client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY)
        self._loop, self._url = asyncio.new_event_loop(), url
        self._tinker: tinker.ServiceClient | None = None
        self._trained: Any = None

    def stream(self, streams: int, repeats: int, tokens: int) -> int:
        async def all_of_them() -> int:
            return sum(await asyncio.gather(*(self._answer(number, tokens) for number in range(streams))))

        return sum(self._loop.run_until_complete(all_of_them()) for _ in range(repeats))

    async def _answer(self, number: int, tokens: int) -> int:
        made = 0
        async for chunk in await self._asked(number, tokens):
            made = made if chunk.usage is None else chunk.usage.completion_tokens
        return made

    async def _asked(self, number: int, tokens: int) -> Any:
        return await self._client.chat.completions.create(
            model="model",
            messages=messages(number),
            max_tokens=tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )

    def first_token(self) -> tuple[float, float]:
        async def first() -> float:
            started_s = time.perf_counter()
            async with await self._asked(0, 1) as chunks:
                async for chunk in chunks:
                    if chunk.choices and (chunk.choices[0].delta.content or chunk.choices[0].finish_reason):
                        break
            return time.perf_counter() - started_s

        return self._loop.run_until_complete(first()), 0.0

    def train(self) -> tuple[float, float]:
        if self._tinker is None:
            self._tinker = tinker.ServiceClient(base_url=self._url, api_key=KEY)
            made = self._tinker.create_lora_training_client("model", rank=RANK, seed=SEED, train_unembed=False)
            self._trained = made.result()
        data = [
            tinker.Datum(
                model_input=tinker.ModelInput.from_ints(row[:-1].tolist()),
                loss_fn_inputs={
                    "target_tokens": tinker.TensorData.from_torch(row[1:]),
                    "weights": tinker.TensorData.from_torch(torch.ones(LENGTH)),
                },
            )
            for row in batch()
        ]
        started_s = time.perf_counter()
        output = self._trained.forward_backward(data, "cross_entropy").result()
        took_s = time.perf_counter() - started_s
        self._trained.optim_step(tinker.AdamParams(learning_rate=LEARNING_RATE)).result()
        return took_s, output.metrics["loss:sum"]

    def close(self) -> None:
        self._loop.run_until_complete(self._client.close())
        if self._tinker is not None:
            self._tinker.close("success").result()


if __name__ == "__main__":
    main()
