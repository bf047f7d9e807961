"""Section: small models of five families, every kind of request on the card against a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from petals_tune.blocks.engine import Engine
from petals_tune.blocks.loading import LoadedBlocks, load_blocks
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.wire.span import BlockSpan
from tests.blocks import device_requests as requests
from tests.gpu.context import Context
from tests.models import relative_error, save_model

TOLERANCE = 1e-4


def run(context: Context) -> None:
    for family in requests.LINEARS:
        with context.trying(family):
            check_family(context, family, Engine)


def check_family(
    context: Context,
    family: str,
    engine_on_card: Callable[[LoadedBlocks], Engine],
    *,
    device: str | Sequence[str] | None = None,
) -> None:
    folder = context.work / "families" / family
    if not folder.is_dir():
        save_model(folder, family)
    span, checkpoint = BlockSpan.parse(requests.SPAN), Checkpoint(str(folder))

    def load(device: str | Sequence[str]) -> LoadedBlocks:
        return load_blocks(checkpoint, span, quantization="none", dtype=torch.float32, device=device)

    card, cpu = engine_on_card(load(device or context.device)), Engine(load("cpu"))
    with context.trying(f"{family}: training"):
        errors: dict[str, float] = {}
        for padding in ("none", "left", "right"):
            ours, theirs = (requests.training(engine, family, padding, train=False) for engine in (card, cpu))
            ours.pop("bytes")  # kernels of a card keep other things than a CPU's
            errors |= {f"{name}, padding {padding}": relative_error(each, theirs[name]) for name, each in ours.items()}
        # A card draws other numbers than a CPU, but the same ones again.
        dropped = requests.training(card, family, "left", train=True)
        for name, kept in dropped.items():
            if name.startswith("kept"):
                errors[f"{name}, dropout"] = relative_error(kept, dropped[name.replace("kept", "again")])
        worst(context, f"{family}: forward, lease, recomputation, padding, LoRA, (IA)3, prompt, dropout", errors)
    with context.trying(f"{family}: generation"):
        pairs = zip(requests.batched_steps(card), requests.batched_steps(cpu), strict=True)
        errors = {f"step {number}": relative_error(*pair) for number, pair in enumerate(pairs)}
        pairs = zip(requests.adapted_steps(card, family), requests.adapted_steps(cpu, family), strict=True)
        errors |= {f"step {number} with adapters": relative_error(*pair) for number, pair in enumerate(pairs)}
        errors["positions"] = relative_error(requests.placed(card), requests.placed(cpu))
        worst(context, f"{family}: steps, sessions in a batch, padding, beams, adapters, positions", errors)


def worst(context: Context, what: str, errors: dict[str, float]) -> None:
    name = max(errors, key=lambda each: errors[each])
    context.row(what, errors[name], at_most=TOLERANCE, note=f"of {len(errors)}; {name}" if errors[name] else "")
