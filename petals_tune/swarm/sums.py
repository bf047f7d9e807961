"""Adapter gradients that servers add up over the micro-batches of one backward: who sums what. Pure bookkeeping.

They come back once per server instead of once per micro-batch, with the reply to the last of its backwards. Whatever is
in a sum can be computed again from here.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field

import torch

from petals_tune.swarm.routes.route import Hop
from petals_tune.swarm.trace import CallContext, ChainGradients, Leg, Trace
from petals_tune.wire.span import BlockSpan

_numbers = itertools.count(1)  # a server tells the sums of one client apart by them


@dataclass(frozen=True, kw_only=True)
class Term:
    """A backward whose adapter gradients a server keeps."""

    leg: Leg
    context: CallContext
    grad: torch.Tensor  # (B, S, H) at the output of the leg
    place: int  # in the order of the rows


@dataclass(kw_only=True)
class PartialSum:
    """What one server sums on one span."""

    number: int
    hop: Hop
    expected: int | None = None  # terms with which the server returns the sum unasked; None: it has to be asked
    terms: list[Term] = field(default_factory=list)  # those that the server acknowledged
    whole: WholeSum | None = None  # the sum, once the server has returned it


@dataclass(frozen=True, kw_only=True)
class WholeSum:
    """A sum that a server returned, and deleted."""

    terms: int  # that are in it, by the server's word
    gradients: ChainGradients


class AdapterSums:
    """The sums of one backward of a whole batch."""

    def __init__(self, micro_batches: int | None = None) -> None:
        """`micro_batches`: how many will go forward and back; None: nothing is expected of servers."""
        self._sums: dict[tuple[str, BlockSpan], PartialSum] = {}
        self._left = micro_batches
        self._legs: Counter[tuple[str, BlockSpan]] = Counter()

    def forwarded(self, trace: Trace) -> None:
        """Note who went forward with a micro-batch, and is expected to go back with it."""
        self._left = None if self._left is None else self._left - 1
        self._legs.update((leg.hop.server.peer, leg.hop.span) for leg in trace.legs if leg.stage.adapter is not None)

    def on(self, hop: Hop) -> PartialSum:
        """The sum of the server of `hop` on its span; what is expected of it is known once all went forward."""
        key = (hop.server.peer, hop.span)
        if key not in self._sums:
            self._sums[key] = PartialSum(number=next(_numbers), hop=hop)
        if self._left == 0:
            self._sums[key].expected = self._legs[key] or None
        return self._sums[key]

    def in_order(self) -> list[PartialSum]:
        """By blocks, then by the first rows: what is added up from them does not depend on who answered first."""
        return sorted(
            self._sums.values(),
            key=lambda partial: (partial.hop.span, min((term.place for term in partial.terms), default=0)),
        )
