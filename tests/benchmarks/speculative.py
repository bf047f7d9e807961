"""Tokens per second over slow lines with drafts and without, in a simulated network: one of three hosts each.

    python tests/benchmarks/speculative.py [--prompts 2] [--round-trips-ms 50 100] [--mbit 100] [--early-exit 24]

Answers to held-out people of the chit-chat corpus, sampled at temperature 0.7 on the embedded model, by look-up, by a
draft model that is the model's own first blocks (nobody trained these to be read out), and by a made draft: it knows
the text, says each token rightly with a chosen probability, and takes `--draft-ms` for a token (0). All sides give the
same texts, which is checked, and take turns. Tokens/s are those behind the first token of an answer; `with prompt` is
the speedup of all of it, the prompt's way through the blocks included. Two servers of one thread, float32 blocks. Needs
root (tests/links.py). Two prompts take about five minutes, 100 (`--prompts 100`) two to three hours. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from petals_tune.data.chitchat import ChitChat
from petals_tune.data.rows import context_ids
from petals_tune.model.convert import embedded_model
from petals_tune.remote.auto import AutoDistributedModelForCausalLM
from petals_tune.remote.speculative.drafters import Sampling
from tests.benchmarks.slow_network import served
from tests.drafts import MadeDrafter
from tests.links import network

TEMPERATURE = 0.7
FIRST_TOKENS = 16  # of a first answer, which is not measured
SHARES = (0.3, 0.6, 0.9)  # of right tokens, of the made draft
PLAIN, LOOKUP, EARLY = "without", "lookup", "draft"


@dataclass
class Side:
    """One way to generate, and what it did so far."""

    draft: Any
    tokens: int = 0  # without the first of each answer
    seconds: float = 0.0  # from there on
    whole_s: float = 0.0
    steps: int = 0
    tried: int = 0
    accepted: int = 0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    def figures(self, plain: Side) -> dict[str, float]:
        return {
            "tokens_per_s": self.tokens_per_s,
            "speedup": self.tokens_per_s / plain.tokens_per_s,
            "speedup_with_prompt": plain.whole_s / self.whole_s,
            "acceptance": self.accepted / max(self.tried, 1),
            "tokens_per_step": self.tokens / max(self.steps, 1),
        }


class TimedDrafter(MadeDrafter):
    """A made draft that takes its time."""

    draft_s = 0.0

    def draft(self, text: torch.Tensor, count: int, sampling: Sampling) -> torch.Tensor:
        time.sleep(count * self.draft_s)
        return super().draft(text, count, sampling)


def main() -> None:
    options = arguments()
    if options.peers:
        print(json.dumps(measured(options)))
        return
    figures: dict[str, Any] = {"prompts": options.prompts, "mbit": options.mbit, "load_average": os.getloadavg()[0]}
    for round_trip_ms in options.round_trips_ms:
        rows = in_network(options, round_trip_ms)
        print(f"round trip {round_trip_ms:g} ms, {options.mbit:g} Mbit/s, {options.prompts} prompts")
        print("| drafts | tokens/s | speedup | with prompt | acceptance | tokens a step |")
        print("|---|---|---|---|---|---|")
        for name, row in rows.items():
            speedups = f"{row['speedup']:.2f} | {row['speedup_with_prompt']:.2f}"
            values = f"{row['tokens_per_s']:.2f} | {speedups} | {row['acceptance']:.0%}"
            print(f"| {name} | {values} | {row['tokens_per_step']:.2f} |", flush=True)
        key = f"{round_trip_ms:g}ms"
        for name, row in rows.items():
            if name in (LOOKUP, EARLY):
                figures[f"{name}_speedup_{key}"] = row["speedup"]
                figures[f"{name}_acceptance_{key}"] = row["acceptance"]
        for share in SHARES:
            of_made = rows[made_name(share)]
            figures[f"draft_speedup_{key}_at_{share * 100:.0f}pct"] = of_made["speedup"]
            figures[f"draft_acceptance_{key}_at_{share * 100:.0f}pct"] = of_made["acceptance"]
    print(json.dumps(figures))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=48, help="of an answer, at the most")
    parser.add_argument("--round-trips-ms", type=float, nargs="+", default=[50.0, 100.0], help="between any two hosts")
    parser.add_argument("--mbit", type=float, default=100.0, help="of each host's line, per second, in each direction")
    parser.add_argument("--early-exit", type=int, default=24, help="blocks of the draft that is the model's beginning")
    parser.add_argument("--draft-ms", type=float, default=0.0, help="for a token of the made draft")
    parser.add_argument("--peers", nargs="+", help=argparse.SUPPRESS)  # of the client, which this starts on its host
    parser.add_argument("--source", help=argparse.SUPPRESS)
    return parser.parse_args()


def in_network(options: argparse.Namespace, round_trip_ms: float) -> dict[str, Any]:
    """The figures of a client on a host of its own, with two servers on others."""
    with ExitStack() as stack:
        source = str(embedded_model())
        hosts = stack.enter_context(network(3, round_trip_s=round_trip_ms / 1000, bits_per_s=options.mbit * 1e6))
        peers = served(source, hosts[1:], stack)
        command = [sys.executable, *sys.argv, "--source", source, "--peers", *peers]
        output = subprocess.run(hosts[0].command(*command), check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def made_name(share: float) -> str:
    return f"made_{share * 100:.0f}pct"


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """On the client's host: the figures of all sides, in turns."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.source)
    prompts = [context_ids(each.context, tokenizer) for each in islice(ChitChat().validation(), options.prompts + 1)]
    early = AutoModelForCausalLM.from_pretrained(
        options.source, dtype=torch.float32, num_hidden_layers=options.early_exit
    ).eval()
    early.name_or_path = options.source
    made = {
        made_name(share): TimedDrafter([], share=share, vocab_size=early.config.vocab_size, seed=int(100 * share))
        for share in SHARES
    }
    TimedDrafter.draft_s = options.draft_ms / 1000
    sides = {PLAIN: Side(None), LOOKUP: Side(LOOKUP), EARLY: Side(early)}
    sides |= {name: Side(drafter) for name, drafter in made.items()}
    # Models of their own: each keeps what it measured of its draft.
    models = {
        name: AutoDistributedModelForCausalLM.from_pretrained(options.source, initial_peers=options.peers)
        for name in sides
    }
    for number, prompt in enumerate(prompts):
        # First connections are made, and the time of a step is measured for the first time.
        is_first, new_tokens = number == 0, FIRST_TOKENS if number == 0 else options.new_tokens
        expected: list[int] = []
        for name, side in sides.items():
            text = generate(models[name], Side(side.draft) if is_first else side, prompt, new_tokens, seed=number)
            expected = expected or text  # the first side has no drafts
            assert text == expected, f"{name} gave another text"
            for drafter in made.values():
                drafter.texts = [expected]
    for model in models.values():
        model.remote_blocks.close()
    return {name: side.figures(sides[PLAIN]) for name, side in sides.items()}


def generate(model: Any, side: Side, prompt: list[int], new_tokens: int, *, seed: int) -> list[int]:
    """Generate an answer, and add what it took to `side`; returns the whole text."""
    ids, clock = torch.tensor([prompt]), Clock()
    with model.inference_session(max_length=len(prompt) + new_tokens) as session:
        torch.manual_seed(seed)
        started_s = time.perf_counter()
        output = model.generate(
            ids,
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
            streamer=clock,
            draft=side.draft,
        )
        ended_s = time.perf_counter()
        side.seconds += ended_s - clock.times_s[1]
        side.whole_s += ended_s - started_s
        new = output.shape[1] - len(prompt) - 1
        side.tokens += new
        speculation = session.speculation
        side.steps += new if speculation is None else speculation.steps
        if speculation is not None:
            side.tried += speculation.tried
            side.accepted += speculation.accepted
    return output[0].tolist()


class Clock(BaseStreamer):
    """When the prompt and each token came."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        pass


if __name__ == "__main__":
    main()
