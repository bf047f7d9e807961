"""Section: milliseconds of two blocks of Llama-3-8B's shape in the engine alone, without any network."""

from __future__ import annotations

import gc

import torch

from petals_tune.blocks.engine import Engine
from petals_tune.blocks.generation.session import Session
from petals_tune.blocks.loading import load_blocks
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.wire.messages import Backward, Forward, Step
from petals_tune.wire.span import BlockSpan
from tests.gpu.context import Context
from tests.gpu.models import make_small
from tests.models import relative_error

SPAN = BlockSpan(0, 2)
ROWS, LENGTH = 8, 144
PROMPT = 64


def run(context: Context) -> None:
    checkpoint = Checkpoint(str(make_small(context, "llama")))
    for quantization in ("none", "int8", "nf4"):
        with context.trying(quantization):
            loaded = load_blocks(
                checkpoint, SPAN, quantization=quantization, dtype=torch.bfloat16, device=context.device
            )
            engine = Engine(loaded)
            for rows, positions in ((1, LENGTH), (ROWS, LENGTH)):
                training(context, f"{quantization}, {rows} x {positions}", engine, rows, positions)
            for sessions in (1, 8, 64):
                steps(context, f"{quantization}, a token of {sessions} sessions", engine, sessions)
            arithmetic(context, quantization, engine)
            del loaded, engine
            gc.collect()


def arithmetic(context: Context, what: str, engine: Engine) -> None:
    """A row's result does not depend on its mates, and large activations stay finite."""
    hidden = torch.randn(4, 32, engine.hidden_size)
    hidden[1:] *= 100
    together, alone = (engine.forward(Forward(span=SPAN, hidden=each), None).output for each in (hidden, hidden[:1]))
    error = relative_error(together[:1].float(), alone.float())
    context.row(f"{what}: a row alone against a row with mates 100 times as large", error, at_most=0.02)
    large = engine.forward(Forward(span=SPAN, hidden=1e5 * hidden), None).output
    context.row(f"{what}: finite for activations of 1e5 and more", ok=bool(large.isfinite().all()))


def training(context: Context, what: str, engine: Engine, rows: int, positions: int) -> None:
    hidden = torch.randn(rows, positions, engine.hidden_size)
    request = Forward(span=SPAN, hidden=hidden, keep=True, input_grad=True)

    def both() -> None:
        result = engine.forward(request, None)
        engine.backward(Backward(lease=1, grad=hidden), result.graph, None)

    context.row(f"{what}: forward and backward", 1000 * context.seconds(both), "ms")
    context.row(f"{what}: forward", 1000 * context.seconds(lambda: engine.forward(request, None)), "ms")


def steps(context: Context, what: str, engine: Engine, count: int) -> None:
    sessions = [
        Session(client="c", span=SPAN, rows=1, max_length=128, adapter=None, adapter_version=None) for _ in range(count)
    ]
    prompt, token = torch.randn(1, PROMPT, engine.hidden_size), torch.randn(1, 1, engine.hidden_size)
    for number, session in enumerate(sessions):  # at different positions, as they are in life
        engine.step([(session, Step(session=0, hidden=prompt[:, : PROMPT - number % 8], position=0))])

    def once() -> None:
        made = engine.step(
            [(session, Step(session=0, hidden=token, position=session.position)) for session in sessions]
        )
        assert all(isinstance(each, torch.Tensor) for each in made), made

    context.row(what, 1000 * context.seconds(once, times=7), "ms")
