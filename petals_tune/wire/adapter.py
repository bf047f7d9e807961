"""What a client adds to the servers' blocks, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec
import torch

from petals_tune.wire.span import BlockSpan


class AdapterPart(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter on one module of a block. What the tensors are, the method says (petals_tune/adapters)."""

    block: int
    method: Annotated[str, msgspec.Meta(max_length=32)]  # a server refuses those that it does not know
    module: Annotated[str, msgspec.Meta(max_length=256)] = ""  # path inside the block; "": the block itself
    scaling: float = 1.0
    dropout: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0
    tensors: Annotated[list[torch.Tensor], msgspec.Meta(max_length=2)]


@dataclass(frozen=True, kw_only=True)
class AdapterVersion:
    """An adapter at one moment: its content, and the digest that names it."""

    version: str
    parts: tuple[AdapterPart, ...]  # in the order of the blocks
    replaces: str | None = None  # version of the same tensors before they were trained further, which nobody needs now

    def on(self, span: BlockSpan) -> list[AdapterPart]:
        return [part for part in self.parts if part.block in span]
