"""Blocks, engines and requests as the tests of a server make them."""

from pathlib import Path
from typing import Any

import torch

from petals_tune.blocks.loading import LoadedBlocks, load_blocks
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.wire.messages import Forward
from petals_tune.wire.span import BlockSpan

# The proportions of SmolLM2-135M, the embedded default: the norms and scales weigh as much as there.
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "initializer_range": 0.05,
}
BLOOM = {"hidden_size": 512, "n_layer": 2, "n_head": 8, "initializer_range": 0.05}


def load(
    folder: Path, span: str, quantization: str = "none", dtype: torch.dtype = torch.float32, **options: Any
) -> LoadedBlocks:
    source = Checkpoint(str(folder))
    return load_blocks(source, BlockSpan.parse(span), quantization=quantization, dtype=dtype, **options)


def forward(span: str, hidden: torch.Tensor, **fields: Any) -> Forward:
    """With a copy of `hidden`, as it comes from the wire."""
    return Forward(span=BlockSpan.parse(span), hidden=hidden.clone(), **fields)
