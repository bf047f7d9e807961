"""Wire formats of hidden states and gradients, for each server of a route."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from petals_tune.wire.records import ServerRecord
from petals_tune.wire.tensors import FormatOption, WireFormat, in_dtype, in_format


@dataclass(frozen=True, kw_only=True)
class Formats:
    """Formats in which tensors go to a server and come back. `auto`: the dtype in which that server computes.

    A server casts what it is given to its dtype, and answers in that dtype, so `auto` changes no number.
    Gradients of one that computes in float16 are the exception: it scales them (blocks/graphs.py), as the format does.
    """

    hidden: FormatOption = "auto"
    grad: FormatOption = "auto"

    def of_hidden(self, server: ServerRecord) -> WireFormat:
        return server.dtype if self.hidden == "auto" else self.hidden

    def of_grad(self, server: ServerRecord) -> WireFormat:
        return server.dtype if self.grad == "auto" else self.grad

    def hidden_for(self, server: ServerRecord, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` as it is sent to `server`."""
        return in_dtype(hidden, server.dtype) if self.hidden == "auto" else in_format(hidden, self.hidden)

    def grad_for(self, server: ServerRecord, grad: torch.Tensor) -> torch.Tensor:
        """`grad` as it is sent to `server`."""
        return in_format(grad, self.of_grad(server))

    def rounding(self, server: ServerRecord) -> frozenset[WireFormat]:
        """The formats that round what `server` gets or answers, beside what it rounds itself."""
        return frozenset({self.of_hidden(server), self.of_grad(server)} - {server.dtype})
