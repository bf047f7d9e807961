"""Section: blocks on several cards in one engine, every kind of request against a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from petals_tune.blocks.engine import Engine
from petals_tune.blocks.loading import LoadedBlocks
from petals_tune.wire.span import BlockSpan
from tests.blocks import device_requests as requests
from tests.gpu.context import Context
from tests.gpu.requests import check_family
from tests.pretend_device import GpuEngine


def run(context: Context) -> None:
    blocks = len(BlockSpan.parse(requests.SPAN))
    cards = 2 if context.rehearse else min(torch.cuda.device_count(), blocks)
    if cards < 2:
        context.row("blocks on several cards", note="skipped: this machine has one card")
        return
    devices = [f"cuda:{number * cards // blocks}" for number in range(blocks)]
    on_cards: Callable[[LoadedBlocks], Engine] = partial(GpuEngine, devices=devices) if context.rehearse else Engine
    for family in requests.LINEARS:
        with context.trying(family):
            check_family(context, family, on_cards, device="cpu" if context.rehearse else devices)
