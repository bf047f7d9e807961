"""What a client adds to the servers' blocks, as values."""

from __future__ import annotations

from collections.abc import Sequence
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

    @property
    def frame(self) -> tuple[object, ...]:
        """All of a part but the values of its tensors."""
        shapes = [tuple(tensor.shape) for tensor in self.tensors]
        return self.block, self.method, self.module, self.scaling, self.dropout, shapes


@torch.no_grad()
def add_difference(base: Sequence[AdapterPart], difference: Sequence[AdapterPart]) -> list[AdapterPart]:
    """Return the parts that differ from `base` by `difference`: the same bits on a client and on its servers.

    Raises ValueError where the difference is one of other parts.
    """
    if [part.frame for part in base] != [part.frame for part in difference]:
        raise ValueError("the differences are not those of the tensors of their base")
    return [
        msgspec.structs.replace(
            part, tensors=[a.float() + b for a, b in zip(before.tensors, part.tensors, strict=True)]
        )
        for before, part in zip(base, difference, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class AdapterDifference:
    """What was added to an earlier version to make another one."""

    base: str  # the earlier version
    parts: tuple[AdapterPart, ...]  # with tensors that are encoded in 8 bits on the wire, and decoded to themselves


@dataclass(frozen=True, kw_only=True)
class AdapterVersion:
    """An adapter at one moment: its content, and the digest that names it."""

    version: str
    parts: tuple[AdapterPart, ...]  # in the order of the blocks
    replaces: str | None = None  # version of the same tensors before they were trained further, which nobody needs now
    difference: AdapterDifference | None = None  # from a version that servers may have; none on a fast line

    def on(self, span: BlockSpan) -> list[AdapterPart]:
        return [part for part in self.parts if part.block in span]
