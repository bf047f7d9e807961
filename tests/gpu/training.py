"""Training over two servers, from a process of its own whose part of the model is on the card; and where its time goes.

`main` runs in that process, `measure` in the one that has plain transformers on the same card.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import torch
from torch.nn import functional as F

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.wire.codec import decode, encode
from petals_tune.wire.messages import Forward
from petals_tune.wire.span import BlockSpan
from petals_tune.wire.tensors import in_format
from tests.gpu.context import Context
from tests.gpu.models import VOCABULARY

ROWS, LENGTH = 8, 144
HEAD = 128_256  # tokens of Llama 3; the models made here have few
# Wire format, and rows of a micro-batch (None: the default). Small ones keep both servers busy, large ones the card.
CASES: list[tuple[str, int | None]] = [("bfloat16", None), ("float32", None), ("bfloat16", 4), ("bfloat16", 8)]


def measure(context: Context, plain: Any, client: subprocess.Popen[str], line_mb_s: float) -> None:
    """Rows of the table: seconds of a step, of the line, of computing, and of the client's own part."""
    assert client.stdin is not None
    assert client.stdout is not None
    if head_s := json.loads(client.stdout.readline())["head_s"]:  # it is ready: nothing else runs on the card
        context.row("training, head of 128,256 tokens and loss on the card", 1000 * head_s, "ms", note="client's own")
    by_rows: dict[int, float] = {}
    for rows in (ROWS, 4, 1):
        with stepping(plain, rows) as step:
            by_rows[rows] = context.seconds(step)
        what = f"training, plain transformers, {rows} rows at once"
        context.row(what, ROWS * LENGTH / by_rows[rows], "tokens/s", note=f"{by_rows[rows]:.3f} s a step of {ROWS}")
    for wire, given in CASES:
        what = f"training, {wire}, micro-batches of {given or 'the default number of'} rows"
        with context.trying(what):
            client.stdin.write(json.dumps({"wire": wire, "rows": given}) + "\n")
            client.stdin.flush()
            seen = json.loads(client.stdout.readline())
            line_s = seen["moved_mb"] / line_mb_s
            computing_s = by_rows[ROWS]
            context.row(what, ROWS * LENGTH / seen["step_s"], "tokens/s", note=f"{seen['step_s']:.3f} s a step")
            note = (
                f"step {seen['step_s']:.3f} s = the swarm {seen['swarm_s']:.3f} + client's own {seen['own_s']:.3f} s; "
                f"line {line_s:.3f} s for {seen['moved_mb']:.0f} MB, computing {computing_s:.3f} s, with "
                f"{seen['rows']} rows at once {by_rows[seen['rows']]:.3f} s, encoding and decoding in one process "
                f"{seen['codec_s']:.3f} s"
            )
            share = max(computing_s, line_s) / seen["step_s"]
            context.row(f"{what}: share of the slower of computing and line", share, at_least=0.9, note=note)
            context.row(f"{what}: backwards without lease", seen["recomputations"], at_most=0)


@contextmanager
def stepping(model: Any, rows: int = ROWS) -> Iterator[Callable[[], None]]:
    """A step with LoRA: forward and backward in batches of `rows`, optimizer."""
    net = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)).to(model.device)

    def step() -> None:
        for part in ids.split(rows):
            net(input_ids=part, labels=part, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    yield step
    net.unload()


def main(context: Context, given: str) -> None:
    """Print a line of JSON when ready, and for each case on standard input one with its figures of a step."""
    options = json.loads(given)
    print(json.dumps({"head_s": head_seconds(context) if context.on_gpu else None}), flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        model = AutoDistributedModelForCausalLM.from_pretrained(
            options["folder"],
            initial_peers=options["peers"],
            wire_format=case["wire"],
            grad_format=case["wire"],
            micro_batch_rows=case["rows"],
        ).to(context.device)
        print(json.dumps(figures(context, model, case["wire"])), flush=True)
        model.remote_blocks.close()


def figures(context: Context, model: Any, wire: str) -> dict[str, float]:
    stats = model.remote_blocks.stats
    seen = []  # of each step: seconds, those of them that the client waited for the swarm, bytes
    with stepping(model) as step:
        step()
        for _ in range(5):
            context.wait()
            started_s, waited_s, moved = time.perf_counter(), stats.wait_s, stats.sent_bytes + stats.received_bytes
            step()
            context.wait()
            now = stats.sent_bytes + stats.received_bytes
            seen.append((time.perf_counter() - started_s, stats.wait_s - waited_s, now - moved))
    seconds, swarm_s, moved = sorted(seen)[len(seen) // 2]
    rows, servers = min(model.remote_blocks.backbone.micro_batch(LENGTH), ROWS), len(model.remote_blocks.route())
    return {
        "step_s": seconds,
        "swarm_s": swarm_s,
        "own_s": seconds - swarm_s,
        "moved_mb": moved / 1e6,
        "rows": rows,
        "codec_s": codec_seconds(context, model.config.hidden_size, wire, rows=rows, servers=servers),
        "recomputations": stats.recomputations,
    }


def codec_seconds(context: Context, width: int, wire: str, *, rows: int, servers: int) -> float:
    """Seconds to encode and decode all messages of a step, each tensor once on either side, one after the other."""
    hidden = torch.randn(rows, LENGTH, width)

    def message() -> None:
        decode(encode(Forward(span=BlockSpan(0, 1), hidden=in_format(hidden, wire))))

    return context.seconds(message) * 4 * servers * ROWS / rows


def head_seconds(context: Context) -> float:
    """Seconds of the head of a large vocabulary and the loss, forward and backward: the client's own part."""
    weight = torch.randn(HEAD, 4096, device=context.device, dtype=torch.bfloat16)
    labels = torch.randint(HEAD, (ROWS * LENGTH,), device=context.device)
    hidden = torch.randn(ROWS * LENGTH, 4096, device=context.device, dtype=torch.bfloat16, requires_grad=True)
    return context.seconds(lambda: F.cross_entropy(F.linear(hidden, weight).float(), labels).backward())
