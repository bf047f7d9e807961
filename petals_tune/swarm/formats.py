"""Wire formats of hidden states, gradients and adapters, for each server of a route."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from petals_tune.wire.records import ServerRecord
from petals_tune.wire.tensors import FormatOption, WireFormat, in_dtype, in_format

# On a slow line, by what tests/benchmarks/wire_formats.py measured of the loss (docs/network.md). Hidden states in 8
# bits change it by more than 1e-3 in 30 steps, since a few positions and channels outweigh all others, and so do the
# gradients of a soft prompt; an adapter's gradients, and its changes from step to step, do not.
SLOW_FORMAT: WireFormat = "float16"
SLOW_ADAPTER: WireFormat = "blockwise8"


@dataclass(kw_only=True)
class Formats:
    """Formats in which tensors go to a server and come back.

    `auto` is the dtype in which that server computes. A server casts what it is given to its dtype, and answers in that
    dtype, so no number changes. Gradients of one that computes in float16 are the exception: it scales them
    (blocks/graphs.py), as the format does. On a line that was measured to be slow (swarm/line.py), `auto` is two bytes
    a value for hidden states of training and their gradients, and one for an adapter's gradients and its changes from
    step to step; steps of generation, which are small, stay as they are.
    """

    hidden: FormatOption = "auto"
    grad: FormatOption = "auto"
    slow: bool | None = None  # None: not measured yet

    @property
    def auto(self) -> bool:
        """Whether a measured line decides anything."""
        return "auto" in (self.hidden, self.grad)

    def of_hidden(self, server: ServerRecord) -> WireFormat:
        return self._of(self.hidden, server)

    def of_grad(self, server: ServerRecord) -> WireFormat:
        return self._of(self.grad, server)

    def of_step(self, server: ServerRecord) -> WireFormat:
        """The format of a step of generation."""
        return server.dtype if self.hidden == "auto" else self.hidden

    @property
    def of_adapter(self) -> WireFormat:
        """The format of an adapter's gradients."""
        return SLOW_ADAPTER if self.slow else "float32"

    def hidden_for(self, server: ServerRecord, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` as it is sent to `server`."""
        wire_format = self.of_hidden(server)
        return in_format(hidden, wire_format) if wire_format != server.dtype else self.step_for(server, hidden)

    def step_for(self, server: ServerRecord, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` as it is sent to `server` in a step of generation."""
        return in_dtype(hidden, server.dtype) if self.hidden == "auto" else in_format(hidden, self.hidden)

    def grad_for(self, server: ServerRecord, grad: torch.Tensor) -> torch.Tensor:
        """`grad` as it is sent to `server`."""
        return in_format(grad, self.of_grad(server))

    def rounding(self, server: ServerRecord) -> frozenset[WireFormat]:
        """The formats that round what `server` gets or answers, beside what it rounds itself."""
        of_adapter = {SLOW_ADAPTER} if self.slow else set()
        return frozenset({self.of_hidden(server), self.of_grad(server), *of_adapter} - {server.dtype})

    def _of(self, option: FormatOption, server: ServerRecord) -> WireFormat:
        if option != "auto":
            return option
        return SLOW_FORMAT if self.slow and server.dtype == "float32" else server.dtype
