"""Blocks, engines and requests as the tests of a server make them."""

from pathlib import Path
from typing import Any

import torch

from petals_tune.blocks.adapters import Adapter
from petals_tune.blocks.engine import Engine
from petals_tune.blocks.kv_cache import Session
from petals_tune.blocks.loading import TrimmedModel, load_blocks
from petals_tune.errors import PetalsTuneError
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.wire.messages import Forward, Step
from petals_tune.wire.span import BlockSpan

SPAN = BlockSpan(1, 4)  # of sessions


def load(folder: Path, span: str, quantization: str = "none") -> TrimmedModel:
    source = Checkpoint(str(folder))
    return load_blocks(source, BlockSpan.parse(span), quantization=quantization, dtype=torch.float32)


def forward(span: str, hidden: torch.Tensor, **fields: Any) -> Forward:
    """With a copy of `hidden`, as it comes from the wire."""
    return Forward(span=BlockSpan.parse(span), hidden=hidden.clone(), **fields)


def hidden(rows: int, length: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, length, 32, generator=torch.Generator().manual_seed(seed))


def session(
    rows: int = 1, *, adapter: Adapter | None = None, version: str | None = None, client: str = "client"
) -> Session:
    return Session(
        client=version or client,
        span=SPAN,
        rows=rows,
        max_length=32,
        adapter=adapter,
        adapter_version=version,
    )


def step(tensor: torch.Tensor, position: int, **fields) -> Step:
    return Step(session=0, hidden=tensor, position=position, **fields)


def outputs(engine: Engine, *steps: tuple[Session, Step]) -> list[torch.Tensor]:
    made = engine.step(steps)
    assert not [each for each in made if isinstance(each, PetalsTuneError)], made
    return made  # type: ignore[return-value]
