"""What a call through the blocks carries, and what is kept of it for the way back: values, no network.

Shapes: B rows, S positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from petals_tune.swarm.routes.route import Hop
from petals_tune.wire.adapter import AdapterPart, AdapterVersion
from petals_tune.wire.span import BlockSpan


@dataclass(frozen=True, kw_only=True)
class CallContext:
    """What a call through the blocks carries besides the hidden states; cut by rows like them."""

    padding: torch.Tensor | None = None  # (B, S) bool, True = attend
    positions: torch.Tensor | None = None  # (B or 1, S) int64
    context_length: int | None = None  # of all rows together, as in a Forward
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
class Stage:
    """What a forward asks of the server of one hop, its tensor left out."""

    hop: Hop
    adapter: str | None  # version of the adapter on these blocks
    keep: bool  # the server is to keep its graph
    input_grad: bool  # the backward will want the gradient at the input

    @property
    def output_grad(self) -> bool:
        """Whether anything in front of the output needs a gradient."""
        return self.input_grad or self.adapter is not None


def stages_of(route: Sequence[Hop], context: CallContext, *, keep: bool, input_grad: bool) -> list[Stage]:
    """A forward along `route`. A graph is kept where `keep` is set and a gradient will come back that far."""
    stages = []
    for hop in route:
        adapter = context.adapter.version if context.adapter is not None and context.adapter_on(hop.span) else None
        wanted = keep and (input_grad or adapter is not None)
        stages.append(Stage(hop=hop, adapter=adapter, keep=wanted, input_grad=input_grad))
        input_grad = stages[-1].output_grad
    return stages


@dataclass(frozen=True, kw_only=True)
class Leg:
    """One stage that was gone forward, with all that its backward, or its repetition, needs."""

    stage: Stage
    hidden: torch.Tensor  # (B, S, H) input of the span
    lease: int | None  # the graph that the server keeps; None: it keeps none
    shadow: object | None = None  # what an observer keeps of it (swarm/verify.py)

    @property
    def hop(self) -> Hop:
        return self.stage.hop


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
