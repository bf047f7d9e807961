"""What a client adds to the servers' blocks, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import torch

from petals_tune.wire.span import BlockSpan


class AdapterPart(msgspec.Struct, frozen=True, kw_only=True):
    """What one block gets from its client: LoRA on a linear, or prompts at the block's input."""

    block: int
    method: Literal["lora", "prompt"]
    module: Annotated[str, msgspec.Meta(max_length=256)] = ""  # of a LoRA: the linear's path inside the block
    scaling: float = 1.0
    dropout: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0
    tensors: Annotated[list[torch.Tensor], msgspec.Meta(max_length=2)]  # lora: A (r, in), B (out, r); prompt: (P, H)


@dataclass(frozen=True, kw_only=True)
class AdapterVersion:
    """An adapter at one moment: its content, and the digest that names it."""

    version: str
    parts: tuple[AdapterPart, ...]  # in the order of the blocks

    def on(self, span: BlockSpan) -> list[AdapterPart]:
        return [part for part in self.parts if part.block in span]
