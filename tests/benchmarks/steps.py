"""What a server computes for a token of one session, of many that share a step, and of a long text.

    python tests/benchmarks/steps.py [--turns 9] [--tokens 8] [--quick]

One process, one thread, no network: the engine alone, float32. The sides take turns, so that a busy machine disturbs
them alike. Milliseconds of processor time of a turn, which is 8 tokens of each session; medians; a ratio is the median
of the turns' own.

- `server_ms_8_over_1`: a token of 8 sessions, each with a LoRA of its own of rank 8 on queries and values, over one
  session with a LoRA. Blocks in the shape of Llama, 12 of 576.
- `server_ms_64_over_1`: a token of 64 sessions at mixed positions, of 17 to 520, over one in their middle. Blocks in
  the shape of Mistral, whose windows are of 256 positions.
- `long_context_ratio`: a token at 8,192 positions by plain transformers with its DynamicCache, which copies all keys at
  each, over the engine's; both multiply with torch's default library. Blocks in the shape of Llama.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from transformers import AutoModel, DynamicCache, LlamaConfig, MistralConfig

from petals_tune.blocks.adapters import Adapter
from petals_tune.blocks.engine import Engine
from petals_tune.blocks.generation.session import Session
from petals_tune.blocks.kernels import choose_library
from petals_tune.blocks.loading import load_blocks
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.messages import Step
from petals_tune.wire.span import BlockSpan

BLOCKS, WIDTH, HEADS, GROUPS = 12, 576, 9, 3
SHAPE = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "intermediate_size": 1536,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "max_position_embeddings": 16384,
}
SPAN = BlockSpan(0, BLOCKS)
LORAS, MANY, RANK, LONG = 8, 64, 8, 8192

Turn = Callable[[], None]  # some tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=8, help="of each session in a turn")
    parser.add_argument("--quick", action="store_true", help="short texts and two turns, to see that it runs")
    options = parser.parse_args()
    turns, long = (2, 256) if options.quick else (options.turns, LONG)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    figures: dict[str, float] = {}
    print("| a turn | one session, ms | all, ms | sessions | a session of them over the one |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        AutoModel.from_config(LlamaConfig(**SHAPE)).save_pretrained(folder + "/llama")
        AutoModel.from_config(MistralConfig(**SHAPE, sliding_window=256)).save_pretrained(folder + "/mistral")
        engine = engine_of(folder + "/llama")
        one, all_, ratio = compare(lora_turns(engine, options.tokens), turns, LORAS)
        print(f"| with LoRAs of their own | {one:.1f} | {all_:.1f} | {LORAS} | {ratio:.3f} |")
        figures["server_ms_8_over_1"] = ratio
        windowed = engine_of(folder + "/mistral")
        one, all_, ratio = compare(mixed_turns(windowed, options.tokens), turns, MANY)
        print(f"| windows, mixed positions | {one:.1f} | {all_:.1f} | {MANY} | {ratio:.3f} |")
        figures["server_ms_64_over_1"] = ratio
        del engine, windowed
        mine, plain, ratio = compare(long_turns(folder + "/llama", options.tokens, long), turns, 1)
        print()
        print("| a turn at | engine, ms | transformers, ms | ratio |")
        print("|---|---|---|---|")
        print(f"| {long} positions | {mine:.1f} | {plain:.1f} | {ratio:.2f} |")
        figures["long_context_ratio"] = ratio
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


def engine_of(folder: str) -> Engine:
    return Engine(load_blocks(Checkpoint(folder), SPAN, quantization="none", dtype=torch.float32))


def compare(sides: tuple[Turn, Turn], turns: int, sessions: int) -> tuple[float, float, float]:
    """Milliseconds of a turn of the first side, of the second, and the ratio of one session's share."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(turns + 1):
        for turn, of in zip(sides, seconds, strict=True):
            started_s = time.process_time()
            turn()
            of.append(time.process_time() - started_s)
    firsts, seconds_ = seconds[0][1:], seconds[1][1:]  # the first ones warm up
    ratio = statistics.median(other / one for one, other in zip(firsts, seconds_, strict=True)) / sessions
    return 1000 * statistics.median(firsts), 1000 * statistics.median(seconds_), ratio


def tokens(engine: Engine, sessions: list[Session], count: int) -> Turn:
    """A turn of so many tokens of each session, which go back to where they were."""
    starts = [session.position for session in sessions]
    hidden = torch.randn(1, 1, WIDTH)

    def turn() -> None:
        for at in range(count):
            steps = [
                (session, Step(session=0, hidden=hidden, position=start + at))
                for session, start in zip(sessions, starts, strict=True)
            ]
            for output in engine.step(steps):
                if isinstance(output, Exception):
                    raise output

    return turn


def started(engine: Engine, position: int, adapter: Adapter | None = None) -> Session:
    """A session at `position` with room for a few more."""
    session = Session(
        client="", span=SPAN, rows=1, max_length=position + 64, adapter=adapter, adapter_version=adapter and "version"
    )
    for at in range(0, position, 512):
        hidden = torch.randn(1, min(512, position - at), WIDTH)
        (output,) = engine.step([(session, Step(session=0, hidden=hidden, position=at))])
        if isinstance(output, Exception):
            raise output
    return session


def lora() -> Adapter:
    parts = [
        AdapterPart(
            block=block,
            method="lora",
            module=f"self_attn.{name}",
            scaling=2.0,
            tensors=[torch.randn(RANK, WIDTH) / WIDTH**0.5, torch.randn(out, RANK) / 10],
        )
        for block in range(BLOCKS)
        for name, out in (("q_proj", WIDTH), ("v_proj", WIDTH * GROUPS // HEADS))
    ]
    return Adapter(tuple(parts))


def lora_turns(engine: Engine, count: int) -> tuple[Turn, Turn]:
    one = tokens(engine, [started(engine, 64, lora())], count)
    return one, tokens(engine, [started(engine, 40 + 8 * number, lora()) for number in range(LORAS)], count)


def mixed_turns(engine: Engine, count: int) -> tuple[Turn, Turn]:
    one = tokens(engine, [started(engine, 268)], count)
    return one, tokens(engine, [started(engine, 17 + 8 * number - number % 3) for number in range(MANY)], count)


def long_turns(folder: str, count: int, length: int) -> tuple[Turn, Turn]:
    """The engine's tokens and those of plain transformers, whose cache is cut back after each turn."""
    choose_library("default")
    engine = engine_of(folder)
    model, cache = AutoModel.from_pretrained(folder).eval(), DynamicCache()
    with torch.inference_mode():
        for at in range(0, length, 512):
            model(inputs_embeds=torch.randn(1, min(512, length - at), WIDTH), past_key_values=cache)

    @torch.inference_mode()
    def plain() -> None:
        for _ in range(count):
            model(inputs_embeds=torch.randn(1, 1, WIDTH), past_key_values=cache)
        cache.crop(-count)

    return tokens(engine, [started(engine, length)], count), plain


if __name__ == "__main__":
    main()
