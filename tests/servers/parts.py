"""Blocks, engines and requests as the tests of a server make them."""

from pathlib import Path
from typing import Any

import torch

from petals_tune.blocks.loading import LoadedBlocks, load_blocks
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.wire.messages import Forward
from petals_tune.wire.span import BlockSpan


def load(folder: Path, span: str, quantization: str = "none") -> LoadedBlocks:
    source = Checkpoint(str(folder))
    return load_blocks(source, BlockSpan.parse(span), quantization=quantization, dtype=torch.float32)


def forward(span: str, hidden: torch.Tensor, **fields: Any) -> Forward:
    """With a copy of `hidden`, as it comes from the wire."""
    return Forward(span=BlockSpan.parse(span), hidden=hidden.clone(), **fields)
