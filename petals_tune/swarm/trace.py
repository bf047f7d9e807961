"""What a call through the blocks carries, and what is kept of it for the way back: values, no network.

Shapes: B rows, S positions, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from petals_tune.swarm.route import Hop
from petals_tune.wire.adapter import AdapterPart, AdapterVersion
from petals_tune.wire.messages import Forward
from petals_tune.wire.span import BlockSpan


@dataclass(frozen=True, kw_only=True)
class CallContext:
    """What a call through the blocks carries besides the hidden states; cut by rows like them."""

    padding: torch.Tensor | None = None  # (B, S) bool, True = attend
    positions: torch.Tensor | None = None  # (B or 1, S) int64
    adapter: AdapterVersion | None = None
    train: bool = False
    seed: int = 0

    def rows(self, start: int, stop: int) -> CallContext:
        """The context of rows start:stop; every cut has dropout masks of its own."""
        padding = None if self.padding is None else self.padding[start:stop]
        positions = self.positions
        if positions is not None and positions.shape[0] > 1:
            positions = positions[start:stop]
        return replace(self, padding=padding, positions=positions, seed=self.seed + start)

    def adapter_on(self, span: BlockSpan) -> list[AdapterPart]:
        return [] if self.adapter is None else self.adapter.on(span)


@dataclass(frozen=True, kw_only=True)
class Leg:
    """One hop that was gone forward, with all that its backward, or its repetition, needs."""

    hop: Hop
    request: Forward  # holds the input of the span
    lease: int | None

    @property
    def output_grad(self) -> bool:
        """Whether anything in front of its output needs a gradient."""
        return self.request.input_grad or self.request.adapter is not None


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A forward through a whole chain."""

    hidden: torch.Tensor  # (B, S, H)
    context: CallContext
    legs: tuple[Leg, ...]


@dataclass
class ChainGradients:
    """Gradients at the input (B, S, H), and at the adapter's tensors by block, in the order of its parts."""

    hidden: torch.Tensor | None = None
    adapter: dict[int, list[torch.Tensor]] = field(default_factory=dict)
